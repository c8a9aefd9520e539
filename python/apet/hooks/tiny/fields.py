"""The sizes of tiny models, and the fields of a configuration that are set to them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PAD, EOS, START, END, VIDEO, IMAGE = 0, 2, 123, 124, 125, 126  # token ids; text uses 3..119
VOCABULARY = 128
LAYERS = 4
SIDE = 48  # pixels a side of an image or tile
PATCH = 8
TILE = (SIDE // PATCH) ** 2  # 36 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WINDOW = 8  # of sliding and chunked attention: shorter than what is left of a prompt
HEAD = 16
LIMIT = 30_000_000  # parameters; a tiny model has one million or less
LARGE = 1024  # top-k of indexed attention: all keys, since ties among random scores could make right results differ

# The fields of a decoder's configuration, by name; those of an encoder follow.
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "moe_hidden_size": 64,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "swa_head_dim": HEAD,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "qk_head_dim": 2 * HEAD,
    "v_head_dim": HEAD,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": LARGE,
    "index_topk_blocks": LARGE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "loop_gate_rank": 8,
    "rotary_dim": 8,
    "hc_lowrank": 8,
    "ple_embed_dim": 16,
    "block_multiple_of": 8,
    "num_nextn_predict_layers": 0,
    "query_pre_attn_scalar": HEAD,
    "max_window_layers": LAYERS,
}
ENCODER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "mlp_dim": 48,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": HEAD,
    "image_size": SIDE,
    "num_position_embeddings": 144,
    "num_patches": 144,
    "conv_channels": 8,
    "output_channels": 16,
    "downsample_hidden_size": 16,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "max_source_positions": 64,
}
# Widths of the output of an encoder or a projector, which equal the decoder's width.
OUTPUT = ("out_hidden_size", "text_hidden_size", "output_dim", "projector_output_dim", "adapter_out_dim")
PROJECTOR = ("projector_hidden_size", "projection_hidden_size", "projection_dim", "alignment_intermediate_size")
BACKBONE = (  # fields that name layers of an encoder
    "out_features",
    "out_indices",
    "stage_names",
)
DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers")
MERGES = ("spatial_merge_size", "downsample_ratio", "downsample_factor", "pixel_shuffle_ratio", "scale_factor")
TOKEN = re.compile(r"(_token_id|_token_index|_patch_id|_(start|end|newline|sep|eod)_id)$")
