"""LLaVA-NeXT in vLLM (`LlavaNextForConditionalGeneration`).

Modifications:
- an image has as many placeholders as tokens are kept of its tiles, and all of its newline tokens;
- the projector gets the kept rows of every tile, chosen among those that unpadding leaves;
- unpadding, newline tokens and their order are vLLM's own: dropped rows pass through them, marked with -inf;
- embeddings given instead of an image are not compressed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models import llava_next
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems

from . import options, processing
from .compress import Item, Model, compress
from .llava import LlavaInfo

GONE = float("-inf")


class LlavaNextInfo(LlavaInfo, llava_next.LlavaNextProcessingInfo):
    """LLaVA-NeXT's counts."""


class LlavaNextProcessor(processing.Processor, llava_next.LlavaNextMultiModalProcessor):
    """A tile is a unit: the whole image in small, and every tile of the grid without its padding."""

    def lengths(
        self, modality: str, item: int, items: MultiModalDataItems, made: MultiModalKwargsItems, tokens: int
    ) -> list[int]:
        images = items[modality]
        if isinstance(images, ImageEmbeddingItems):
            return []
        width, height = images.get_image_size(item)
        return [len(unit) for unit in units(self.info.get_hf_config(), height, width)]


def units(config: Any, height: int, width: int) -> list[Tensor]:
    """The tokens of an image that are compressed together, as numbers among all tokens of its tiles, padding too."""
    size = config.vision_config.image_size
    side = size // config.vision_config.patch_size
    down, across = get_anyres_image_grid_shape((height, width), config.image_grid_pinpoints, size)
    tiles = torch.arange(down * across * side * side).view(down, across, side, side)
    grid = tiles.transpose(1, 2).reshape(1, down * side, across * side)
    left = unpad_image(grid, (height, width)).flatten().sort().values
    tile = left // (side * side)
    base = torch.arange(side * side)
    return [base, *(side * side + left[tile == t] for t in tile.unique())]


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=llava_next.LlavaDummyInputsBuilder
)
class LlavaNext(Model, llava_next.LlavaNextForConditionalGeneration):
    """vLLM's LLaVA-NeXT, with compression between tower and projector."""

    def _parse_and_validate_image_input(self, **kwargs: Any) -> llava_next.LlavaNextImageInputs | None:
        inputs = super()._parse_and_validate_image_input(**kwargs)
        if inputs is not None and inputs["type"] == "pixel_values":
            sizes = inputs["image_sizes"].tolist()
            inputs.units = [units(self.config, height, width) for height, width in sizes]
            wanted = options.unpack(kwargs.get("apet_image"), len(sizes))
            inputs.items = [Item(o, [len(u) for u in us]) for o, us in zip(wanted, inputs.units, strict=True)]
        return inputs

    def _process_image_pixels(self, inputs: Any) -> Tensor | tuple[Tensor, ...]:
        if not any(item.gone for item in inputs.items):
            return super()._process_image_pixels(inputs)
        images = list(inputs["pixel_values"])  # [tiles, 3, height, width] each
        features = self._image_pixels_to_features(self.vision_tower, torch.cat(images))  # [all tiles, N, C]
        starts = torch.tensor([0, *(len(tiles) * features.shape[1] for tiles in images)]).cumsum(0)
        numbers = [start + unit for start, us in zip(starts, inputs.units, strict=False) for unit in us]
        where = torch.cat(numbers).to(features.device)
        tokens, indices = compress(features.flatten(0, 1)[where], inputs.items)
        projected = self.multi_modal_projector(tokens)
        full = projected.new_full((features.shape[0] * features.shape[1], projected.shape[1]), GONE)
        full[where[indices]] = projected
        return full.view(*features.shape[:2], -1).split([len(tiles) for tiles in images])

    def _process_image_input(self, image_input: Any) -> Tensor | list[Tensor]:
        embeddings = super()._process_image_input(image_input)
        if image_input["type"] != "pixel_values" or not any(item.gone for item in image_input.items):
            return embeddings
        return [_left(e, len(e) - item.gone) for e, item in zip(embeddings, image_input.items, strict=True)]


def _left(x: Tensor, rows: int) -> Tensor:
    """The rows of x [N, D] that are not marked. Their number is given, so that counting needs no synchronisation."""
    return x[x.isneginf().all(-1).to(torch.uint8).argsort(stable=True)[:rows]]
