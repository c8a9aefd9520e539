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

from ..adapter import Units
from .llava import Llava
from .tiled import Tiled, packed, tiles


class LlavaNext(Tiled):
    """A tile is a unit: the base image, and every tile of the grid without its padding."""

    projector = "multi_modal_projector"
    presets: ClassVar = {name: Llava.presets[name] for name in ("paper-128", "paper-64")}

    def units_before_projector(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        units = []
        for count, tokens in zip(tiles(core, inputs), packed(core, inputs, x.shape[1]), strict=True):
            used = tokens[tokens >= 0]
            unit = torch.full((count * x.shape[1],), -1)
            unit[used] = used // x.shape[1]
            units.append(unit)
        return units
