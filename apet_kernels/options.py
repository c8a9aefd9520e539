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
# The rule of the paper, as options; also the defaults of `score`, which has no `keep` to pick as many basis tokens as.
PAPER: dict[str, Any] = {"basis": 10, "select": "fps"}
MAX_BASIS = 64  # basis tokens that are picked one at a time; more than that are picked in rounds
MAX_REFINE = 8
# These belong to the algorithm and are not for tuning: other values give other tokens (docs/algorithm.md, "In rounds").
ROUNDS = 4
POOL = 2  # candidates of a round for each of its picks
FEW = 16  # up to this many basis tokens are picked one at a time, since rounds of a few picks would be coarse


def require(holds: bool, message: Callable[[], str]) -> None:
    """Raises ValueError with this message unless the condition holds; the condition may be on symbolic sizes."""
    # bool() of NumPy's; that of a symbolic one would be a guard.
    torch._check_value(holds if isinstance(holds, torch.SymBool) else bool(holds), message)


@dataclass(frozen=True)
class Options:
    """The arguments of `compress` other than the tokens and `keep`. `score` uses basis, select, start and ridge, with
    defaults of its own for the first two.

    Up to 64 basis tokens are picked one at a time, more in rounds. `basis=None` stands for `keep`, also picked in
    rounds.

    Example:
        >>> Options(basis=8, layout="append").check(tokens=576, keep=64)
        >>> Options(basis=65).check(tokens=576)
        Traceback (most recent call last):
        ValueError: basis=65 is outside 1..64
    """

    # M basis tokens: 1..64; with select="qr" also up to keep (ragged images: any number), and None
    basis: int | None = None
    layout: Layout = "inplace"
    select: Select = "qr"
    start: int = -1  # the first basis token; -1: the one of largest norm
    ridge: float = 1e-5  # added to the diagonal of the Gram matrix of the basis
    blend: float = 1.0  # "overwrite" only: blend * basis + (1 - blend) * token
    refine: int = 0  # medoid steps, 0..8; "inplace" only, and where M is keep

    def check(self, tokens: int, keep: int | None = None, ragged: bool = False) -> None:
        """Checks the options against N tokens per image (ragged: T in all). Those of `compress` are also checked
        against `keep`, the tokens that each image keeps, unless the images are ragged.

        The order and the messages are those of csrc/torch_ops.h and csrc/problem.cpp. Sizes may be symbolic.

        Raises:
            ValueError: names the first option that is out of range, and its value.
        """
        require(self.select in SELECTS, lambda: f"select='{self.select}' is none of {', '.join(SELECTS)}")
        # None: score. A ragged image has at most as many basis tokens as it keeps, so any number will do.
        bound = 2**31 - 1 if ragged else keep
        give = f"give basis in 1..{MAX_BASIS}"
        if self.basis is None:
            require(self.select == "qr", lambda: f"basis=None needs select='qr', got select='{self.select}'; {give}")
            require(
                bound is not None,
                lambda: f"basis=None means basis=keep, but score has no keep; {give}",
            )
        elif not 1 <= self.basis <= MAX_BASIS:
            most = MAX_BASIS if self.select == "fps" or bound is None else max(MAX_BASIS, bound)
            require(1 <= self.basis <= most, lambda: f"basis={self.basis} is outside 1..{most}")
        require(self.layout in LAYOUTS, lambda: f"layout='{self.layout}' is none of {', '.join(LAYOUTS)}")
        require(
            not self.in_rounds or self.layout == "inplace",
            lambda: f"basis={self.basis} needs layout='inplace', got layout='{self.layout}'; {give}",
        )
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
            keep is None or self.layout != "overwrite" or keep > self.basis or keep == tokens,  # type: ignore[operator]
            lambda: f"layout='overwrite' needs keep > basis, got keep={keep} and basis={self.basis}",
        )
        require(0 <= self.refine <= MAX_REFINE, lambda: f"refine={self.refine} is outside 0..{MAX_REFINE}")
        require(
            self.refine == 0 or self.layout == "inplace",
            lambda: f"refine={self.refine} needs layout='inplace', got layout='{self.layout}'",
        )
        if self.refine > 0 and self.basis is not None:
            require(
                keep is not None, lambda: f"refine={self.refine} of ragged images needs basis=None, got {self.basis}"
            )
            require(
                self.basis == keep,
                lambda: f"refine={self.refine} needs basis=None or basis=keep, got basis={self.basis} and keep={keep}",
            )

    @property
    def in_rounds(self) -> bool:
        """Whether images that keep more than `FEW` tokens have their basis picked in rounds."""
        return self.basis is None or self.basis > MAX_BASIS

    def basis_of(self, keep: int) -> int:
        """Returns M of an image that keeps `keep` tokens."""
        if self.basis is None:
            return keep
        return min(self.basis, keep) if self.in_rounds else self.basis

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of `compress`, spelled out: not every version of torch.compile can trace
        `vars(self)`."""
        return {
            "basis": self.basis,
            "layout": self.layout,
            "select": self.select,
            "start": self.start,
            "ridge": self.ridge,
            "blend": self.blend,
            "refine": self.refine,
        }

    def rows(self, keep: int, images: int = 1) -> int:
        """Returns how many rows the result has: `keep`, and with "append" also the basis of every image."""
        return keep + images * (self.basis or 0) if self.layout == "append" else keep


def check_keep(keep: int, tokens: int, name: str = "keep") -> None:
    """Checks that 1 <= keep <= tokens; either may be symbolic.

    Raises:
        ValueError: if not.
    """
    for holds in (keep >= 1, keep <= tokens):
        require(holds, lambda: f"{name}={keep} is outside 1..{tokens}, the tokens of an image")
