"""Tiny models as they lie on the hub: random weights, a tokenizer of single characters, the model's own processor.

Weights are wide, so that another image token, or one at another place, moves the logits by far more than rounding does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

QWEN_IMAGE, QWEN_VIDEO = (f"<|vision_start|><|{kind}_pad|><|vision_end|>" for kind in ("image", "video"))
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
SPECIAL += ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
PAD, BOS, EOS, _, IMAGE, IMAGE_PAD, VIDEO_PAD, START, END = range(len(SPECIAL))
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


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
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
        additional_special_tokens=SPECIAL[4:],
        chat_template=TEMPLATE,
    )


def configure(name: str, folder: Path, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None) -> Any:
    """Configuration and processor of the model (llava, llava_next or qwen2_5_vl) in the folder; text, vision: sizes
    other than the tiny ones."""
    kind, more = {
        "llava": ("Llava", LLAVA),
        "llava_next": ("LlavaNext", {**LLAVA, "image_grid_pinpoints": PINPOINTS}),
        "qwen2_5_vl": ("Qwen2_5_VL", QWEN),
    }[name]
    sizes = {
        "text_config": {**more["text_config"], **(text or {})},
        "vision_config": {**more["vision_config"], **(vision or {})},
    }
    config = getattr(transformers, f"{kind}Config")(**{**more, **sizes})
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(folder)
    processor(name, config).save_pretrained(folder)
    return config


def save(name: str, folder: Path) -> Path:
    """The whole tiny model in the folder."""
    config = configure(name, folder)
    torch.manual_seed(0)
    model = getattr(transformers, config.architectures[0])._from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    # vLLM knows the names that checkpoints on the hub have.
    weights = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def processor(name: str, config: Any) -> Any:
    """The processor that transformers has for the model."""
    if name == "qwen2_5_vl":
        pixels = {"min_pixels": 28 * 28, "max_pixels": 64 * 28 * 28}
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, **pixels}
        images, videos = transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes)
        return transformers.Qwen2_5_VLProcessor(images, tokenizer(), videos, chat_template=TEMPLATE)
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    more = {"patch_size": patch, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name == "llava":
        return transformers.LlavaProcessor(transformers.CLIPImageProcessor(**size), tokenizer(), **more)
    images = transformers.LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS)
    return transformers.LlavaNextProcessor(images, tokenizer(), **more)
