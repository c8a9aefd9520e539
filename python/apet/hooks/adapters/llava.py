"""LLaVA-1.5 (`llava`).

Modifications:
- the projector gets the kept rows of the vision encoder's features (CLIP without CLS: [images, 576, 1024]);
- the language model gets the shortened sequence, positions renumbered;
- with `llm_layer`, its layers from there on get a sequence shortened again, renumbered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from apet_kernels.options import PAPER

from ..adapter import Adapter, Units
from ..grids import of_pixels


class Llava(Adapter):
    """An image is one unit. Pixtral encoders return images of several sizes packed into one row."""

    projector = "multi_modal_projector"
    presets: ClassVar = {
        f"paper-{(first + second) // 2}": {
            **PAPER,
            "keep": first,
            "llm_layer": 16,
            "llm_keep": second,
            "layout": "overwrite",
        }
        for first, second in ((288, 96), (192, 64), (96, 32))
    }

    def units_before_projector(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        packed = of_pixels(core, inputs.get("image_sizes"), x.shape[0] * x.shape[1])
        return super().units_before_projector(core, inputs, x) if packed is None else packed
