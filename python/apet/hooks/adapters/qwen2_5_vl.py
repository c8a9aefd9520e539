"""Qwen2.5-VL (`qwen2_5_vl`).

Modifications:
- the language model gets a sequence shortened by compressing the merged visual embeddings of each image and of each
  temporal step of a video; every token keeps its M-RoPE position, and decoding goes on after the largest one;
- with `llm_layer`, its layers from there on get a sequence shortened again, positions kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adapter import Adapter, Units, equal_units


class Qwen2_5VL(Adapter):
    """An image is a unit, and so is each temporal step of a video."""

    positions = "keep"
    presets: ClassVar = {
        "paper-0.2": {"keep": 0.3, "llm_layer": 14, "llm_keep": 0.333, "layout": "overwrite", "blend": 0.5}
    }

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        grids = {m: inputs.get(f"{m}_grid_thw") for m in counts}
        return {m: [_units(core, *map(int, thw)) for thw in grid] for m, grid in grids.items() if grid is not None}


def _units(core: nn.Module, steps: int, height: int, width: int) -> Units:
    """A grid of patches [steps, height, width], merged into a unit of tokens for each step."""
    return equal_units(steps, height * width // core.visual.spatial_merge_size**2)
