"""Gemma 4 in vLLM (`Gemma4ForConditionalGeneration`), images and videos.

Modifications: those of `compress.Model`; an image is a unit, and so is each frame of a video. Time stamps stay, and so
does audio.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models import gemma4_mm
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Frames(processing.Processor):
    """An image or a frame is a unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        lengths = item["video_num_soft_tokens"].data if modality == "video" else [len(ids)]
        return torch.arange(len(lengths)).repeat_interleave(torch.as_tensor(lengths))


@processing.serve(Frames)
class Gemma4(Model, gemma4_mm.Gemma4ForConditionalGeneration):
    """vLLM's Gemma 4, with compression between projector and language model."""
