"""One tiny random model per family: real architectures of transformers, no network, 16 to 64 visual tokens per image.

The weights are wide (standard deviation 0.15), so that a wrong position, mask or token changes the logits by far more
than rounding does.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass

import torch
import transformers
from apet.hooks import tiny
from apet.hooks.tiny import END, EOS, IMAGE, LAYERS, PAD, PATCH, PINPOINTS, SIDE, START, TILE, VIDEO, VOCABULARY
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

__all__ = ["END", "EOS", "IMAGE", "LAYERS", "PAD", "PATCH", "PINPOINTS", "SIDE", "START", "TILE", "VIDEO", "VOCABULARY"]

# Differences between versions of transformers are looked up in its code, not decided by version numbers.
TAKES_CACHE_POSITION = "cache_position" in inspect.signature(transformers.LlamaModel.forward).parameters
CROPS_TO_LENGTH = "max_length" in inspect.signature(transformers.DynamicCache().crop).parameters
UNSAID = [EOS, START, END, VIDEO, IMAGE]  # tokens that tiny models must not generate


@dataclass(frozen=True)
class Family:
    """The form of the images of one `model_type`."""

    name: str  # the `model_type`
    model: str  # the name of the class, in transformers or `postcard.py`
    tiles: bool = False  # images come as several tiles with `image_sizes`
    ragged: bool = False  # images come as packed patches with grids, positions are M-RoPE
    video: bool = True  # videos have placeholders of their own
    parts: tuple[str, str] = ("model", "language_model")  # the names of the core model, and of the decoder in it
    projector: str | None = None  # the name of the module in the core model before which the first stage runs, if any

    def __str__(self) -> str:
        return self.name


PROJECTOR = "multi_modal_projector"
FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration", video=False, projector=PROJECTOR),
        Family("llava_next", "LlavaNextForConditionalGeneration", tiles=True, video=False, projector=PROJECTOR),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", ragged=True),
        Family("video_llava", "VideoLlavaForConditionalGeneration"),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", ragged=True),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", ragged=True),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", tiles=True),
        Family("llava_next_video", "LlavaNextVideoForConditionalGeneration", tiles=True),
        Family("internvl", "InternVLForConditionalGeneration", video=False),
    )
}

# The package has no adapters for these.
OTHERS = {
    "aya_vision": Family("aya_vision", "AyaVisionForConditionalGeneration", video=False),
    "gemma3": Family("gemma3", "Gemma3ForConditionalGeneration", video=False),
    "postcard": Family("postcard", "PostcardForGeneration", video=False, parts=("album", "reader")),
}
# The hooks of families differ only in their adapters. These differ most (one image, tiles, M-RoPE).
THREE = ("llava", "llava_next", "qwen2_5_vl")


def core(model: PreTrainedModel) -> nn.Module:
    """Returns the module that inserts image features into text embeddings."""
    return getattr(model, family_of(model).parts[0])


def reader(model: PreTrainedModel) -> nn.Module:
    """Returns the language model."""
    return getattr(core(model), family_of(model).parts[1])


def family_of(model: PreTrainedModel) -> Family:
    return (FAMILIES | OTHERS)[model.config.model_type]


def takes(model: nn.Module | type, argument: str) -> bool:
    """Returns whether a forward has this argument."""
    return argument in inspect.signature(model.forward).parameters


def settings(name: str) -> PretrainedConfig:
    """Returns the tiny configuration of this family."""
    if name != "postcard":
        return tiny.config(name)
    from postcard import PostcardForGeneration

    text = tiny.config("llava").text_config.to_dict()
    return PostcardForGeneration.config_class(text_config=text, image_token_id=IMAGE, tie_word_embeddings=False)


def build(
    name: str,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = LAYERS,
) -> PreTrainedModel:
    """Builds a new model. The same seed gives the same weights with any attention and, up to rounding, any dtype."""
    if name == "postcard":
        from postcard import PostcardForGeneration as cls
    else:
        cls = getattr(transformers, (FAMILIES | OTHERS)[name].model)
    chosen = settings(name)
    chosen.text_config.num_hidden_layers = layers
    if getattr(chosen.text_config, "layer_types", None):
        chosen.text_config.layer_types = (chosen.text_config.layer_types * layers)[:layers]
    model = tiny.build(cls, chosen, attention, seed)
    return model.to(dtype)


def hooks_of(model: PreTrainedModel, package: str) -> list[str]:
    """Returns the modules of a model that carry a hook of this package. (transformers installs some of its own.)"""
    found = []
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            while isinstance(hook, functools.partial):
                hook = hook.func
            if (hook.__module__ or "").split(".")[0] == package:
                found.append(name)
    return found


built: dict[tuple, PreTrainedModel] = {}


def shared(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns the model that tests share. Patch it only inside `with apet.patched(...)`; `conftest.py` checks that."""
    key = (name, attention, dtype)
    if key not in built:
        built[key] = build(*key)
    return built[key]


def twin(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Returns a second model with the same weights that is never patched, for the recompute."""
    return _twin(name, dtype)


@functools.cache
def _twin(name: str, dtype: torch.dtype) -> PreTrainedModel:
    return build(name, dtype=dtype)
