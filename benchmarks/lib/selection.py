"""Parts that several token reduction methods share: ways to select tokens, and to merge the rest into them.

Shapes: x [B, N, D] tokens; positions are int64, of [B, K] tokens unless another shape is given. All parts run on the
device of their arguments and do not check them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EXPLAINED = 1e-12  # share of a float64 diagonal entry below which nothing but rounding is left of it


def ranked(score: Tensor, keep: int) -> Tensor:
    """Returns positions [B, keep] of the largest scores [B, N], ties to the lower position, ascending."""
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(-1).values


def farthest(first: Tensor, keep: int, distance: Callable[[Tensor], Tensor], weight: Tensor | float = 1.0) -> Tensor:
    """Greedy max-min selection: returns positions [B, keep] in the order they are picked, the first ones given as first
    [B].

    distance(p [B]) -> [B, N]. With a weight [B, N] >= 0 the token of largest weight times distance to the nearest pick
    is next. No position is picked twice, even among copies.
    """
    picks, min_distance = [first], distance(first)  # [B, N]
    taken = torch.zeros_like(min_distance, dtype=torch.bool).scatter_(1, first[:, None], True)
    while len(picks) < keep:
        far = (weight * min_distance).masked_fill(taken, -math.inf).argmax(-1)  # [B]
        picks.append(far)
        taken.scatter_(1, far[:, None], True)
        min_distance = torch.minimum(min_distance, distance(far))
    return torch.stack(picks, 1)


def covering(similarity: Tensor, keep: int, weight: Tensor) -> Tensor:
    """Greedy facility location: returns positions [B, keep] in the order they are picked.

    A token j is covered by as much as the largest similarity [B, N, N] that it has with a pick, or 0. The next pick is
    the token of largest weight [B, N] times the coverage that it adds, ties to the lower position.
    """
    picks: list[Tensor] = []
    covered = similarity.new_zeros(similarity.shape[:2])  # [B, N]
    taken = torch.zeros_like(covered, dtype=torch.bool)
    image = torch.arange(len(similarity), device=similarity.device)
    while len(picks) < keep:
        gain = (similarity - covered[:, None]).clamp(min=0).sum(-1)  # [B, N]: of the token in each row
        pick = (weight * gain).masked_fill(taken, -math.inf).argmax(-1)  # [B]
        picks.append(pick)
        taken.scatter_(1, pick[:, None], True)
        covered = torch.maximum(covered, similarity[image, pick])
    return torch.stack(picks, 1)


class Pivots(NamedTuple):
    """picks [B, K]: positions in the order they are picked; resid_sq [B, K] float64: the diagonal entry of each when
    it was picked, which never rises."""

    picks: Tensor
    resid_sq: Tensor


def pivots(kernel: Tensor, keep: int) -> Pivots:
    """Pivoted Cholesky of kernel [B, N, N] float64, positive semidefinite.

    The next pick is the token with the largest diagonal entry left: the one that multiplies the determinant of the
    picks' kernel by most, and for kernel = X X^T the one that the picks before it rebuild worst. Ties, and all that is
    left when the picks explain everything, go to the lower position. Memory: [B, keep, N] beside the kernel.
    """
    diagonal = kernel.diagonal(dim1=1, dim2=2)  # [B, N]
    resid_sq, taken = diagonal.clone(), torch.zeros_like(diagonal, dtype=torch.bool)
    y = kernel.new_zeros(len(kernel), keep, kernel.shape[1])  # [B, K, N], L^T of the Cholesky factor L
    image = torch.arange(len(kernel), device=kernel.device)
    picks, picked = [], []
    for i in range(keep):
        pick = resid_sq.masked_fill(taken, -math.inf).argmax(-1)  # [B]
        picks.append(pick)
        taken.scatter_(1, pick[:, None], True)
        known = torch.einsum("bk,bkn->bn", y[image, :i, pick], y[:, :i])  # [B, N]
        pivot = resid_sq[image, pick][:, None]  # [B, 1]
        picked.append(pivot)
        y[:, i] = torch.where(pivot > 0, (kernel[image, pick] - known) / pivot.sqrt(), 0)
        resid_sq = resid_sq - y[:, i].square()
        resid_sq = resid_sq.masked_fill(resid_sq <= EXPLAINED * diagonal, 0)
    return Pivots(torch.stack(picks, 1), torch.cat(picked, 1))


def merge(x: Tensor, kept: Tensor, least: float = -math.inf) -> Tensor:
    """Returns the kept rows of x [B, K, D], each the mean of itself and of the dropped tokens that resemble it most
    (cosine), in float32.

    A dropped token whose cosine with its row is below `least` is lost instead.
    """
    targets, dropped = take(x.float(), kept), take(x.float(), others(kept, x.shape[1]))  # [B, K, D], [B, N-K, D]
    K = kept.shape[1]
    similarity, target = (F.normalize(dropped, dim=-1) @ F.normalize(targets, dim=-1).mT).max(-1)  # [B, N-K]
    weight = torch.cat([torch.ones_like(targets[..., 0]), (similarity >= least).float()], 1)  # [B, N]
    row = torch.cat([torch.arange(K, device=x.device).expand_as(kept), target], 1)  # [B, N]
    return means(torch.cat([targets, dropped], 1), weight, row, K)[0].to(x.dtype)


def means(x: Tensor, sizes: Tensor, row: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns means of x [B, n, D], weighted by sizes [B, n] and grouped by row [B, n]: [B, rows, D], and sizes [B,
    rows]."""
    B, _, D = x.shape
    total = x.new_zeros(B, rows, D).scatter_add_(1, row[..., None].expand_as(x), x * sizes[..., None])
    size = sizes.new_zeros(B, rows).scatter_add_(1, row, sizes)
    return total / size[..., None], size


def mean_cosine(x: Tensor) -> Tensor:
    """Returns the mean cosine [B, N] of each token of x with all of its image, itself among them."""
    unit = F.normalize(x, dim=-1)
    return (unit @ unit.mean(1)[..., None]).squeeze(-1)


def unit_range(score: Tensor) -> Tensor:
    """Returns score [B, N] scaled to 0..1 in each image; 1 where all are equal."""
    low, high = score.aminmax(dim=-1, keepdim=True)  # [B, 1]
    return torch.where(high > low, (score - low) / (high - low), 1)


def others(indices: Tensor, N: int) -> Tensor:
    """Returns the positions [B, N-K] that are not among indices [B, K], ascending."""
    free = torch.ones(len(indices), N, dtype=torch.bool, device=indices.device).scatter_(1, indices, False)
    return free.nonzero()[:, 1].view(len(indices), N - indices.shape[1])


def spaced(count: int, n: int) -> Tensor:
    """Returns `count` of n places: the middles of equal parts."""
    return (2 * torch.arange(count) + 1) * n // (2 * max(count, 1))


def take(x: Tensor, indices: Tensor) -> Tensor:
    """Returns the rows of x at indices [B, K]: [B, K, D]."""
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))
