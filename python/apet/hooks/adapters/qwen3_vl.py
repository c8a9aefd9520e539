"""Qwen3-VL (`qwen3_vl`).

Modifications: those of Qwen2.5-VL, and
- of the deepstack features, which the first decoder layers add at visual tokens, those of the kept tokens stay, as they
  are (a merged token keeps its own); so `llm_layer` lies behind these layers.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from ..sequence import Packing
from .qwen_grid import QwenGrid


class Qwen3VL(QwenGrid):
    """An image is a unit, and so is each frame of a video (they have a time stamp between them)."""

    along: ClassVar = frozenset({"visual_pos_masks", "deepstack_visual_embeds"})

    def first_llm_layer(self, core: nn.Module) -> int:
        return len(core.visual.deepstack_visual_indexes)

    def follow(self, packing: Packing, inputs: dict[str, Any]) -> None:
        visual = inputs["visual_pos_masks"].to(packing.index.device)  # [B, L] bool
        number = (visual.flatten().cumsum(0) - 1).view_as(visual)  # [B, L]: the row of each one's deepstack features
        stays = visual.gather(1, packing.index) & packing.valid  # [B, L2]
        rows = packing.along(number, 1)[stays]
        inputs["deepstack_visual_embeds"] = [
            features[rows.to(features.device)] for features in inputs["deepstack_visual_embeds"]
        ]
        inputs["visual_pos_masks"] = stays
