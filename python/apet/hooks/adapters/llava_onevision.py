"""LLaVA-OneVision (`llava_onevision`).

Modifications:
- the language model gets a sequence shortened by compressing the features of each image, after the model has joined its
  tiles and scaled them down, and of each frame of a video; newline tokens stay; positions renumbered;
- with `llm_layer`, its layers from there on get a sequence shortened again, renumbered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Units, equal_units
from .tiled import tiles


class LlavaOnevision(Adapter):
    """An image is a unit, and so is each frame of a video."""

    unit_names: ClassVar = {"image": "image", "video": "frame"}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        found = {}
        if "image" in counts:
            found["image"] = [units.long() for units in _packed(core, inputs)]
        if "video" in counts:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            tokens = (counts["video"] // videos - 1) // frames
            found["video"] = [torch.cat([equal_units(frames, tokens), torch.tensor([-1])])] * videos
        return found


def _packed(core: nn.Module, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Returns 0 for each placeholder of each image, -1 for a newline: the model's own packing of zeros."""
    vision, counts, together = core.config.vision_config, tiles(core, inputs), inputs.get("batch_num_images")
    if together is not None:  # only the image of a prompt with a single one is cut into tiles
        images = [n for n in together.tolist() for _ in range(n)]
        counts = [count if n == 1 else 1 for count, n in zip(counts, images, strict=True)]
    zeros = [torch.zeros(n, (vision.image_size // vision.patch_size) ** 2, 1) for n in counts]
    ratio, line = inputs.get("vision_aspect_ratio") or core.config.vision_aspect_ratio, torch.full((1,), -1.0)
    found, _ = core.pack_image_features(zeros, inputs["image_sizes"], image_newline=line, vision_aspect_ratio=ratio)
    return [units.view(-1) for units in found]
