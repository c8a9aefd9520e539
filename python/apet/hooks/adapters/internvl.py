"""InternVL (`internvl`).

Modifications:
- the language model gets a sequence shortened by compressing the projected features of each tile of an image, and of
  each frame of a video; positions renumbered;
- with `llm_layer`, its layers from there on get a sequence shortened again, renumbered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adapter import Adapter, Units, equal_units


class InternVL(Adapter):
    """Each tile of an image is a unit. A run of placeholders is an image; frames of a video count as images."""

    unit_names: ClassVar = {"image": "tile"}

    def split_runs(self, inputs: Mapping[str, Any], modality: str, lengths: list[int]) -> list[int]:
        return lengths  # its pixels are those of tiles

    def units_of_run(self, core: nn.Module, tokens: int) -> Units:
        vision = core.config.vision_config
        rows, columns = (size // patch for size, patch in zip(vision.image_size, vision.patch_size, strict=True))
        per_tile = int(rows * columns * core.config.downsample_ratio**2)
        return equal_units(tokens // per_tile, per_tile)
