"""Qwen2-VL and Qwen2.5-VL in vLLM, images and videos. Modifications: those of `mrope`."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_5_vl, qwen2_vl

from . import processing
from .mrope import Info, MRope, Steps


@processing.serve(Steps, Info)
class Qwen2VL(MRope, qwen2_vl.Qwen2VLForConditionalGeneration):
    """vLLM's Qwen2-VL, with compression between merger and language model."""


@processing.serve(Steps, Info)
class Qwen2_5_VL(MRope, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, with compression between merger and language model."""
