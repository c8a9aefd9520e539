"""Other methods for the same task, N visual tokens to K: our own short implementations, from their papers.

All take (x [B, N, D], keep, *, attention=None, seed=0) and return (tokens [B, keep, D] in x's dtype, indices [B, keep]
int64, ascending): the source of each row; for merged tokens the one that they are merged into. attention [B, N] is what
each token received from the class or text tokens; methods that do not need it ignore it, and all but `random` ignore
the seed. They run on the device of x and compute in float32. Methods that compare keys of an attention layer get the
tokens instead, since there are no keys here. Invalid arguments raise a ValueError that names the value.

Studies also use the parts `ranked`, `farthest` and `tome_groups`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Method = Callable[..., tuple[Tensor, Tensor]]

TOME_STEPS = 12  # ToMe merges r tokens in every block of a ViT; r is chosen so that it takes about this many blocks
CONTEXTUAL = 10 / 64  # VisionZip's share of merged tokens: 10 of 64, 20 of 128, 30 of 192 in its tables


def random(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps K random tokens; the draw for an image depends on the seed and its place in the batch."""
    _check(x, keep)
    generator = torch.Generator().manual_seed(seed)
    return _rows(x, ranked(torch.rand(x.shape[:2], generator=generator).to(x.device), keep))


