"""Configurations of the tiny models, with the tokens and the sizes that they share."""

from __future__ import annotations

QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<video>", "<img>", "</img>"]
SPECIAL += ["<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<start_of_image>", "<end_of_image>"]
SPECIAL += ["<image_soft_token>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
SPECIAL += ["<|begin_of_video|>", "<|end_of_video|>", "\n\n", "\n\n\n", "\n\n\n\n"]
# After the characters: SmolVLM's, around a picture and its tiles; Llama 4's.
LATER = ["<fake_token_around_image>", "<global-img>"]
LATER += ["<|patch|>", "<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"]
PAD, BOS, EOS, _, IMAGE, IMAGE_PAD, VIDEO_PAD, START, END, VIDEO = range(10)
CONTEXT, IMG, BREAK, LAST, BOI, EOI, SOFT = range(12, 19)
GLM_IMAGE, GLM_VIDEO, GLM_START, GLM_END, GLM_FILM, GLM_CUT = range(19, 25)
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
TILE_TOKEN = len(SPECIAL + CHARACTERS) + LATER.index("<|patch|>")
VOCABULARY = 256
SIDE, PATCH = 112, 14  # pixels of a LLaVA image or tile, and of a patch
TILE = (SIDE // PATCH) ** 2  # 64 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]

TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
LLAVA = {
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projection_dim": 32,
    },
    "text_config": {"model_type": "llama", **TEXT},
    "image_token_index": IMAGE,
    "image_token_id": IMAGE,
    "tie_word_embeddings": False,
}
QWEN = {
    "vision_config": {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
    "text_config": {**TEXT, "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [4, 6, 6]}},
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "tie_word_embeddings": False,
}

SIGLIP = {**LLAVA["vision_config"], "model_type": "siglip_vision_model", "vision_use_head": False}
ONEVISION = {
    **LLAVA,
    "vision_config": SIGLIP,
    "text_config": {"model_type": "qwen2", **TEXT},
    "image_grid_pinpoints": PINPOINTS,
    "video_token_index": VIDEO,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
INTERN = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [SIDE, SIDE],
        "patch_size": [PATCH, PATCH],
    },
    "text_config": {"model_type": "qwen2", **TEXT},
    "image_token_id": CONTEXT,
    "image_seq_length": TILE // 4,
    "tie_word_embeddings": False,
}
# OpenGVLab's format, whose configuration is code beside the weights.
CHAT = """from transformers import PretrainedConfig, Qwen2Config

class InternVLChatConfig(PretrainedConfig):
    model_type = "internvl_chat"

    def __init__(self, vision_config=None, llm_config=None, **kwargs):
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        self.llm_config = Qwen2Config(**(llm_config or {}))
        super().__init__(**kwargs)
"""
INTERN_CHAT = {
    "architectures": ["InternVLChatModel"],
    "model_type": "internvl_chat",
    "auto_map": {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"},
    "vision_config": {
        **INTERN["vision_config"],
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
        "qk_normalization": False,
        "initializer_factor": 1.0,
    },
    "llm_config": {"architectures": ["Qwen2ForCausalLM"], **TEXT},
    "force_image_size": SIDE,
    "select_layer": -1,
    "downsample_ratio": 0.5,
    "ps_version": "v2",
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 4,
    "dynamic_image_size": True,
    "use_thumbnail": True,
}
GEMMA = {
    "vision_config": SIGLIP,
    "text_config": {**TEXT, "head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "mm_tokens_per_image": TILE // 4,
    "boi_token_index": BOI,
    "eoi_token_index": EOI,
    "image_token_index": SOFT,
    "tie_word_embeddings": False,
}
IDEFICS = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    },
    "text_config": {"model_type": "llama", **TEXT},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": PAD,
    "tie_word_embeddings": False,
}
MISTRAL = {
    "vision_config": {
        "model_type": "pixtral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "head_dim": 32,
        "image_size": 2 * SIDE,
        "patch_size": PATCH,
    },
    "text_config": {"model_type": "mistral", **TEXT, "head_dim": 32, "sliding_window": None},
    "image_token_index": IMG,
    "spatial_merge_size": 2,
    "vision_feature_layer": -1,
    "tie_word_embeddings": False,
}
PIXTRAL = {
    **{name: value for name, value in MISTRAL.items() if name != "spatial_merge_size"},
    "vision_feature_select_strategy": "full",
}
QWEN2 = {
    **QWEN,
    "vision_config": {
        "depth": 2,
        "num_heads": 2,
        "embed_dim": 64,
        "hidden_size": TEXT["hidden_size"],
        "mlp_ratio": 2,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
}
GLM_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}
GLM = {
    "vision_config": {
        "depth": 2,
        "num_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": TEXT["hidden_size"],
        "image_size": SIDE,
        "patch_size": PATCH,
    },
    "text_config": {**TEXT, "rope_parameters": GLM_ROPE},
    "image_token_id": GLM_IMAGE,
    "video_token_id": GLM_VIDEO,
    "image_start_token_id": GLM_START,
    "image_end_token_id": GLM_END,
    "video_start_token_id": GLM_FILM,
    "video_end_token_id": GLM_CUT,
    "tie_word_embeddings": False,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6], "mrope_interleaved": True}
QWEN3 = {
    **QWEN,
    "vision_config": {
        "depth": 3,
        "num_heads": 2,
        "hidden_size": 64,
        "intermediate_size": 96,
        "out_hidden_size": TEXT["hidden_size"],
        "patch_size": PATCH,
        "num_position_embeddings": TILE,
        "deepstack_visual_indexes": [0, 1],
    },
    "text_config": {**TEXT, "head_dim": 32, "rope_parameters": ROPE},
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True}
QWEN3_MOE = {**QWEN3, "text_config": {**QWEN3["text_config"], **EXPERTS}}
LINEAR = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "rope_parameters": {**ROPE, "partial_rotary_factor": 1.0},
}
QWEN3_5 = {
    **QWEN3,
    "vision_config": {**QWEN3["vision_config"], "deepstack_visual_indexes": []},
    "text_config": {**QWEN3["text_config"], **LINEAR},
}
QWEN3_5_MOE = {
    **QWEN3_5,
    "text_config": {**QWEN3_5["text_config"], **EXPERTS, "shared_expert_intermediate_size": 64},
}
ROUTED = {
    "use_qk_norm": False,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "head_dim": 32,
}
GLM_MOE = {**GLM, "text_config": {**GLM["text_config"], **ROUTED}}
MINICPM = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 2 * SIDE,
        "patch_size": PATCH,
    },
    "text_config": {"model_type": "qwen3_5_text", **QWEN3_5["text_config"]},
    "insert_layer_id": 0,
    "image_size": 2 * SIDE,
    "image_token_id": IMAGE_PAD,
    "video_token_id": VIDEO_PAD,
    "tie_word_embeddings": False,
}
SOFT_TOKENS = 70  # the least that Gemma 4 has of an image
GEMMA4 = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "position_embedding_size": 512,
        "default_output_length": SOFT_TOKENS,
    },
    "text_config": {**TEXT, "head_dim": 32, "global_head_dim": 32, "sliding_window": 64}
    | {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
    | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 32}
    | {"use_bidirectional_attention": "vision"},
    "boi_token_id": BOI,
    "eoi_token_id": EOI,
    "image_token_id": SOFT,
    "video_token_id": GLM_VIDEO,
    "tie_word_embeddings": False,
}
LLAMA4 = {
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
        "vision_output_dim": 64,
    },
    "text_config": {**TEXT, "head_dim": 32, "intermediate_size_mlp": 192}
    | {"num_local_experts": 2, "interleave_moe_layer_step": 2, "attention_chunk_size": 1024},
    "boi_token_index": TILE_TOKEN + 1,
    "eoi_token_index": TILE_TOKEN + 2,
    "image_token_index": TILE_TOKEN,
    "tie_word_embeddings": False,
}
KINDS = {
    "llava": ("Llava", LLAVA),
    "llava_next": ("LlavaNext", {**LLAVA, "image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": ("LlavaOnevision", ONEVISION),
    "internvl": ("InternVL", INTERN),
    "gemma3": ("Gemma3", GEMMA),
    "idefics3": ("Idefics3", IDEFICS),
    "mistral3": ("Mistral3", MISTRAL),
    "pixtral": ("Llava", PIXTRAL),
    "gemma4": ("Gemma4", GEMMA4),
    "llama4": ("Llama4", LLAMA4),
    "minicpmv4_6": ("MiniCPMV4_6", MINICPM),
    "glm4v": ("Glm4v", GLM),
    "glm4v_moe": ("Glm4vMoe", GLM_MOE),
    "qwen2_vl": ("Qwen2VL", QWEN2),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN),
    "qwen3_vl": ("Qwen3VL", QWEN3),
    "qwen3_vl_moe": ("Qwen3VLMoe", QWEN3_MOE),
    "qwen3_5": ("Qwen3_5", QWEN3_5),
    "qwen3_5_moe": ("Qwen3_5Moe", QWEN3_5_MOE),
    "smolvlm": ("SmolVLM", IDEFICS),
}
