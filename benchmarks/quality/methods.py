"""The methods ("ways") that the studies compare: other methods, and ApET with one option changed at a time.

A way takes (x [B, N, D] float32, keep, attention [B, N]) and returns rows [B, keep, D] and the position [B, keep] of
each. The number of rows is `keep` for all of them: `append` keeps fewer tokens, by the number of those that it appends.
Layouts other than "inplace" get a basis of at most half as many tokens as are kept.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import apet_kernels
from benchmarks.lib import alternatives, selection

Way = Callable[[Tensor, int, Tensor], tuple[Tensor, Tensor]]

FULL = 256
BUDGETS = (128, 64, 32, 16, 8)  # 50, 25, 12.5, 6.2, 3.1 %
VARIANT_BUDGETS = (64, 16)
BASIS = 10
SEED = 7  # of random tokens and random bases


def apet(x: Tensor, keep: int, attention: Tensor, basis: int = BASIS, **options: Any) -> tuple[Tensor, Tensor]:
    """Runs the op, by the paper's rule unless `options` say otherwise. With layout="append" the kept and the appended
    rows are `keep` together."""
    options = {"select": "fps"} | options
    layout = options.get("layout", "inplace")
    if layout != "inplace":
        basis = min(basis, keep // 2)
    return apet_kernels.compress(x, keep - basis if layout == "append" else keep, basis, **options)


def everything(x: Tensor, keep: int, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps all tokens, the baseline of every comparison."""
    return x, torch.arange(x.shape[1]).expand(x.shape[:2])


def selected(x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Returns the tokens that the paper's rule keeps: positions [B, keep], ascending, and which are basis tokens [B,
    keep]."""
    _, kept = apet_kernels.compress(x, keep, BASIS, select="fps")
    _, picks = apet_kernels.score(x, BASIS)  # [B, M]
    return kept, (kept[..., None] == picks[:, None]).any(-1)


def unmerged(x: Tensor, keep: int, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the same tokens unchanged: dropped tokens are lost."""
    kept, _ = selected(x, keep)
    return x.gather(1, kept[..., None].expand(-1, -1, x.shape[-1])), kept


def merged_past_basis(x: Tensor, keep: int, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the same tokens; dropped tokens are merged only into those that are not basis, as in the released
    code."""
    kept, is_basis = selected(x, keep)
    if keep <= BASIS:
        return unmerged(x, keep, attention)
    return apet_kernels.merge(x, kept, targets=~is_basis), kept


def residual_alone(x: Tensor, keep: int, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Keeps the largest residuals without the basis, which only serves to find them."""
    kept = selection.ranked(apet_kernels.score(x, BASIS)[0], keep)
    return apet_kernels.merge(x, kept), kept


def random_basis(x: Tensor, keep: int, attention: Tensor) -> tuple[Tensor, Tensor]:
    """Like the paper's rule, but with a random basis."""
    basis = alternatives.random(x, min(BASIS, keep), seed=SEED)[1]  # [B, M]
    kept = selection.ranked(residuals(x, basis).scatter(1, basis, torch.inf), keep)
    return apet_kernels.merge(x, kept), kept


def residuals(x: Tensor, basis: Tensor, ridge: float = 1e-5) -> Tensor:
    """Returns e^2 [B, N] of the tokens [B, N, D] reconstructed from those at basis [B, M], in float64."""
    X = x.double()
    S = X.gather(1, basis[..., None].expand(-1, -1, x.shape[-1]))  # [B, M, D]
    W = torch.linalg.solve(S @ S.mT + ridge * torch.eye(basis.shape[1], dtype=X.dtype), S @ X.mT)  # [B, M, N]
    return (X - W.mT @ S).square().sum(-1)


def other(name: str, x: Tensor, keep: int, attention: Tensor, merge: bool = False) -> tuple[Tensor, Tensor]:
    """Runs a method of benchmarks/lib/alternatives.py; `merge`: dropped tokens are merged into the kept ones, as ApET
    does."""
    tokens, kept = alternatives.METHODS[name](x, keep, attention=attention, seed=SEED)
    return (apet_kernels.merge(x, kept) if merge else tokens), kept


DEFAULT = "apet"
# Compared at every budget.
MAIN: dict[str, Way] = {
    DEFAULT: apet,
    "apet overwrite": functools.partial(apet, layout="overwrite"),
    "apet append": functools.partial(apet, layout="append"),
    "apet unmerged": unmerged,
    **{name: functools.partial(other, name) for name in alternatives.EARLIER},
    **{
        f"{name} + merge": functools.partial(other, name, merge=True)
        for name in ("random", "uniform", "fps", "divprune")
    },
}
# Compared at two budgets. With basis >= keep the residual is not used: it is farthest-point sampling with merging.
VARIANTS: dict[str, Way] = {
    "merge past basis": merged_past_basis,
    "residual alone": residual_alone,
    "qr": functools.partial(apet, select="qr"),
    "random basis": random_basis,
    **{f"basis {m}": functools.partial(apet, basis=m) for m in (1, 2, 4, 6, 15, 20, 32, 64)},
    **{f"qr basis {m}": functools.partial(apet, select="qr", basis=m) for m in (20, 64)},
    **{f"ridge {r:g}": functools.partial(apet, ridge=r) for r in (0.0, 1e-2, 1.0, 100.0)},
    **{f"start {s}": functools.partial(apet, start=s) for s in (0, 136, 255)},
    "overwrite qr": functools.partial(apet, layout="overwrite", select="qr"),
    "overwrite blend 0.5": functools.partial(apet, layout="overwrite", blend=0.5),
}


def ways(budget: int) -> dict[str, Way]:
    """Returns all ways that are compared at a budget; at FULL only `everything`."""
    if budget == FULL:
        return {"full": everything}
    return MAIN | VARIANTS if budget in VARIANT_BUDGETS else MAIN
