"""Qwen2.5-VL (`qwen2_5_vl`).

Modifications:
- the language model gets a sequence shortened by compressing the merged visual embeddings of each image and of each
  temporal step of a video; every token keeps its M-RoPE position, and decoding goes on after the largest one;
- with `llm_layer`, its layers from there on get a sequence shortened again, positions kept.
"""

from __future__ import annotations

from typing import ClassVar

from .qwen_grid import QwenGrid


class Qwen2_5VL(QwenGrid):
    """An image is a unit, and so is each temporal step of a video."""

    presets: ClassVar = {
        "paper-0.2": {"keep": 0.3, "llm_layer": 14, "llm_keep": 0.333, "layout": "overwrite", "blend": 0.5}
    }
