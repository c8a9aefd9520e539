"""The common part of models whose prompts have a token at the end of each row of an image's patches (Pixtral's tower).

Modifications: those of `compress.Model`; an image is a unit. The tokens that end its rows of patches stay, each between
the kept tokens of its row and those of the next. Their places are known after the encoder only: the model embeds them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
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
        if self.info.ctx.get_mm_config().mm_encoder_only:
            raise ValueError("apet_keep: with mm_encoder_only there is no language model to embed the ends of rows")
        # The ids of the row ends are stored as negative numbers, which are no units.
        return torch.where(ids == self.info.get_hf_config().image_token_index, 0, -1 - ids)


class RowEnds(Model):
    """A mixin for vLLM's models, whose images get the embeddings of their row ends before they are compressed."""

    _units: list[Tensor]

    def check(self, vllm_config: VllmConfig) -> None:
        super().check(vllm_config)
        if vllm_config.model_config.multimodal_config.mm_encoder_only:
            raise ValueError("apet_keep: with mm_encoder_only there is no language model to embed the ends of rows")

    def embed_multimodal(self, **inputs: Any) -> Any:
        self._units = [plan.unpack(p).units for p in inputs.get(plan.FIELD, [])]
        return super().embed_multimodal(**inputs)

    def _process_image_input(self, image_input: Any) -> Any:
        images = super()._process_image_input(image_input)
        if not any((units < 0).any() for units in self._units):
            return images
        return [self._with_ends(*pair) for pair in zip(images, self._units, strict=True)]

    def _with_ends(self, image: Tensor, units: Tensor) -> Tensor:
        ends = units < 0
        rows = image.new_empty(len(units), image.shape[1])
        rows[ends] = self.language_model.embed_input_ids((-1 - units[ends]).to(image.device)).to(image.dtype)
        rows[~ends] = image
        return rows
