"""LLaVA-NeXT (`llava_next`).

Modifications:
- the projector gets the kept rows of every tile, chosen among those that unpadding leaves;
- unpadding, newline tokens and their order are the model's own; newline tokens always stay;
- the language model gets the shortened sequence, positions renumbered;
- with `llm_layer`, its layers from there on get a sequence shortened again, tile by tile, renumbered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Units
from .llava import Llava


class LlavaNext(Adapter):
    """A tile is a unit: the base image, and every tile of the grid without its padding."""

    projector = "multi_modal_projector"
    presets: ClassVar = {name: Llava.presets[name] for name in ("paper-128", "paper-64")}

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        per_tile = (core.config.vision_config.image_size // core.config.vision_config.patch_size) ** 2
        return {"image": [tokens.div(per_tile, rounding_mode="floor") for tokens in _packed(core, inputs, per_tile)]}

    def features(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        units = []
        for tiles, tokens in zip(_tiles(core, inputs), _packed(core, inputs, x.shape[1]), strict=True):
            used = tokens[tokens >= 0]
            unit = torch.full((tiles * x.shape[1],), -1)
            unit[used] = used // x.shape[1]
            units.append(unit)
        return units


def _tiles(core: nn.Module, inputs: Mapping[str, Any]) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    pinpoints, size = core.config.image_grid_pinpoints, core.config.vision_config.image_size
    return [image_size_to_num_patches(s, pinpoints, size) for s in inputs["image_sizes"]]


def _packed(core: nn.Module, inputs: Mapping[str, Any], per_tile: int) -> list[Tensor]:
    """For every placeholder of every image the number of its token among the image's tiles, -1 for a newline: what
    the model's own packing makes of numbered tokens."""
    numbers = [torch.arange(n * per_tile).view(n, per_tile, 1) for n in _tiles(core, inputs)]
    packed, _ = core.pack_image_features(numbers, inputs["image_sizes"], "default", torch.full((1,), -1))
    return [tokens.view(-1) for tokens in packed]
