"""The arms that are compared: each one turns the visual tokens of some pictures into those that the projector gets,
and says which token each of them stands for.

- "paper" is the paper's rule; "qr" has a basis of K picked in rounds and `refine` medoid steps, and without these it is
  the default of the op. The same rule picked one at a time is "spare + merge".
- In "shared" pictures share their tokens, as with `apet_kernels.share`; in "guarded" they keep more where K is little,
  as with `apet_kernels.needed`.
- By the `weights` of the op, "distinct" prefers tokens that differ from the rest of their picture, by
  `apet_kernels.distinct` with a power of 1 or 2, and "relevance" those that resemble the question.
- "threshold 0.5" is no part of the op: a variant of "qr refine 2" that merges a dropped token only into one that
  resembles it. Nor is "without merge", where dropped tokens are lost.
- The others are methods of benchmarks/lib/alternatives.py. "+ merge": dropped tokens are merged into the kept ones, as
  ApET does. CDPruner's relevance is that of `packing.relevance`, so every question gets tokens of its own.
- "in place": the tokens, and the text after them, keep the positions that they have without compression, as with
  `apet.patch(..., positions="keep")`. Otherwise they are counted anew, as without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import apet_kernels
from apet_kernels import Compressed
from apet_kernels.options import PAPER
from benchmarks.lib import alternatives, selection


@dataclass
class Batch:
    """Pictures as an arm gets them: x [B, 256, C] float32, the number of the first one, and what some arms need:
    attention [B, 256] that the class token pays, relevance [B, 256] to the one question that is asked."""

    x: Tensor
    first: int = 0
    attention: Tensor | None = None
    relevance: Tensor | None = None


# pictures, keep -> tokens [B, keep or any, C] and their indices, or tokens [any, C] and indices of each picture
Arm = Callable[[Batch, int], Compressed | list[Compressed]]
FULL, NONE, OTHER = "full", "no picture", "another picture"
BUDGETS = (128, 64, 32, 16)
IN_ROUNDS: dict[str, Any] = {"select": "qr", "basis": None}
DEFAULT = "qr refine 0"  # of the op
GUARDED = f"{DEFAULT} guarded"
REFINE = 2
LEAST = 0.5  # cosine


def apet(batch: Batch, keep: int, **options: Any) -> Compressed:
    """Compresses as `apet.patch(model, keep=keep, **options)` does."""
    return apet_kernels.compress(batch.x, keep, **options)


def threshold(batch: Batch, keep: int) -> Compressed:
    """Like "qr refine 2", but a dropped token whose cosine with its target is below 0.5 is lost."""
    kept = apet(batch, keep, **IN_ROUNDS, refine=REFINE).indices
    return Compressed(selection.merge(batch.x, kept, least=LEAST), kept)


def distinct(batch: Batch, keep: int, power: float = 1.0, refine: int = REFINE, merge: bool = True) -> Compressed:
    """Prefers tokens that differ from the rest, as with `apet.patch(..., distinct=power)`; with or without merging."""
    pictures, tokens, _ = batch.x.shape
    weights = apet_kernels.distinct(batch.x.flatten(0, 1), [tokens] * pictures, power).view(pictures, tokens)
    chosen = apet(batch, keep, **IN_ROUNDS, refine=refine, weights=weights)
    return chosen if merge else Compressed(selection.take(batch.x, chosen.indices), chosen.indices)


def relevant(batch: Batch, keep: int, weight: float) -> Compressed:
    """Prefers tokens that resemble the question: the factor falls from 1 for the most relevant token of the picture to
    1 - weight for the least."""
    relevance = selection.unit_range(alternatives.given("relevance", batch.relevance, batch.x))
    factor = 1 - weight * (1 - relevance).double()
    return apet(batch, keep, **IN_ROUNDS, refine=REFINE, weights=factor.float())


def shared(batch: Batch, keep: int, refine: int) -> list[Compressed]:
    """The pictures of a batch share their B keep tokens, as with `apet.patch(..., share=True)`."""
    pictures, tokens, _ = batch.x.shape
    keeps = apet_kernels.share(batch.x.flatten(0, 1), [tokens] * pictures, [keep] * pictures)
    return to_budgets(batch, keeps, refine)


def guarded(batch: Batch, keep: int) -> list[Compressed]:
    """The default of the op, where pictures keep as many as they need, as with `apet.patch(..., guard="keep")`."""
    return to_budgets(batch, needed(batch.x, keep), 0)


def needed(x: Tensor, keep: int) -> list[int]:
    """Returns how many tokens each picture of x [B, N, C] keeps with `guard="keep"`."""
    pictures, tokens, _ = x.shape
    return apet_kernels.needed(x.flatten(0, 1), [tokens] * pictures, [keep] * pictures)


def to_budgets(batch: Batch, keeps: list[int], refine: int) -> list[Compressed]:
    """Compresses every picture to a number of tokens of its own."""
    found = [apet(Batch(x[None]), keep, **IN_ROUNDS, refine=refine) for x, keep in zip(batch.x, keeps, strict=True)]
    return [Compressed(one.tokens[0], one.indices[0]) for one in found]


def other(batch: Batch, keep: int, name: str, merge: bool) -> Compressed:
    """Runs a method of benchmarks/lib/alternatives.py."""
    more = {"relevance": batch.relevance} if name in alternatives.NEED_RELEVANCE else {}
    tokens, kept = alternatives.METHODS[name](batch.x, keep, attention=batch.attention, seed=batch.first, **more)
    return Compressed(apet_kernels.merge(batch.x, kept) if merge else tokens, kept)


def all_of(x: Tensor) -> Compressed:
    """Returns all tokens x [B, N, C]."""
    return Compressed(x, torch.arange(x.shape[1]).expand(x.shape[:2]))


# name of the arm -> method, and whether its dropped tokens are merged here
OTHERS = {name: (name, False) for name in alternatives.METHODS}
OTHERS |= {f"{name} + merge": (name, True) for name in alternatives.METHODS if name not in alternatives.MERGING}
ARMS: dict[str, Arm] = {
    "paper": functools.partial(apet, **PAPER),
    "qr refine 2": functools.partial(apet, **IN_ROUNDS, refine=REFINE),
    "qr refine 0": functools.partial(apet, **IN_ROUNDS),
    "qr refine 2 threshold 0.5": threshold,
    "qr refine 2 distinct": distinct,
    "qr refine 0 distinct 2": functools.partial(distinct, power=2.0, refine=0),
    "qr refine 0 distinct 2 without merge": functools.partial(distinct, power=2.0, refine=0, merge=False),
    "qr refine 2 shared": functools.partial(shared, refine=REFINE),
    "qr refine 0 shared": functools.partial(shared, refine=0),
    "qr refine 2 relevance 0.5": functools.partial(relevant, weight=0.5),
    "qr refine 2 relevance 1": functools.partial(relevant, weight=1.0),
    **{arm: functools.partial(other, name=name, merge=merge) for arm, (name, merge) in OTHERS.items()},
}
# The paper's schedule: one and a half times as many tokens in the first half of the decoder's layers, half as many in
# the second, compressed by the same method.
STAGED = {f"{arm} in two stages": ARMS[arm] for arm in ("paper", "qr refine 2", "qr refine 0", "random", "uniform")}
HALVES = (1.5, 0.5)
# Arms that keep more than K of some pictures, so that they are no match for those above.
MORE: dict[str, Arm] = {GUARDED: guarded}
NEED_ATTENTION = {arm for arm, (name, _) in OTHERS.items() if name in alternatives.NEED_ATTENTION}
BY_QUESTION = {arm for arm, (name, _) in OTHERS.items() if name in alternatives.NEED_RELEVANCE}
BY_QUESTION |= {arm for arm in ARMS if "relevance" in arm}
# The arms that are asked with the positions kept, too.
PLACED = (
    *("paper", "qr refine 2", "qr refine 0", "qr refine 2 distinct", "qr refine 0 distinct 2"),
    "qr refine 0 distinct 2 without merge",
    *(arm for arm in OTHERS if arm not in BY_QUESTION),
)
IN_PLACE: dict[str, Arm] = {f"{arm} in place": ARMS[arm] for arm in PLACED}
# Baselines without a budget: all tokens, and checks of whether the picture is needed at all.
WHOLE: dict[str, Arm] = {
    FULL: lambda batch, keep: all_of(batch.x),
    NONE: lambda batch, keep: all_of(batch.x[:, :0]),
    OTHER: lambda batch, keep: all_of(batch.x.roll(1, 0)),  # the one before in the batch
}
