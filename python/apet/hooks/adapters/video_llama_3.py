"""VideoLLaMA3 (`video_llama_3`).

Modifications: those that follow from the rules. Its processor drops tokens that a frame repeats from the one before;
what is left of a frame is compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from ..adapter import Adapter, Units, equal_units


class VideoLlama3(Adapter):
    """An image is a unit, and so is each frame of a video; each has its own merge size."""

    unit_names: ClassVar = {"image": "image", "video": "frame"}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        found = {}
        for modality in counts:
            grids, sides = inputs.get(f"{modality}_grid_thw"), inputs.get(f"{modality}_merge_sizes")
            if grids is None or sides is None:
                continue
            whole = [(int(t), int(h) * int(w) // int(m) ** 2) for (t, h, w), m in zip(grids, sides, strict=True)]
            found[modality] = [equal_units(steps, tokens) for steps, tokens in whole]
            stays = inputs.get("video_compression_mask") if modality == "video" else None
            if stays is not None:
                parts = stays.cpu().bool().split([steps * tokens for steps, tokens in whole])
                found[modality] = [units[part] for units, part in zip(found[modality], parts, strict=True)]
        return found
