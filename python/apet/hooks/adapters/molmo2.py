"""Molmo2 (`molmo2`).

Modifications: those that follow from the rules; its image tokens see each other both ways, also after compression.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from ..adapter import Adapter, Units, one_unit


class Molmo2(Adapter):
    """The model sees an image twice, as a whole and as crops put together. Each view is a unit; the tokens between the
    rows of a view belong to none. The frames of a video are runs of placeholders."""

    unit_names: ClassVar = {"image": "view", "video": "frame"}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        grids = inputs.get("image_grids")  # [images, 4]: rows and columns of the whole, and of the crops
        if grids is None or "image" not in counts:
            return {}
        sizes = [(int(h) * int(w), int(rows) * int(columns)) for h, w, rows, columns in grids]
        return {"image": [torch.cat([one_unit(whole), one_unit(crops) + 1]) for whole, crops in sizes]}
