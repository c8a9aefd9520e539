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
    """Returns 0 for every placeholder of every image, or -1 for a newline: the result of the model's own packing of
    zeros."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    config, sizes = core.config, inputs["image_sizes"]
    per_tile = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    together = inputs.get("batch_num_images")  # only the image of a prompt with a single one is cut into tiles
    tiled = [True] * len(sizes) if together is None else [n == 1 for n in together.tolist() for _ in range(n)]
    pinpoints, side = config.image_grid_pinpoints, config.vision_config.image_size
    tiles = [image_size_to_num_patches(s, pinpoints, side) if cut else 1 for s, cut in zip(sizes, tiled, strict=True)]
    zeros = [torch.zeros(n, per_tile, 1) for n in tiles]
    ratio = inputs.get("vision_aspect_ratio") or config.vision_aspect_ratio
    packed, _ = core.pack_image_features(zeros, sizes, image_newline=torch.full((1,), -1.0), vision_aspect_ratio=ratio)
    return [units.view(-1) for units in packed]
