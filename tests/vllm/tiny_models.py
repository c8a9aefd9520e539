"""Tiny models in the format of the hub: random weights, a tokenizer of single characters, the model's own processor.

The weights are wide, so that another image token, or another place of one, changes the logits far more than rounding.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny import (
    CHARACTERS,
    CHAT,
    INTERN_CHAT,
    KINDS,
    LATER,
    PATCH,
    PINPOINTS,
    SIDE,
    SOFT_TOKENS,
    SPECIAL,
    TEXT,
    TILE,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"
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
    "gemma4": {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
        "audio_token": "<IMG_CONTEXT>",
        "boa_token": "<img>",
        "eoa_token": "</img>",
    },
    "minicpmv4_6": {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<img>",
        "image_end_token": "</img>",
        "slice_start_token": "<|vision_start|>",
        "slice_end_token": "<|vision_end|>",
        "image_id_start_token": "<|begin_of_image|>",
        "image_id_end_token": "<|end_of_image|>",
    },
}


def tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token for each character, and the special tokens of the model's processor."""
    words = SPECIAL + CHARACTERS + LATER
    level = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    level.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=(SPECIAL[4:] if name == "gemma3" else SPECIAL[4:-3]) + LATER,
        model_specific_special_tokens=NAMED.get(name, {}),
        chat_template=TEMPLATE,
    )


def save_chat(folder: Path) -> Path:
    """Saves InternVL in OpenGVLab's format, which is not part of transformers."""
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
    """Saves the whole tiny model in the folder."""
    if name == "internvl_chat":
        return save_chat(folder)
    kind, sizes = KINDS[name]
    config = getattr(transformers, f"{kind}Config")(**copy.deepcopy(sizes))
    config.architectures = [f"{kind}ForConditionalGeneration"]
    config.save_pretrained(folder)
    processor(name, config).save_pretrained(folder)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")._from_config(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    if not name.startswith(("llava", "gemma3")):
        model.save_pretrained(folder)
        if name == "qwen3_vl_moe":  # on the hub, the weights of experts are transposed
            weights = load_file(folder / "model.safetensors")
            turned = {k: v.mT.contiguous() if ".experts." in k else v for k, v in weights.items()}
            save_file(turned, folder / "model.safetensors", {"format": "pt"})
        return folder
    # vLLM expects the names of checkpoints on the hub, where these models have a CLIP or SigLIP model in the tower.
    weights = {k.replace("vision_tower.", "vision_tower.vision_model."): v for k, v in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def processor(name: str, config: Any) -> Any:
    """Returns the processor that transformers has for the model."""
    words = tokenizer(name)
    square = {"size": {"height": SIDE, "width": SIDE}}
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
    if name.startswith("glm4v"):
        sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2}
        sizes |= {"size": {"shortest_edge": 28 * 28, "longest_edge": 64 * 28 * 28}}
        images, videos = transformers.Glm4vImageProcessor(**sizes), transformers.Glm4vVideoProcessor(**sizes)
        return transformers.Glm4vProcessor(images, words, videos, chat_template=TEMPLATE)
    if name == "minicpmv4_6":
        sizes = {"scale_resolution": 2 * SIDE, "patch_size": PATCH, "max_slice_nums": 4}
        images, videos = (getattr(transformers, f"MiniCPMV4_6{kind}Processor") for kind in ("Image", "Video"))
        return transformers.MiniCPMV4_6Processor(images(**sizes), videos(**sizes), words, chat_template=TEMPLATE)
    if name == "llama4":
        images = transformers.Llama4ImageProcessor(**square, max_patches=4)
        return transformers.Llama4Processor(images, words, patch_size=PATCH, chat_template=TEMPLATE)
    if name == "gemma4":
        images = transformers.Gemma4ImageProcessor(max_soft_tokens=SOFT_TOKENS)
        videos, audio = transformers.Gemma4VideoProcessor(), transformers.Gemma4AudioFeatureExtractor()
        return transformers.Gemma4Processor(audio, images, words, videos, chat_template=TEMPLATE)
    if name == "internvl":
        images = transformers.GotOcr2ImageProcessor(**square, crop_to_patches=True, max_patches=4)
        videos = transformers.InternVLVideoProcessor(**square)
        return transformers.InternVLProcessor(images, words, videos, image_seq_length=TILE // 4, chat_template=TEMPLATE)
    if name == "gemma3":
        images = transformers.Gemma3ImageProcessor(**square)
        return transformers.Gemma3Processor(images, words, image_seq_length=TILE // 4, chat_template=TEMPLATE)
    if name in ("idefics3", "smolvlm"):
        sizes = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
        kind = KINDS[name][0]
        images = getattr(transformers, f"{kind}ImageProcessor")(**sizes)
        videos = [transformers.SmolVLMVideoProcessor()] if name == "smolvlm" else []
        kind = getattr(transformers, f"{kind}Processor")
        return kind(images, words, *videos, image_seq_len=TILE // 4, chat_template=TEMPLATE)
    if name in ("mistral3", "pixtral"):
        images = transformers.PixtralImageProcessor(size={"longest_edge": 2 * SIDE}, patch_size=PATCH)
        merge = 2 if name == "mistral3" else 1
        return transformers.PixtralProcessor(
            images, words, patch_size=PATCH, spatial_merge_size=merge, chat_template=TEMPLATE
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
