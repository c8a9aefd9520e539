"""PerceptionLM (`perception_lm`).

Modifications: those that follow from the rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adapter import Adapter, Units, equal_units


class PerceptionLM(Adapter):
    """A tile of an image is a unit, and so is each frame of a video."""

    unit_names: ClassVar = {"image": "tile", "video": "frame"}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        found = {}
        for modality, name in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if modality in counts:
                number, parts = inputs[name].shape[:2]  # of images or videos; of their tiles or frames
                found[modality] = [equal_units(parts, counts[modality] // (number * parts))] * number
        return found
