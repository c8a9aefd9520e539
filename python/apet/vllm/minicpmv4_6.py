"""MiniCPM-V 4.6 in vLLM (`MiniCPMV4_6ForConditionalGeneration`), images and videos.

Modifications: those of `compress.Model`; the whole image is a unit, and so is each slice of it; of a video those of
each frame. Embeddings given instead of an image are not compressed: their slices are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.models import minicpmv4_6
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model

SIZES = {"image": "tgt_sizes", "video": "video_tgt_sizes"}  # rows and columns of patches of every slice


class Slices(processing.Processor):
    """A slice is a unit, with as many tokens of the item's as its share of the patches."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        if SIZES[modality] not in item:
            return torch.full_like(ids, -1)
        patches = item[SIZES[modality]].data.long().prod(-1).cpu()
        return torch.arange(len(patches)).repeat_interleave(patches * len(ids) // patches.sum())


@processing.serve(Slices)
class MiniCPMV4_6(Model, minicpmv4_6.MiniCPMV4_6ForConditionalGeneration):
    """vLLM's MiniCPM-V 4.6, with compression between merger and language model."""
