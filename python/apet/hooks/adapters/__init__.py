"""The adapters by `config.model_type`, one file for each family."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..adapter import Adapter
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .qwen2_5_vl import Qwen2_5VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL
from .video_llava import VideoLlava

ADAPTERS: dict[str, Adapter] = {
    "internvl": InternVL(),
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_next_video": LlavaNextVideo(),
    "llava_onevision": LlavaOnevision(),
    "qwen2_5_vl": Qwen2_5VL(),
    "qwen2_vl": Qwen2VL(),
    "qwen3_vl": Qwen3VL(),
    "video_llava": VideoLlava(),
}
# Classes that are not transformers' own, and the port of them that is.
PORTS = {
    "llava_llama": "LlavaForConditionalGeneration (e.g. llava-hf/llava-1.5-7b-hf)",
    "llava_mistral": "LlavaNextForConditionalGeneration (e.g. llava-hf/llava-v1.6-mistral-7b-hf)",
    "llava_qwen": "LlavaOnevisionForConditionalGeneration (e.g. llava-hf/llava-onevision-qwen2-7b-ov-hf)",
    "internvl_chat": "InternVLForConditionalGeneration (e.g. OpenGVLab/InternVL3-8B-hf)",
}


def register_adapter(model_type: str | Sequence[str], adapter: Adapter) -> None:
    """Makes `patch` know models whose `config.model_type` is this (or one of these); replaces what was there.

    Args:
        model_type: `model.config.model_type`, or several.
        adapter: what to know about them; see docs/hooks.md.

    Example:
        >>> apet.register_adapter("aya_vision", apet.Adapter())
    """
    for name in [model_type] if isinstance(model_type, str) else model_type:
        ADAPTERS[name] = adapter


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model. Raises ValueError where there is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ADAPTERS:
        return ADAPTERS[model_type]
    if model_type in PORTS:
        raise ValueError(
            f"model_type='{model_type}' ({type(model).__name__}) is no class of transformers. Load the same weights as "
            f"{PORTS[model_type]}"
        )
    raise ValueError(
        f"no adapter for model_type='{model_type}' ({type(model).__name__}); there are some for "
        f"{', '.join(sorted(ADAPTERS))}. If it puts visual features at placeholder tokens, try "
        f"apet.register_adapter('{model_type}', apet.Adapter()); see docs/hooks.md"
    )
