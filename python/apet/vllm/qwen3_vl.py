"""Qwen3-VL and Qwen3.5 in vLLM, dense and with experts, images and videos.

Modifications: those of `mrope`. An embedding of an image also holds its deepstack features, which the first layers add;
those of kept tokens stay as they are. The time stamps before the frames of a video stay.
"""

from __future__ import annotations

from vllm.model_executor.models import qwen3_5, qwen3_vl, qwen3_vl_moe

from . import processing
from .mrope import Info, MRope, Steps


class Deepstack(MRope):
    """A mixin for models whose embeddings end with deepstack features."""

    def width(self) -> int:
        return self.visual_dim


@processing.serve(Steps, Info)
class Qwen3VL(Deepstack, qwen3_vl.Qwen3VLForConditionalGeneration):
    """vLLM's Qwen3-VL, with compression between merger and language model."""


@processing.serve(Steps, Info)
class Qwen3VLMoe(Deepstack, qwen3_vl_moe.Qwen3VLMoeForConditionalGeneration):
    """vLLM's Qwen3-VL with experts, with compression between merger and language model."""


@processing.serve(Steps, Info)
class Qwen3_5(Deepstack, qwen3_5.Qwen3_5ForConditionalGeneration):
    """vLLM's Qwen3.5, with compression between merger and language model."""


@processing.serve(Steps, Info)
class Qwen3_5Moe(Deepstack, qwen3_5.Qwen3_5MoeForConditionalGeneration):
    """vLLM's Qwen3.5 with experts, with compression between merger and language model."""
