"""Mistral 3 and Pixtral in the format of transformers in vLLM (`Mistral3ForConditionalGeneration`).

Modifications: those of `compress.Model`; an image is a unit. The tokens that end its rows of patches stay, each between
the kept tokens of its row and those of the next. Their places are known after the encoder only: the model embeds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import mistral3
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import PromptUpdateDetails

from ..engines import plan
from . import processing
from .compress import Model


class Rows(processing.Processor):
    """Makes each image one unit, without the tokens at the ends of rows."""

    def embedded(self, details: PromptUpdateDetails) -> Tensor:
        return torch.ones(len(details.full), dtype=torch.bool)

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        # The ids of the row ends are stored as negative numbers, which are no units.
        return torch.where(ids == self.info.get_hf_config().image_token_index, 0, -1 - ids)


@processing.serve(Rows)
class Mistral3(Model, mistral3.Mistral3ForConditionalGeneration):
    """vLLM's Mistral 3, with compression between projector and language model."""

    def embed_multimodal(self, **inputs: Any) -> Any:
        self._units = [plan.unpack(p).units for p in inputs.get(plan.FIELD, [])]
        return super().embed_multimodal(**inputs)

    def _process_image_input(self, image_input: Any) -> Any:
        images = super()._process_image_input(image_input)
        return [self._with_ends(*pair) for pair in zip(images, self._units, strict=True)] if self._units else images

    def _with_ends(self, image: Tensor, units: Tensor) -> Tensor:
        ends = units < 0
        rows = image.new_empty(len(units), image.shape[1])
        rows[ends] = self.language_model.embed_input_ids((-1 - units[ends]).to(image.device)).to(image.dtype)
        rows[~ends] = image
        return rows
