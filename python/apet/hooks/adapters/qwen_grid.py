"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL share: images and videos come as grids of patches, with M-RoPE positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adapter import Adapter, Units, equal_units


class QwenGrid(Adapter):
    """An image is a unit, and so is each temporal step of a video."""

    unit_names: ClassVar = {"image": "image", "video": "temporal step"}
    positions = "keep"

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        grids = {m: inputs.get(f"{m}_grid_thw") for m in counts}
        return {m: [_units(core, *map(int, thw)) for thw in grid] for m, grid in grids.items() if grid is not None}


def _units(core: nn.Module, steps: int, height: int, width: int) -> Units:
    """A grid of patches [steps, height, width], merged into a unit of tokens for each step."""
    return equal_units(steps, height * width // core.visual.spatial_merge_size**2)
