"""LLaVA-NeXT-Video (`llava_next_video`).

Modifications:
- the language model gets a sequence shortened by compressing the projected features of each tile of an image and of
  each frame of a video, which come from the same projector; newline tokens stay; positions renumbered;
- with `llm_layer`, its layers from there on get a sequence shortened again, renumbered again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..adapter import Units, equal_units
from .tiled import Tiled


class LlavaNextVideo(Tiled):
    """A tile is a unit, and so is each frame of a video."""

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        found = super().units(core, inputs, counts) if "image" in counts else {}
        if "video" in counts:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            found["video"] = [equal_units(frames, counts["video"] // (videos * frames))] * videos
        return found
