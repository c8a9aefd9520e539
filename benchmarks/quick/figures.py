"""The figures of the estimate in csrc/cuda/plan.cu, from what benchmarks/gpu_quick.py measured."""

from __future__ import annotations


def parabola(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """a, b and c of the least squares of y = a + b x + c x^2."""
    import numpy as np

    c, b, a = np.polyfit(x, y, 2)
    return float(a), float(b), float(c)
