"""LLaVA-1.5 in vLLM: with a CLIP or SigLIP tower, or with Pixtral's (Pixtral 12B in the format of transformers).

Modifications: those of `compress.Model`, before the projector; with Pixtral's tower those of `rows`, after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, InputProcessingContext

from . import processing
from .rows import RowEnds, Rows


class LlavaInfo(processing.Info, llava.LlavaProcessingInfo):
    """Reads the options of a request, for LLaVA-1.5."""


class LlavaProcessor(processing.Processor, llava.LlavaMultiModalProcessor):
    """Makes each image one unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> tuple[Tensor, Tensor, int]:
        return torch.zeros_like(ids), torch.arange(len(ids)), len(ids)


class PixtralInfo(processing.Info, llava.PixtralHFProcessingInfo):
    """Reads the options of a request, for Pixtral's tower."""


class PixtralProcessor(Rows, llava.PixtralHFMultiModalProcessor):
    """Makes each image one unit, without the tokens at the ends of rows."""


def build_info(ctx: InputProcessingContext) -> BaseProcessingInfo:
    pixtral = isinstance(llava._build_llava_or_pixtral_hf_info(ctx), llava.PixtralHFProcessingInfo)
    return PixtralInfo(ctx) if pixtral else LlavaInfo(ctx)


def build_processor(info: BaseProcessingInfo, dummy_inputs: Any) -> BaseMultiModalProcessor:
    return (PixtralProcessor if isinstance(info, PixtralInfo) else LlavaProcessor)(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class Llava(RowEnds, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5, with compression between tower and projector, or between projector and language model."""

    @property
    def projector(self) -> str | None:
        """The module whose input is compressed."""
        return None if self.config.vision_config.model_type == "pixtral" else "multi_modal_projector"
