"""Video-LLaVA (`video_llava`).

Modifications:
- the language model gets a sequence shortened by compressing the projected features of each image and of each frame
  of a video; the CLS token that opens a frame stays; positions renumbered;
- `layout="append"` puts the basis tokens after the kept ones of their frame, as the released code does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from apet_kernels.options import PAPER

from ..adapter import Adapter, Units, one_unit


class VideoLlava(Adapter):
    """An image is a unit, and so is each frame of a video without its CLS."""

    unit_names: ClassVar = {"image": "image", "video": "frame"}
    presets: ClassVar = {"paper-32": {**PAPER, "keep": 22, "layout": "append"}}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        found = {}
        if "image" in counts:
            images = _pixels(inputs).shape[0]
            found["image"] = [one_unit(counts["image"] // images)] * images
        if "video" in counts:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            unit = torch.arange(frames)[:, None].repeat(1, counts["video"] // (videos * frames))
            unit[:, 0] = -1
            found["video"] = [unit.flatten()] * videos
        return found


def _pixels(inputs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the pixels of the images, which transformers 4 calls pixel_values_images."""
    return next(inputs[n] for n in ("pixel_values", "pixel_values_images") if inputs.get(n) is not None)
