"""Granite 4 Vision (`granite4_vision`).

Modifications:
- the language model's input is zeros at visual tokens; the features that its first layer adds there are compressed;
- features that later layers add stay as they are, for the tokens that are kept; newline tokens always stay;
- the language model gets the shortened sequence, positions renumbered;
- with `llm_layer`, which must lie after the last layer that features are added to, its layers from there on get a
  sequence shortened again, tile by tile, renumbered again.
"""

from __future__ import annotations

from fractions import Fraction

from torch import nn

from .. import parts
from ..adapter import Adapter
from .tiled import Tiled


class Granite4Vision(Tiled):
    """A tile is a unit: the base image, and every tile of the grid without its padding."""

    def fitted(self, core: nn.Module) -> Adapter:
        by_layer = parts.added_to(core.config)
        if 0 not in by_layer:
            raise ValueError(f"{type(core).__name__} cannot be patched: {parts.starts_empty(by_layer)}")
        return super().fitted(core)

    def side(self, core: nn.Module) -> int:
        return int(super().side(core) * Fraction(core.downsample_rate))
