"""The arms that are compared: each one turns the visual tokens of some pictures into those that the projector gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

import apet_kernels
from benchmarks.lib import alternatives

# x [B, 256, C] float32, keep, the number of the first picture -> rows [B, keep or any, C]
Arm = Callable[[Tensor, int, int], Tensor]
FULL, NONE, OTHER = "full", "no picture", "another picture"
BUDGETS = (128, 64, 32, 16)


def apet(x: Tensor, keep: int, first: int, **options: Any) -> Tensor:
    """Compresses as `apet.patch(model, keep=keep, **options)` does."""
    return apet_kernels.compress(x, keep, **options).tokens


def other(x: Tensor, keep: int, first: int, name: str, merge: bool) -> Tensor:
    """Runs a method of benchmarks/lib/alternatives.py; merge: dropped tokens are merged into the kept ones, as ApET
    does."""
    tokens, kept = alternatives.METHODS[name](x, keep, seed=first)
    return apet_kernels.merge(x, kept) if merge else tokens


NEED_NO_ATTENTION = tuple(name for name in alternatives.METHODS if name not in alternatives.NEED_ATTENTION)
ARMS: dict[str, Arm] = {
    "default": apet,
    "qr refine 2": functools.partial(apet, select="qr", basis=None, refine=2),
    "qr refine 0": functools.partial(apet, select="qr", basis=None),
    **{name: functools.partial(other, name=name, merge=False) for name in NEED_NO_ATTENTION},
    **{
        f"{name} + merge": functools.partial(other, name=name, merge=True)
        for name in ("random", "uniform", "fps", "divprune")
    },
}
FIRST = ("default", "qr refine 2", "random", "uniform")
# Baselines without a budget: all tokens, and checks of whether the picture is needed at all.
WHOLE: dict[str, Arm] = {
    FULL: lambda x, keep, first: x,
    NONE: lambda x, keep, first: x[:, :0],
    OTHER: lambda x, keep, first: x.roll(1, 0),  # the one before in the batch
}
