"""The adapters by `config.model_type`, one file for each family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch import nn

from .. import parts
from ..adapter import Adapter
from .granite4_vision import Granite4Vision
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .molmo2 import Molmo2
from .perception_lm import PerceptionLM
from .qwen import Qwen2_5VL
from .video_llama_3 import VideoLlama3
from .video_llava import VideoLlava

ADAPTERS: dict[str, Adapter] = {
    "granite4_vision": Granite4Vision(),
    "internvl": InternVL(),
    "llava": Llava(),
    "llava_next": LlavaNext(),
    "llava_next_video": LlavaNextVideo(),
    "llava_onevision": LlavaOnevision(),
    "molmo2": Molmo2(),
    "perception_lm": PerceptionLM(),
    "qwen2_5_vl": Qwen2_5VL(),
    "qwen2_vl": Adapter(),
    "qwen3_vl": Adapter(),
    "video_llama_3": VideoLlama3(),
    "video_llava": VideoLlava(),
}
# The adapters of this package, without those that users register later.
OWN: Mapping[str, Adapter] = MappingProxyType(dict(ADAPTERS))
GENERIC = Adapter()  # for models that have no adapter of their own
# Models that only read documents: dropping visual tokens loses characters.
READERS = frozenset(
    (
        "deepseek_ocr2",
        "glm_ocr",
        "got_ocr2",
        "granite_docling",
        "lighton_ocr",
        "minicpm_ocr",
        "paddleocr_vl",
        "pp_chart2table",
        "qianfan_ocr",
        "unlimited_ocr",
    )
)
# Model types of remote code, and the port of each that transformers has.
PORTS = {
    "llava_llama": "LlavaForConditionalGeneration (e.g. llava-hf/llava-1.5-7b-hf)",
    "llava_mistral": "LlavaNextForConditionalGeneration (e.g. llava-hf/llava-v1.6-mistral-7b-hf)",
    "llava_qwen": "LlavaOnevisionForConditionalGeneration (e.g. llava-hf/llava-onevision-qwen2-7b-ov-hf)",
    "internvl_chat": "InternVLForConditionalGeneration (e.g. OpenGVLab/InternVL3-8B-hf)",
}


def register_adapter(model_type: str | Sequence[str], adapter: Adapter) -> None:
    """Registers the adapter of models whose `config.model_type` is this (or one of these); it replaces an earlier one.

    Args:
        model_type: `model.config.model_type`, or several.
        adapter: describes these models; see docs/add-a-model.md.

    Example:
        >>> apet.register_adapter("stamps", Stamps())
    """
    for name in [model_type] if isinstance(model_type, str) else model_type:
        ADAPTERS[name] = adapter


def adapter_for(model: nn.Module) -> Adapter:
    """Returns the adapter of a model: the registered one, else the generic one, which finds the parts of a model by
    rule.

    Raises ValueError if tokens cannot, or should not, be dropped from models of that type.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in ADAPTERS:
        return ADAPTERS[model_type]
    name = f"model_type='{model_type}' ({type(model).__name__})"
    if model_type in PORTS:
        raise ValueError(f"{name} is not a class of transformers. Load the same weights as {PORTS[model_type]}")
    if model_type in READERS:
        raise ValueError(
            f"{name} reads documents: there, published results put every method that drops visual tokens at or below "
            f"dropping them at random (docs/hooks.md). To patch it anyway, call "
            f"apet.register_adapter('{model_type}', apet.Adapter()) first"
        )
    reason = parts.why_not(model)
    if reason is not None:
        raise ValueError(f"{name} cannot be patched: {reason}")
    return GENERIC
