"""Tiny models as they lie on the hub: random weights, a tokenizer of single characters, the model's own processor.

Weights are wide, so that another image token, or one at another place, moves the logits by far more than rounding does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<video>", "<img>", "</img>"]
SPECIAL += ["<IMG_CONTEXT>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<start_of_image>", "<end_of_image>"]
SPECIAL += ["<image_soft_token>", "<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>"]
SPECIAL += ["<|begin_of_video|>", "<|end_of_video|>", "\n\n", "\n\n\n", "\n\n\n\n"]
PAD, BOS, EOS, _, IMAGE, IMAGE_PAD, VIDEO_PAD, START, END, VIDEO = range(10)
CONTEXT, IMG, BREAK, LAST, BOI, EOI, SOFT = range(12, 19)
GLM_IMAGE, GLM_VIDEO, GLM_START, GLM_END, GLM_FILM, GLM_CUT = range(19, 25)
VOCABULARY = 256
SIDE, PATCH = 112, 14  # pixels of a LLaVA image or tile, and of a patch
TILE = (SIDE // PATCH) ** 2  # 64 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"

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
# OpenGVLab's format, whose configuration is code that lies beside the weights.
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
KINDS = {
    "llava": ("Llava", LLAVA),
    "llava_next": ("LlavaNext", {**LLAVA, "image_grid_pinpoints": PINPOINTS}),
    "llava_onevision": ("LlavaOnevision", ONEVISION),
    "internvl": ("InternVL", INTERN),
    "gemma3": ("Gemma3", GEMMA),
    "mistral3": ("Mistral3", MISTRAL),
    "glm4v": ("Glm4v", GLM),
    "qwen2_vl": ("Qwen2VL", QWEN2),
    "qwen2_5_vl": ("Qwen2_5_VL", QWEN),
    "qwen3_vl": ("Qwen3VL", QWEN3),
    "qwen3_vl_moe": ("Qwen3VLMoe", QWEN3_MOE),
    "qwen3_5": ("Qwen3_5", QWEN3_5),
}
NAMED = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    },
    "gemma3": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    },
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """One token a character, and what the model's processor calls special."""
    words = SPECIAL + [chr(c) for c in range(32, 127)] + ["\n"]
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    level.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[4:] if name == "gemma3" else SPECIAL[4:-3],
        model_specific_special_tokens=NAMED.get(name, {}),
        chat_template=TEMPLATE,
    )


def configure(name: str, folder: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    """Configuration and processor of the model, one of KINDS, in the folder; text, vision: sizes other than the tiny
    ones."""
    kind, more = KINDS[name]
    sizes = {
        "text_config": {**more["text_config"], **(text or {})},
        "vision_config": {**more["vision_config"], **(vision or {})},
    }
    config = getattr(transformers, f"{kind}Config")(**{**more, **sizes})
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(folder)
    processor(name, config).save_pretrained(folder)
    return config


def save_chat(folder: Path) -> Path:
    """InternVL in OpenGVLab's format, which transformers has not."""
    (folder / "configuration_internvl_chat.py").write_text(CHAT)
    (folder / "config.json").write_text(json.dumps(INTERN_CHAT))
    tokenizer("internvl_chat").save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**TEXT)
    decoder = transformers.Qwen2ForCausalLM._from_config(config).state_dict()
    shapes = {f"language_model.{key}": weight.shape for key, weight in decoder.items()}
    vision, size = INTERN_CHAT["vision_config"], TEXT["hidden_size"]
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes |= {
        "vision_model.embeddings.class_embedding": (1, 1, width),
        "vision_model.embeddings.position_embedding": (1, 1 + TILE, width),
        "vision_model.embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        "vision_model.embeddings.patch_embedding.bias": (width,),
    }
    for layer in range(vision["num_hidden_layers"]):
        linears = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        linears |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner), "norm1": (width,), "norm2": (width,)}
        at = f"vision_model.encoder.layers.{layer}"
        shapes |= {f"{at}.{key}.weight": shape for key, shape in linears.items()}
        shapes |= {f"{at}.{key}.bias": shape[:1] for key, shape in linears.items()}
        shapes |= {f"{at}.{key}": (width,) for key in ("ls1", "ls2")}
    connector = {0: (4 * width,), 1: (size, 4 * width), 3: (size, size)}
    shapes |= {f"mlp1.{key}.weight": shape for key, shape in connector.items()}
    shapes |= {f"mlp1.{key}.bias": shape[:1] for key, shape in connector.items()}
    wide = {key: 0.15 * torch.randn(shape) for key, shape in shapes.items()}
    ones = {key for key, shape in shapes.items() if len(shape) == 1 and not key.endswith("bias")}
    save_file({key: weight + (key in ones) for key, weight in wide.items()}, folder / "model.safetensors")
    return folder


