"""Qwen2-VL (`qwen2_vl`).

Modifications: those of Qwen2.5-VL; the paper has no budgets for it.
"""

from __future__ import annotations

from .qwen_grid import QwenGrid


class Qwen2VL(QwenGrid):
    """An image is a unit, and so is each temporal step of a video."""
