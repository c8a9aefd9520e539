"""InternVL in vLLM (`InternVLChatModel`, and `InternVLForConditionalGeneration` of transformers).

Modifications: those of `compress.Model`; a tile of an image is a unit, and so is each frame of a video.
"""

from __future__ import annotations

from torch import Tensor
from vllm.model_executor.models import interns1, internvl
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Tiles(processing.Processor):
    """A tile or frame is a unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return processing.equal_units(ids, self.info.get_hf_processor().image_seq_length)


@processing.serve(Tiles)
class InternVL(Model, internvl.InternVLChatModel):
    """vLLM's InternVL, with compression between projector and language model."""


@processing.serve(Tiles)
class InternVLHF(Model, interns1.InternS1ForConditionalGeneration):
    """vLLM's InternVL for checkpoints in the format of transformers, with compression before the language model."""
