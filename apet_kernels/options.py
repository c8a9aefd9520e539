"""The options of the ops: their types, defaults and limits, and the only check of them in Python."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

Layout = Literal["inplace", "overwrite", "append"]
Select = Literal["fps", "qr"]
Backend = Literal["cpu", "triton", "cuda", "reference"]

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
SELECTS: tuple[Select, ...] = get_args(Select)
BACKENDS: tuple[Backend, ...] = get_args(Backend)
MAX_BASIS = 64


def require(holds: bool, message: Callable[[], str]) -> None:
    """Raises ValueError with this message unless the condition holds, which may be on symbolic sizes."""
    torch._check_value(holds, message)


@dataclass(frozen=True)
class Options:
    """The arguments of `compress` beside the tokens and `keep`. `score` uses basis, select, start and ridge.

    Example:
        >>> Options(basis=8, layout="append").check(tokens=576, keep=64)
        >>> Options(basis=65).check(tokens=576)
        Traceback (most recent call last):
        ValueError: basis=65 is outside 1..64
    """

    basis: int = 10  # M, 1..64 basis tokens
    layout: Layout = "inplace"
    select: Select = "fps"
    start: int = -1  # the first basis token; -1: the one of largest norm
    ridge: float = 1e-5  # added to the diagonal of the Gram matrix of the basis
    blend: float = 1.0  # "overwrite" only: blend * basis + (1 - blend) * token

    def check(self, tokens: int, keep: int | None = None) -> None:
        """Check the options against N tokens per image (ragged: T in all) and, if given, `keep` of them.

        The order and the messages are those of csrc/torch_ops.h and csrc/problem.cpp. tokens and keep may be symbolic.

        Raises:
            ValueError: names the first option that is out of range, and its value.
        """
        require(1 <= self.basis <= MAX_BASIS, lambda: f"basis={self.basis} is outside 1..{MAX_BASIS}")
        require(self.select in SELECTS, lambda: f"select='{self.select}' is none of {', '.join(SELECTS)}")
        require(self.layout in LAYOUTS, lambda: f"layout='{self.layout}' is none of {', '.join(LAYOUTS)}")
        require(
            self.start in (-1, 0) or 0 < self.start < tokens,
            lambda: f"start={self.start} is outside -1..{max(int(tokens) - 1, 0)}",
        )
        require(
            self.ridge >= 0 and math.isfinite(self.ridge), lambda: f"ridge={self.ridge:g} must be finite and at least 0"
        )
        if keep is not None:
            check_keep(keep, tokens)
        require(0 <= self.blend <= 1, lambda: f"blend={self.blend:g} is outside 0..1")
        require(
            self.blend == 1 or self.layout == "overwrite",
            lambda: f"blend={self.blend:g} needs layout='overwrite', got layout='{self.layout}'",
        )
        require(
            keep is None or self.layout != "overwrite" or keep > self.basis or keep == tokens,
            lambda: f"layout='overwrite' needs keep > basis, got keep={keep} and basis={self.basis}",
        )

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `compress`, spelled out: not every version of torch.compile can trace `vars(self)`."""
        return {
            "basis": self.basis,
            "layout": self.layout,
            "select": self.select,
            "start": self.start,
            "ridge": self.ridge,
            "blend": self.blend,
        }

    def rows(self, keep: int, images: int = 1) -> int:
        """How many rows the result has: `keep`, and for "append" the basis of every image."""
        return keep + images * self.basis if self.layout == "append" else keep


def check_keep(keep: int, tokens: int, name: str = "keep") -> None:
    """Check that 1 <= keep <= tokens; either may be symbolic.

    Raises:
        ValueError: otherwise.
    """
    for holds in (keep >= 1, keep <= tokens):
        require(holds, lambda: f"{name}={keep} is outside 1..{tokens}, the tokens of an image")
