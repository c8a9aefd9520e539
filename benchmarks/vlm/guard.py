"""Whether the tokens of a picture foretell that compression will cost it an answer.

A signal is a number for each picture and budget, larger where more is lost. It is judged by the area under the ROC
curve: the probability that it is larger for a question that was answered right with all tokens and wrong with the
compressed ones than for one that was answered right with both. 0.5 is chance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import apet_kernels
from benchmarks.lib import selection
from benchmarks.vlm import arms

ARM = "qr refine 2"  # whose losses are foretold


def signals(x: Tensor, budgets: Sequence[int]) -> dict[str, Tensor]:
    """Returns signals [B, budgets] of pictures x [B, N, C].

    "next pivot" is the residual of the first token that is not kept, relative to the mean square of the tokens, where
    tokens are picked one at a time; "residual" that of all tokens together; "distance" 1 - the mean cosine of dropped
    tokens with the kept token that resembles them most; "spread" does not depend on the budget: 1 - the mean cosine of
    two tokens of the picture.
    """
    X = x.double()
    kernel = X @ X.mT
    energy = kernel.diagonal(dim1=1, dim2=2).mean(-1)  # [B]
    resid_sq = selection.pivots(kernel, max(budgets) + 1).resid_sq  # [B, K + 1]
    spread = 1 - selection.mean_cosine(X).mean(-1)  # [B]
    found: dict[str, list[Tensor]] = {"next pivot": [], "residual": [], "distance": [], "spread": []}
    for keep in budgets:
        found["next pivot"].append(resid_sq[:, keep] / energy)
        found["residual"].append(_residual(X, keep) / energy)
        found["distance"].append(_distance(X, keep))
        found["spread"].append(spread)
    return {name: torch.stack(values, -1) for name, values in found.items()}


def _kept(X: Tensor, keep: int) -> Tensor:
    """Returns the positions [B, keep] that the arm keeps."""
    return apet_kernels.compress(X.float(), keep, **arms.IN_ROUNDS, refine=arms.REFINE).indices


def _residual(X: Tensor, keep: int) -> Tensor:
    """Returns [B]: the mean square of what the kept tokens cannot rebuild."""
    rows = selection.take(X, _kept(X, keep))  # [B, K, C]
    onto = torch.linalg.qr(rows.mT).Q  # [B, C, K]
    return (X - X @ onto @ onto.mT).square().sum(-1).mean(-1)


def _distance(X: Tensor, keep: int) -> Tensor:
    """Returns [B]: 1 - the mean cosine of dropped tokens with the kept token that resembles them most."""
    kept = _kept(X, keep)
    unit = F.normalize(X, dim=-1)
    dropped = selection.take(unit, selection.others(kept, X.shape[1]))
    return 1 - (dropped @ selection.take(unit, kept).mT).amax(-1).mean(-1)


def area(signal: np.ndarray, lost: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Returns the area under the ROC curve of a signal [p], for counts [..., p] of lost and of kept answers; NaN if
    there are none of one kind."""
    order = np.argsort(signal, kind="stable")
    start = np.unique(signal[order], return_index=True)[1]
    lost, kept = (np.add.reduceat(counts[..., order], start, axis=-1) for counts in (lost, kept))
    below = np.cumsum(kept, -1) - kept / 2
    pairs = lost.sum(-1) * kept.sum(-1)
    return np.where(pairs > 0, (lost * below).sum(-1) / np.maximum(pairs, 1), np.nan)
