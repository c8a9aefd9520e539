"""LLaVA-1.5 in vLLM, with a CLIP or SigLIP tower. Modifications: those of `compress.Model`, before the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, InputProcessingContext

from . import processing
from .compress import Model


class LlavaInfo(processing.Info, llava.LlavaProcessingInfo):
    """Reads the options of a request, for LLaVA-1.5."""


class LlavaProcessor(processing.Processor, llava.LlavaMultiModalProcessor):
    """Makes each image one unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> tuple[Tensor, Tensor, int]:
        return torch.zeros_like(ids), torch.arange(len(ids)), len(ids)


def build_info(ctx: InputProcessingContext) -> BaseProcessingInfo:
    """Returns vLLM's own info for a Pixtral tower, which is not compressed: its rows end in additional tokens."""
    info = llava._build_llava_or_pixtral_hf_info(ctx)
    return LlavaInfo(ctx) if isinstance(info, llava.LlavaProcessingInfo) else info


def build_processor(info: BaseProcessingInfo, dummy_inputs: Any) -> BaseMultiModalProcessor:
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class Llava(Model, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5, with compression between tower and projector."""

    projector = "multi_modal_projector"
