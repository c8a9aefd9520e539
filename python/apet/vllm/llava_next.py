"""LLaVA-NeXT in vLLM (`LlavaNextForConditionalGeneration`).

Modifications: those of `compress.Model`, before the projector; a tile without its padding is a unit, newlines stay.
Embeddings given instead of an image are not compressed: their tiles are not known.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models import llava_next
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Tiles(processing.Processor):
    """A tile is a unit: the whole image in small, and every tile of the grid without its padding."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> tuple[Tensor, Tensor, int] | Tensor:
        if "image_sizes" not in item or "pixel_values" not in item:
            return torch.full_like(ids, -1)
        config = self.info.get_hf_config()
        size = config.vision_config.image_size
        side = size // config.vision_config.patch_size
        image = item["image_sizes"].data.tolist()
        down, across = get_anyres_image_grid_shape(image, config.image_grid_pinpoints, size)
        grid = torch.arange(down * across * side * side).view(down, across, side, side) + side * side
        grid = unpad_image(grid.transpose(1, 2).reshape(1, down * side, across * side), image)[0]
        rows = torch.nn.functional.pad(grid, (0, 1), value=-1).flatten()  # each row of patches ends in a newline
        sources = torch.cat([torch.arange(side * side), rows])
        tiles = sources.div(side * side, rounding_mode="floor")  # unpadding may leave nothing of a tile
        units = tiles[tiles >= 0].unique(return_inverse=True)[1]
        return tiles.masked_scatter(tiles >= 0, units), sources, len(item["pixel_values"].data) * side * side


@processing.serve(Tiles)
class LlavaNext(Model, llava_next.LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, with compression between tower and projector."""

    projector = "multi_modal_projector"
