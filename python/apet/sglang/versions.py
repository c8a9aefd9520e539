"""What the plugin uses of SGLang, checked before it is used: tested with SGLang 0.5.23."""

from __future__ import annotations

PROCESSOR = "sglang.srt.managers.multimodal_processor.get_mm_processor"
PREPARE = "sglang.srt.managers.mm_utils.prepare_mm_inputs"
EMBED = "sglang.srt.managers.mm_utils.embed_mm_inputs"
# Functions and classes, and the parameters or fields of theirs that the plugin uses, in their order.
USED = {
    PROCESSOR: ("hf_config",),
    PREPARE: ("input_ids", "forward_batch"),
    EMBED: ("mm_inputs_list", "multimodal_model", "data_embedding_func_mapping", "use_deepstack"),
    "sglang.srt.managers.schedule_batch.MultimodalDataItem": (
        *("modality", "hash", "offsets", "precomputed_embeddings", "model_specific_data"),
    ),
    "sglang.srt.managers.schedule_batch.MultimodalProcessorOutput": (
        *("mm_items", "input_ids", "padded_input_ids", "mrope_positions", "mrope_position_delta", "token_type_ids"),
    ),
    "sglang.srt.managers.io_struct.GenerateReqInput": ("mm_hashes", "mm_processor_kwargs", "session_params"),
    "sglang.srt.managers.mm_schedule.embedding_cache": (),
    "sglang.srt.mem_cache.multimodal_cache.MultiModalStaticCache.combine_hashes": ("mm_hashes",),
    "sglang.srt.model_executor.forward_batch_info.ForwardBatch": (
        *("mm_inputs", "mrope_positions", "extend_prefix_lens_cpu", "extend_seq_lens_cpu"),
    ),
    "sglang.srt.runtime_context.get_mm": (),
    "sglang.srt.runtime_context.get_disagg": (),
    "sglang.srt.runtime_context.get_parallel": (),
    "sglang.srt.mem_cache.multimodal_cache.MultiModalStaticCache.free": ("mm_hash",),
    "sglang.srt.managers.schedule_batch.MultimodalDataItem.set_hash": ("hash_value",),
    "sglang.srt.managers.schedule_batch.MultimodalProcessorOutput.build_padded_input_ids": ("input_ids", "mm_items"),
}
