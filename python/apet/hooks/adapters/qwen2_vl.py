"""Qwen2-VL (`qwen2_vl`).

Modifications: those of Qwen2.5-VL; the paper has no budgets for it.
"""

from __future__ import annotations

from typing import ClassVar

from .qwen2_5_vl import Qwen2_5VL


class Qwen2VL(Qwen2_5VL):
    """An image is a unit, and so is each temporal step of a video."""

    presets: ClassVar = {}
