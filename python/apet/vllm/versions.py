"""What the plugin replaces and overrides in vLLM, checked before it does so: tested with vLLM 0.32.0 and 0.33.0."""

from __future__ import annotations

PROCESSOR = "vllm.multimodal.processing.BaseMultiModalProcessor"
# Functions and classes, and the parameters or fields of theirs that the plugin uses.
USED = {
    "vllm.v1.core.sched.scheduler.Scheduler._try_schedule_encoder_inputs": (
        *("request", "num_computed_tokens", "num_new_tokens", "encoder_compute_budget", "shift_computed_tokens"),
    ),
    "vllm.v1.engine.input_processor.InputProcessor._validate_model_input": ("prompt_input", "prompt_type"),
    "vllm.multimodal.processing.InputProcessingContext": ("model_config", "tokenizer"),
    "vllm.multimodal.processing.InputProcessingContext.get_merged_mm_kwargs": ("kwargs",),
    "vllm.multimodal.processing.ProcessorInputs": ("mm_data_items", "hf_processor_mm_kwargs"),
    "vllm.multimodal.processing.PromptUpdate._resolve_content": ("item_idx",),
    "vllm.multimodal.processing.PromptUpdateDetails": ("full", "is_embed"),
    "vllm.multimodal.inputs.MultiModalBatchedField": ("keep_on_cpu",),
    "vllm.multimodal.inputs.MultiModalFeatureSpec": ("data", "mm_position"),
    "vllm.multimodal.inputs.PlaceholderRange": ("offset", "length", "is_embed"),
    f"{PROCESSOR}.apply": ("inputs", "timing_ctx"),
    f"{PROCESSOR}.get_dummy_inputs": ("mm_counts",),
    f"{PROCESSOR}._get_mm_hashes": ("inputs",),
    f"{PROCESSOR}._get_cache_missing_processor_kwargs": ("inputs", "mm_is_cached"),
    f"{PROCESSOR}._apply_hf_processor_main": ("mm_items", "hf_kwargs"),
    f"{PROCESSOR}._get_prompt_updates": ("mm_items", "hf_processor_mm_kwargs", "out_mm_kwargs"),
    f"{PROCESSOR}._apply_prompt_updates": ("token_ids", "mm_prompt_updates"),
}
