"""Kimi-K2.5 in vLLM (`KimiK25ForConditionalGeneration`), images and chunks of a video.

Modifications: those of `compress.Model`; an image is a unit, and so is each chunk of a video, whose frames the encoder
pools.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models import kimi_k25
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Chunks(processing.Processor):
    """An image or a chunk is a unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return torch.zeros_like(ids)


@processing.serve(Chunks)
class KimiK25(Model, kimi_k25.KimiK25ForConditionalGeneration):
    """vLLM's Kimi-K2.5, with compression between projector and language model."""