def uniform(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps an even grid over the square of patches: ceil(sqrt(K)) rows, each with its share of the K tokens.

    If N is not a square, the tokens are evenly spaced along the sequence.
    """
    _check(x, keep)
    side = math.isqrt(x.shape[1])
    if side * side != x.shape[1]:
        at = _spread(keep, x.shape[1])  # [K]
    else:
        rows = math.isqrt(keep - 1) + 1  # ceil(sqrt(K)): no row then holds more than `side`
        ends = [(i * keep) // rows for i in range(rows + 1)]
        shares = [_spread(end - begin, side) for begin, end in itertools.pairwise(ends)]
        at = torch.cat([row * side + share for row, share in zip(_spread(rows, side), shares, strict=True)])  # [K]
    return _rows(x, at.to(x.device).expand(x.shape[0], keep))


def norm(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps the K tokens of largest Euclidean norm."""
    _check(x, keep)
    return _rows(x, ranked(x.float().norm(dim=-1), keep))


def fps(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps K tokens by farthest-point sampling in Euclidean distance, from the token of largest norm."""
    _check(x, keep)
    sq = x.float().square().sum(-1)  # [B, N]
    X = x.float()

    def squared_distance(p: Tensor) -> Tensor:  # p [B] -> [B, N]
        at = p[:, None]  # [B, 1]
        dot = torch.bmm(X, X.gather(1, at[..., None].expand(-1, -1, X.shape[-1])).mT).squeeze(-1)  # [B, N]
        return (sq + sq.gather(1, at) - 2 * dot).clamp(min=0)

    return _rows(x, farthest(sq.argmax(-1), keep, squared_distance).sort(-1).values)


def divprune(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): solves the max-min diversity problem greedily, in cosine
    distance: first the token whose nearest other token is farthest, then always the one farthest from those taken.

    Memory: [B, N, N], as in the authors' formulation.
    """
    _check(x, keep)
    X = F.normalize(x.float(), dim=-1)
    distance = 1 - X @ X.mT  # [B, N, N]
    nearest_other = (distance + torch.diag_embed(torch.full_like(distance[:, 0], math.inf))).amin(-1)  # [B, N]
    image = torch.arange(len(x), device=x.device)
    picked = farthest(nearest_other.argmax(-1), keep, lambda p: distance[image, p])
    return _rows(x, picked.sort(-1).values)


def fastv(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764): the K tokens that received most attention, the rest dropped.

    The paper ranks by the attention of a layer of the language model; with the class token's it is the usual
    "CLS attention" baseline.
    """
    _check(x, keep)
    return _rows(x, ranked(_given(attention, x), keep))


def visionzip(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant tokens by attention, and contextual ones: evenly
    spaced among the rest, each the mean of itself and of the remaining tokens that resemble it most (cosine)."""
    _check(x, keep)
    attention = _given(attention, x)
    N = x.shape[1]
    contextual = min(max(round(keep * CONTEXTUAL), 1), keep - 1, N - keep) if keep > 1 else 0
    dominant = ranked(attention, keep - contextual)  # [B, K-C]
    if contextual == 0:
        return _rows(x, dominant)
    rest = _others(dominant, N)  # [B, N-K+C], ascending
    slots = _spread(contextual, rest.shape[1]).to(x.device)  # [C]
    targets = rest[:, slots]  # [B, C]
    X = x.float()
    similarity = F.normalize(_take(X, rest), dim=-1) @ F.normalize(_take(X, targets), dim=-1).mT  # [B, N-K+C, C]
    to = similarity.argmax(-1)  # [B, N-K+C]
    to[:, slots] = torch.arange(contextual, device=x.device)  # a target stays with itself, whatever equals it
    means = _means(_take(X, rest), torch.ones_like(rest, dtype=torch.float32), to, contextual)[0]  # [B, C, D]
    return _ascending(torch.cat([_take(x, dominant), means.to(x.dtype)], 1), torch.cat([dominant, targets], 1))


def tome(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ToMe (Bolya et al., ICLR 2023, arXiv 2210.09461): bipartite soft matching, repeated until K tokens are left."""
    tokens, indices, _ = tome_groups(x, keep)
    return tokens, indices


def tome_groups(x: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Like `tome`, but also returns how many tokens each row is the mean of.

    In a step every other token (at odd places) is a target, each of the remaining tokens is paired with the target it
    resembles most (cosine), and the r strongest pairs become their mean, weighted by size. Rows stay in the order of
    their targets' positions, so that the two sides of a step interleave in the image.

    Returns: tokens [B, K, D], indices [B, K] of the targets, sizes [B, K] float32.
    """
    _check(x, keep)
    B, N, _ = x.shape
    tokens, sizes = x.float(), torch.ones(B, N, device=x.device)
    indices = torch.arange(N, device=x.device).expand(B, N)
    each = math.ceil((N - keep) / TOME_STEPS)
    while (n := tokens.shape[1]) > keep:
        r = min(each, n - keep, n // 2)
        unit = F.normalize(tokens, dim=-1)
        strength, target = (unit[:, 0::2] @ unit[:, 1::2].mT).max(-1)  # [B, ceil(n/2)]: of even rows, among odd rows
        merged = 2 * strength.topk(r).indices  # [B, r] rows that go
        stay = _others(merged, n)  # [B, n-r] ascending
        goal = torch.arange(n, device=x.device).repeat(B, 1)  # [B, n]
        goal.scatter_(1, merged, 2 * target.gather(1, merged // 2) + 1)
        to = torch.searchsorted(stay, goal)  # [B, n]: the row among those that stay
        tokens, sizes = _means(tokens, sizes, to, n - r)
        indices = indices.gather(1, stay)
    return tokens.to(x.dtype), indices, sizes


METHODS: dict[str, Method] = {
    "random": random,
    "uniform": uniform,
    "norm": norm,
    "fps": fps,
    "fastv": fastv,
    "visionzip": visionzip,
    "divprune": divprune,
    "tome": tome,
}
NEED_ATTENTION = ("fastv", "visionzip")


# ---- parts that several methods share


def ranked(score: Tensor, keep: int) -> Tensor:
    """Returns positions [B, keep] of the largest scores [B, N], ties to the lower position, ascending."""
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :keep].sort(-1).values


def farthest(first: Tensor, keep: int, distance: Callable[[Tensor], Tensor]) -> Tensor:
    """Greedy max-min selection: returns positions [B, keep] in the order they are picked, the first ones given as first
    [B].

    distance(p [B]) -> [B, N]. No position is picked twice, even among copies.
    """
    picks = [first]
    nearest = distance(first).clone().scatter_(1, first[:, None], -math.inf)  # [B, N]
    while len(picks) < keep:
        far = nearest.argmax(-1)  # [B]
        picks.append(far)
        nearest = torch.minimum(nearest, distance(far)).scatter_(1, far[:, None], -math.inf)
    return torch.stack(picks, 1)


def _means(x: Tensor, sizes: Tensor, to: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Returns means of x [B, n, D], weighted by sizes [B, n] and grouped by to [B, n]: [B, rows, D], and sizes [B,
    rows]."""
    B, _, D = x.shape
    total = x.new_zeros(B, rows, D).scatter_add_(1, to[..., None].expand_as(x), x * sizes[..., None])
    size = sizes.new_zeros(B, rows).scatter_add_(1, to, sizes)
    return total / size[..., None], size


def _others(indices: Tensor, N: int) -> Tensor:
    """Returns the positions [B, N-K] that are not among indices [B, K], ascending."""
    left = torch.ones(len(indices), N, dtype=torch.bool, device=indices.device).scatter_(1, indices, False)
    return left.nonzero()[:, 1].view(len(indices), N - indices.shape[1])


def _spread(count: int, n: int) -> Tensor:
    """Returns `count` of n places: the middles of equal parts."""
    return (2 * torch.arange(count) + 1) * n // (2 * max(count, 1))


def _take(x: Tensor, indices: Tensor) -> Tensor:
    return x.gather(1, indices[..., None].expand(-1, -1, x.shape[-1]))


def _rows(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return _take(x, indices), indices


def _ascending(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices, order = indices.sort(-1)
    return _take(tokens, order), indices


def _given(attention: Tensor | None, x: Tensor) -> Tensor:
    if attention is None or attention.shape != x.shape[:2]:
        shape = None if attention is None else list(attention.shape)
        raise ValueError(f"attention must be [{x.shape[0]}, {x.shape[1]}], as x has images and tokens, got {shape}")
    return attention.float()


def _check(x: Tensor, keep: int) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, N, D], got {list(x.shape)}")
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"keep={keep} is outside 1..{x.shape[1]}, the tokens of an image")
