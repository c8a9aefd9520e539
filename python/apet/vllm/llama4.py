"""Llama 4 in vLLM (`Llama4ForConditionalGeneration`).

Modifications: those of `compress.Model`; a tile is a unit, and so is the whole image after its tiles. The text between
tiles stays.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import mllama4
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Tiles(processing.Processor):
    """A tile is a unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return processing.equal_units(ids, self.info.get_patch_per_chunk(self.info.get_hf_config().vision_config))


@processing.serve(Tiles)
class Llama4(Model, mllama4.Llama4ForConditionalGeneration):
    """vLLM's Llama 4, with compression between projector and language model."""
