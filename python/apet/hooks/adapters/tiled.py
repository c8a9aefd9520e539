"""The adapter of LLaVA-NeXT, LLaVA-NeXT-Video and Granite 4 Vision: an image is cut into tiles, whose padding the model
removes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Units


class Tiled(Adapter):
    """A tile is a unit: the base image, and every tile of the grid without its padding."""

    unit_names: ClassVar = {"image": "tile", "video": "frame"}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        per_tile = self.side(core) ** 2
        return {"image": [tokens.div(per_tile, rounding_mode="floor") for tokens in packed(core, inputs, per_tile)]}

    def side(self, core: nn.Module) -> int:
        """Returns the number of tokens along an edge of a tile."""
        return int(core.config.vision_config.image_size // core.config.vision_config.patch_size)


def tiles(core: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    """Returns the number of tiles of each image."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, size = core.config.image_grid_pinpoints, core.config.vision_config.image_size
    return [image_size_to_num_patches(s, pinpoints, size) for s in inputs["image_sizes"]]


def packed(core: nn.Module, inputs: Mapping[str, Any], per_tile: int) -> list[Tensor]:
    """Returns, for every placeholder of every image, the number of its token among the image's tiles, or -1 for a
    newline: the result of the model's own packing of numbered tokens."""
    numbers = [torch.arange(n * per_tile).view(n, per_tile, 1) for n in tiles(core, inputs)]
    found = core.pack_image_features(numbers, inputs["image_sizes"], "default", torch.full((1,), -1))
    rows = found[0] if isinstance(found, tuple) else found
    return [tokens.view(-1) for tokens in rows]
