"""Applies a setting to the tokens of an image: ApET, or one of the baselines that it is compared with."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

import apet_kernels
from apet import outcome
from apet.explore.settings import Settings
from apet.outcome import Frame, Measure, OpArguments
from apet_kernels.options import PAPER

SEED = 7  # of random tokens


def compress(x: Tensor, grid: tuple[int, int], settings: Settings) -> tuple[Frame, Measure]:
    """Compresses the tokens x [1, N, D] of one image; grid: the rows and columns of its N patches.

    Raises: ValueError, if the image has fewer tokens than are kept, or the op rejects the setting.
    """
    keep, n = settings.keep, x.shape[1]
    if not 1 <= keep <= n:
        raise ValueError(f"keep={keep} is outside 1..{n}")
    if settings.method == "apet":
        arguments = OpArguments(settings.own_basis, settings.layout, settings.select, refine=settings.refine)
        outcome.check(n, keep, arguments)
        frames, measure = outcome.compress(x, keep, arguments)
        return frames[0], measure
    residual = apet_kernels.score(x, min(settings.basis or PAPER["basis"], n), select=settings.select)[0][0]  # [N]
    if settings.method == "pooling":
        target, kept = pooled(grid, keep)
        rows = torch.stack([x[0, target == k].mean(0) for k in kept])  # [K, D]
    else:
        kept = even(grid, keep) if settings.method == "uniform" else drawn(n, keep)
        rows = apet_kernels.merge(x, kept[None])[0]
        target = outcome.merge_targets(x[0], kept)
        target[kept] = kept
    retained = np.zeros(n, bool)
    retained[kept.numpy()] = True
    none = np.zeros(0, np.int64)
    frame = Frame(kept.numpy(), none, none, retained, target.numpy(), residual.double().numpy())
    return frame, outcome.measure(x, rows[None], [frame])


def even(grid: tuple[int, int], keep: int) -> Tensor:
    """Returns [K] ascending positions of an even grid: its rows are as far apart as its columns, as nearly as
    possible."""
    rows, cols = grid
    used = min(max(round((keep * rows / cols) ** 0.5), -(-keep // cols), 1), rows, keep)
    ends = [i * keep // used for i in range(used + 1)]
    positions = [
        row * cols + col
        for row, (begin, end) in zip(_spread(used, rows), itertools.pairwise(ends), strict=True)
        for col in _spread(end - begin, cols)
    ]
    return torch.tensor(positions)


def drawn(tokens: int, keep: int) -> Tensor:
    """Returns [K] random ascending positions, the same in every call."""
    return torch.randperm(tokens, generator=torch.Generator().manual_seed(SEED))[:keep].sort().values


def pooled(grid: tuple[int, int], keep: int) -> tuple[Tensor, Tensor]:
    """Divides the grid evenly into `keep` blocks, or into the next smaller number that is possible; of two equally
    large divisions it takes the one with squarer blocks. Returns the middle position of each token's block [N], and the
    middle positions [K] of all blocks."""
    rows, cols = grid
    down, across = max(
        ((r, min(cols, keep // r)) for r in range(1, min(rows, keep) + 1)),
        key=lambda n: (n[0] * n[1], -abs(np.log(rows / n[0] * n[1] / cols))),
    )
    block_row, block_col = torch.arange(rows) * down // rows, torch.arange(cols) * across // cols
    middle_row, middle_col = (
        torch.stack([(block == b).nonzero().view(-1).median() for b in range(count)])
        for block, count in ((block_row, down), (block_col, across))
    )
    target = middle_row[block_row][:, None] * cols + middle_col[block_col]  # [rows, cols]
    kept = middle_row[:, None] * cols + middle_col
    return target.view(-1), kept.view(-1)


def _spread(count: int, places: int) -> list[int]:
    """Returns `count` of `places` positions: the middles of equal parts."""
    return [(2 * i + 1) * places // (2 * count) for i in range(count)]
