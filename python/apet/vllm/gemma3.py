"""Gemma 3 in vLLM (`Gemma3ForConditionalGeneration`).

Modifications: those of `compress.Model`; the image is a unit, and so is each crop of pan and scan.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import gemma3_mm
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Crops(processing.Processor):
    """The image and each of its crops are units."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return processing.equal_units(ids, self.info.get_hf_config().mm_tokens_per_image)


@processing.serve(Crops)
class Gemma3(Model, gemma3_mm.Gemma3ForConditionalGeneration):
    """vLLM's Gemma 3, with compression between projector and language model."""
