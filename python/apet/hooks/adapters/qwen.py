"""Qwen2.5-VL (`qwen2_5_vl`), and by the same rules Qwen2-VL, Qwen3-VL and Qwen3.5.

Modifications:
- the language model gets a sequence shortened by compressing the merged visual embeddings of each image and of each
  temporal step of a video; every token keeps its M-RoPE position, and decoding continues after the largest one;
- of the deepstack features of Qwen3-VL, which the first decoder layers add at visual tokens, those of the kept tokens
  stay, as they are (a merged token keeps its own); so `llm_layer` must be after these layers;
- with `llm_layer`, its layers from there on get a sequence shortened again, positions kept.
"""

from __future__ import annotations

from typing import ClassVar

from apet_kernels.options import PAPER

from ..adapter import Adapter


class Qwen2_5VL(Adapter):
    """An image is a unit, and so is each temporal step of a video."""

    presets: ClassVar = {
        "paper-0.2": {**PAPER, "keep": 0.3, "llm_layer": 14, "llm_keep": 0.333, "layout": "overwrite", "blend": 0.5}
    }
