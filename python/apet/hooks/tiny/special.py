"""Fields of tiny configurations, by model type, for which the rule of shrink.py is not enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers

from .fields import END, HEAD, IMAGE, LARGE, SIDE, START, VIDEO, VOCABULARY, WINDOW

# Model type -> fields by dotted path. A path with "+" is set only in default configurations, before the rule. Most
# fields are sizes that must agree with others, or fields that every checkpoint sets and the default leaves open.
_ALTERNATING = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SQUARE = {"vision_config.patch_size": 4}  # 12 x 12 patches, of which four make a token
_STARTS = {"vision_start_token_id": START, "vision_end_token_id": END}
_OMNI = _STARTS | {"audio_start_token_id": 110, "audio_end_token_id": 111, "audio_token_id": 112}
_SAM = {"vision_config.sam_config.downsample_channels": [16, 32], "vision_config.sam_config.window_size": 4}
_GEMMA = _SQUARE | {"mm_tokens_per_image": 36}
_GEMMA4 = {"+vision_config": lambda _: transformers.AutoConfig.for_model("gemma4_vision").to_dict()}
_MINICPM = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_GOT = {"vision_config.image_size": 96, "vision_config.patch_size": 4}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {36: 24}, "max_value_projector_patch_to_query_dict": 24},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, "IMGIMGA": 99}},
    "cohere_compass": {
        "+text_config.layer_types": _ALTERNATING * 20,
        "+text_config.rope_parameters": dict.fromkeys(_ALTERNATING, _ROPE),
    },
    "deepseek_ocr2": _SAM
    | {
        "text_config.mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 98, "<|visual token 000000|>": 99}},
    "diffusion_gemma": _GEMMA4
    | {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32},
    "dots3_note": {"text_config.head_dim": 2 * HEAD},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "gemma3": _GEMMA,
    "shieldgemma2": _GEMMA,
    "gemma4": _GEMMA4,
    "gemma4_unified": {
        "+vision_config": lambda _: transformers.AutoConfig.for_model("gemma4_unified_vision").to_dict(),
        "vision_config.mm_embed_dim": 32,
        "vision_config.output_proj_dims": 32,
        "vision_config.mm_posemb_size": 16,
    },
    "glm5_next": {"+text_config.mlp_layer_types": ["dense"] * 2 + ["sparse"] * 43},
    "got_ocr2": _GOT,
    "pp_chart2table": _GOT,
    "gemma3n": {
        "vision_soft_tokens_per_image": 36,
        "vision_config.vocab_offset": 200,
        "audio_config.vocab_offset": 300,
    },
    "perception_lm": {"vision_use_cls_token": True, "projector_pooling_ratio": 1},
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [1, 1, 1, 1],
        "vision_config.patch_size": 6,
        "vision_config.hidden_size": 64,  # 64 to a head
        "qformer_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
    },
    "hunyuan_vl": {
        "text_config.head_dim": HEAD,
        "text_config.rope_parameters.mrope_section": [2, 2, 2, 2],
        "vision_config.max_image_size": SIDE,
        "vision_config.min_image_size": 8,
    },
    "janus": {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1], "vq_config.num_res_blocks": 1},
    "kimi_k25": {"projection_hidden_size": 32},
    "lfm2_vl": {"+text_config.layer_types": ["conv", "full_attention"] * 16},
    "llama4": {
        "vision_config.projector_input_dim": 64,
        "vision_config.vision_output_dim": 64,
        "vision_config.intermediate_size": 128,
    },
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM
    | {"image_start_id": START, "image_end_id": END, "slice_start_id": 120, "slice_end_id": 121, "newline_id": 122},
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config.hidden_sizes": [8, 8, 8, 16],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "nemotron_h_omni": {
        "text_config.layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "mlp"],
        "text_config.num_hidden_layers": 5,
        "vision_config.max_img_size": 96,
        "vision_hidden_size": 32,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "ovis2": {"vocab_size": VOCABULARY, "hidden_size": 64, "vision_config.image_size": SIDE},
    "qwen2_vl": {"vision_config.hidden_size": 64, "vision_config.mlp_ratio": 2},
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": {"vision_config.window_size": 16, "vision_config.tokens_per_second": 2},
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
        "text_config.indexer_budget": LARGE,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": WINDOW},
    "unlimited_ocr": _SAM,
}
