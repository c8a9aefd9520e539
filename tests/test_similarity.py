"""s5 on features with a large common direction, as in language models: similarities then differ only in late digits.

The tests use dropped tokens whose best target leads the second one by little more than rounding. torch.mm in float32
finds the best target of all or nearly all of them. No backend may find fewer.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from apet_kernels.reference import U
from tests.data import DTYPES

TARGETS, CLOSE, CANDIDATES = 64, 128, 8192
# The least lead of the best target, relative to ||x||. The error of torch.mm is 2 u, that of one float32 sum over 1024
# products is 8 u.
LEAD = 10 * U


@functools.cache
def close_calls(D: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x [TARGETS + CLOSE, D], targets and close calls, and the target of each [CLOSE] in float64 and by
    torch.mm.

    Token i of the close calls has a 1 in channel D - CLOSE + i, where the targets are 0. So the result shows its
    target, and the products do not change.
    """
    make = torch.Generator().manual_seed(D)
    centre = torch.zeros(D)
    centre[: D - CLOSE] = 12 * torch.randn(D - CLOSE, generator=make)

    def draw(count: int) -> Tensor:
        x = centre + torch.randn(count, D, generator=make)
        x[:, D - CLOSE :] = 0
        return x.to(dtype)

    targets = draw(TARGETS)
    T = targets.double()  # [T, D]
    found, leads = [], []
    for _ in range(CANDIDATES // 1024):
        x = draw(1024)
        X = x.double()
        best = (X @ (T / T.norm(dim=1, keepdim=True)).T).topk(2).values / X.norm(dim=1, keepdim=True)  # [n, 2]
        lead = best[:, 0] - best[:, 1]
        close = (lead >= LEAD) & (lead < 16 * LEAD)
        found.append(x[close])
        leads.append(lead[close])
    dropped = torch.cat(found)[torch.cat(leads).argsort()[:CLOSE]]
    assert len(dropped) == CLOSE, f"{len(dropped)} close calls among {CANDIDATES} tokens"
    exact = (dropped.double() @ (T / T.norm(dim=1, keepdim=True)).T).argmax(1)
    by_torch = (dropped.float() @ targets.float().T / targets.float().norm(dim=1)).argmax(1)
    dropped[:, D - CLOSE :] = torch.eye(CLOSE)
    return torch.cat([targets, dropped]), exact, by_torch


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1024, 3584])
def test_no_more_wrong_targets_than_torch(backend, dtype, D):
    x, exact, by_torch = close_calls(D, dtype)
    result = backend.merge(x[None], torch.arange(TARGETS)[None])[0]
    went = result[:, D - CLOSE :] > 0  # [T, CLOSE]
    assert (went.sum(0) == 1).all(), "a dropped token is in more or less than one mean"
    wrong, wrong_by_torch = ((to != exact).sum() for to in (went.int().argmax(0), by_torch))
    assert wrong <= wrong_by_torch, f"{wrong} of {CLOSE} targets are wrong, {wrong_by_torch} by torch.mm"
