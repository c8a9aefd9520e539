"""Idefics 3 and SmolVLM in vLLM (`Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`).

Modifications: those of `compress.Model`; a tile of an image is a unit, and so is the whole image after its tiles.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import idefics3, smolvlm
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Tiles(processing.Processor):
    """Each tile is a unit; the text that says where it lies in the image stays."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return processing.equal_units(ids, self.info.get_hf_processor().image_seq_len)


@processing.serve(Tiles)
class Idefics3(Model, idefics3.Idefics3ForConditionalGeneration):
    """vLLM's Idefics 3, with compression between connector and language model."""


@processing.serve(Tiles)
class SmolVLM(Model, smolvlm.SmolVLMForConditionalGeneration):
    """vLLM's SmolVLM, with compression between connector and language model."""