def save(name: str, folder: Path) -> Path:
    """The whole tiny model in the folder."""
    if name == "internvl_chat":
        return save_chat(folder)
    config = configure(name, folder)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if not name.startswith(("llava", "gemma")):
        model.save_pretrained(folder)
        if name == "qwen3_vl_moe":  # on the hub, experts are the other way round
            weights = load_file(folder / "model.safetensors")
            turned = {k: v.mT.contiguous() if ".experts." in k else v for k, v in weights.items()}
            save_file(turned, folder / "model.safetensors", {"format": "pt"})
        return folder
    # vLLM knows the names that checkpoints on the hub have: there, these have a CLIP or SigLIP model within the tower.
    weights = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def processor(name: str, config: Any) -> Any:
    """The processor that transformers has for the model."""
    words = tokenizer(name)
    side, patch = SIDE, PATCH
    square = {"size": {"height": side, "width": side}}
    if name.startswith("qwen"):
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        pixels = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}
        images = transformers.Qwen2VLImageProcessor(**sizes, **pixels)
        if name in ("qwen2_vl", "qwen2_5_vl"):
            videos = transformers.Qwen2VLVideoProcessor(**sizes, **pixels)
            kind = getattr(transformers, f"{KINDS[name][0]}Processor")
            return kind(images, words, videos, chat_template=TEMPLATE)
        size = {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}
        videos = transformers.Qwen3VLVideoProcessor(**sizes, size=size, cap_pixels_per_frame=False)
        return transformers.Qwen3VLProcessor(images, words, videos, chat_template=TEMPLATE)
    if name == "glm4v":
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        sizes |= {"size": {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}}
        images, videos = transformers.Glm4vImageProcessor(**sizes), transformers.Glm4vVideoProcessor(**sizes)
        return transformers.Glm4vProcessor(images, words, videos, chat_template=TEMPLATE)
    if name == "internvl":
        images = transformers.GotOcr2ImageProcessor(**square, crop_to_patches=True, max_patches=4)
        videos = transformers.InternVLVideoProcessor(**square)
        return transformers.InternVLProcessor(images, words, videos, image_seq_length=TILE // 4, chat_template=TEMPLATE)
    if name == "gemma3":
        images = transformers.Gemma3ImageProcessor(**square)
        return transformers.Gemma3Processor(images, words, image_seq_length=TILE // 4, chat_template=TEMPLATE)
    if name == "mistral3":
        images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * side}, patch_size=patch)
        return transformers.PixtralProcessor(
            images, words, patch_size=patch, spatial_merge_size=2, chat_template=TEMPLATE
        )
    if name == "llava_onevision":
        images = transformers.LlavaOnevisionImageProcessor(**square, image_grid_pinpoints=PINPOINTS)
        videos = transformers.LlavaOnevisionVideoProcessor(**square)
        return transformers.LlavaOnevisionProcessor(
            images,
            words,
            videos,
            num_image_tokens=TILE,
            vision_feature_select_strategy="full",
            chat_template=TEMPLATE,
        )
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    more = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name == "llava":
        return transformers.LlavaProcessor(transformers.CLIPImageProcessor(**size), words, **more)
    images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextProcessor(images, words, **more)
