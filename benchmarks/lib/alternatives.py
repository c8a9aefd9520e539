"""Other methods for the same task, N visual tokens to K: our own short implementations, from their papers.

All take (x [B, N, D], keep, *, attention=None, seed=0) and return (tokens [B, keep, D] in x's dtype, indices [B, keep]
int64, ascending): the source of each row; for merged tokens the one that they are merged into. attention [B, N] is what
each token received from the class or text tokens; methods that do not need it ignore it, and all but `random` ignore
the seed. `cdpruner` also takes the tokens' relevance to a question. They run on the device of x and compute in float32,
those that pick by pivots in float64. Methods that compare keys of an attention layer get the tokens instead, since
there are no keys here. Invalid arguments raise a ValueError that names the value.

Studies also use `tome_groups`, and the parts in selection.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib import selection
from benchmarks.lib.selection import farthest, others, ranked, spaced, take

Method = Callable[..., tuple[Tensor, Tensor]]

TOME_STEPS = 12  # ToMe merges r tokens in every block of a ViT; r is chosen so that it takes about this many blocks
CONTEXTUAL = 10 / 64  # VisionZip's share of merged tokens: 10 of 64, 20 of 128, 30 of 192 in its tables
RANK = 4  # LRCP's subspace for LLaVA; 8 for Qwen


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
        at = spaced(keep, x.shape[1])  # [K]
    else:
        rows = math.isqrt(keep - 1) + 1  # ceil(sqrt(K)): no row then holds more than `side`
        ends = [(i * keep) // rows for i in range(rows + 1)]
        shares = [spaced(end - begin, side) for begin, end in itertools.pairwise(ends)]
        at = torch.cat([row * side + share for row, share in zip(spaced(rows, side), shares, strict=True)])  # [K]
    return _rows(x, at.to(x.device).expand(x.shape[0], keep))


def norm(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps the K tokens of largest Euclidean norm."""
    _check(x, keep)
    return _rows(x, ranked(x.float().norm(dim=-1), keep))


def fps(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keeps K tokens by farthest-point sampling in Euclidean distance, from the token of largest norm."""
    _check(x, keep)
    norm_sq = x.float().square().sum(-1)  # [B, N]
    X = x.float()

    def squared_distance(p: Tensor) -> Tensor:  # p [B] -> [B, N]
        at = p[:, None]  # [B, 1]
        dot = torch.bmm(X, X.gather(1, at[..., None].expand(-1, -1, X.shape[-1])).mT).squeeze(-1)  # [B, N]
        return (norm_sq + norm_sq.gather(1, at) - 2 * dot).clamp(min=0)

    return _rows(x, farthest(norm_sq.argmax(-1), keep, squared_distance).sort(-1).values)


def divprune(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """DivPrune (Alvar et al., CVPR 2025, arXiv 2503.02175): solves the max-min diversity problem greedily, in cosine
    distance: first the token whose nearest other token is farthest, then always the one farthest from those taken.

    Memory: [B, N, N], as in the authors' formulation.
    """
    _check(x, keep)
    return _diverse(x, x.float(), keep, 1.0)


def cen_prune(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cen-Prune (Wen et al., arXiv 2608.30263) on DivPrune: picks by cosine distance between tokens less their mean,
    times a weight, the negated mean cosine of a token with the others as it was, scaled to 0..1.

    Simplified: the first pick is the one of DivPrune, times the weight as well; how the authors start was not found.
    Memory: [B, N, N].
    """
    _check(x, keep)
    X = x.float()
    # The mean over the others is an increasing function of the mean over all, which the scaling makes equal.
    weight = selection.unit_range(-selection.mean_cosine(X))  # [B, N]
    return _diverse(x, X - X.mean(1, keepdim=True), keep, weight)


def lrcp(
    x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0, rank: int = RANK
) -> tuple[Tensor, Tensor]:
    """LRCP (Lu et al., arXiv 2605.15621): the K tokens farthest from the subspace of the first `rank` principal
    components; the others are merged into the kept ones that they resemble most (cosine), as in ApET.

    Simplified: one stage, at the encoder; the authors prune again inside of the language model.
    """
    _check(x, keep)
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    X = x.float() - x.float().mean(1, keepdim=True)
    directions = torch.linalg.svd(X, full_matrices=False).Vh[:, :rank]  # [B, r, D]
    residual = X - X @ directions.mT @ directions  # [B, N, D]
    kept = ranked(residual.square().sum(-1), keep)
    return selection.merge(x, kept), kept


def spare(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """SPARE (Lee et al., arXiv 2606.18681): column subset selection, always the token that those before it rebuild
    worst by least squares: QR with column pivoting, as select="qr" with a basis of K, one at a time and without ridge.

    Simplified: without the paper's second criterion, which prefers tokens of low relevance to the question
    ("anti-relevance"); how it enters was not found. Memory: [B, N, N].
    """
    _check(x, keep)
    X = x.double()
    return _rows(x, selection.pivots(X @ X.mT, keep).picks.sort(-1).values)


def fastv(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """FastV (Chen et al., ECCV 2024, arXiv 2403.06764): the K tokens that received most attention, the rest dropped.

    The paper ranks by the attention of a layer of the language model; with the class token's it is the usual
    "CLS attention" baseline.
    """
    _check(x, keep)
    return _rows(x, ranked(given("attention", attention, x), keep))


def visionzip(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """VisionZip (Yang et al., CVPR 2025, arXiv 2412.04467): dominant tokens by attention, and contextual ones: evenly
    spaced among the rest, each the mean of itself and of the remaining tokens that resemble it most (cosine)."""
    _check(x, keep)
    attention = given("attention", attention, x)
    N = x.shape[1]
    contextual = min(max(round(keep * CONTEXTUAL), 1), keep - 1, N - keep) if keep > 1 else 0
    dominant = ranked(attention, keep - contextual)  # [B, K-C]
    if contextual == 0:
        return _rows(x, dominant)
    remaining = others(dominant, N)  # [B, N-K+C], ascending
    slots = spaced(contextual, remaining.shape[1]).to(x.device)  # [C]
    targets = remaining[:, slots]  # [B, C]
    X = x.float()
    similarity = F.normalize(take(X, remaining), dim=-1) @ F.normalize(take(X, targets), dim=-1).mT  # [B, N-K+C, C]
    target = similarity.argmax(-1)  # [B, N-K+C]
    target[:, slots] = torch.arange(contextual, device=x.device)  # a target stays with itself, whatever equals it
    sizes = torch.ones_like(remaining, dtype=torch.float32)  # [B, N-K+C]
    means = selection.means(take(X, remaining), sizes, target, contextual)[0]  # [B, C, D]
    return _ascending(torch.cat([take(x, dominant), means.to(x.dtype)], 1), torch.cat([dominant, targets], 1))


def scope(x: Tensor, keep: int, *, attention: Tensor | None = None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """SCOPE (Deng et al., NeurIPS 2025, arXiv 2510.24214): always the token that adds most coverage times its attention
    from the class token; the coverage of a token is its largest cosine with a kept one, at least 0.

    Simplified: the exponent of the attention is 1, the authors' default. Memory: [B, N, N].
    """
    _check(x, keep)
    unit = F.normalize(x.float(), dim=-1)
    return _rows(x, selection.covering(unit @ unit.mT, keep, given("attention", attention, x)).sort(-1).values)


def cdpruner(
    x: Tensor, keep: int, *, attention: Tensor | None = None, relevance: Tensor | None = None, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """CDPruner (Zhang et al., NeurIPS 2025, arXiv 2506.10967): greedy MAP inference of a determinantal point process
    whose kernel is the cosine of two tokens times the relevance of both to the question, scaled to 0..1 in an image.

    Simplified: the authors take the relevance from CLIP's text encoder, and in their code negate it for LLaVA; here
    the caller brings relevance [B, N], larger for what should be kept. They compare projected tokens. Memory: [B, N,
    N].
    """
    _check(x, keep)
    weight = selection.unit_range(given("relevance", relevance, x))[..., None].double()  # [B, N, 1]
    X = F.normalize(x.double(), dim=-1) * weight
    return _rows(x, selection.pivots(X @ X.mT, keep).picks.sort(-1).values)


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
        stay = others(merged, n)  # [B, n-r] ascending
        goal = torch.arange(n, device=x.device).repeat(B, 1)  # [B, n]
        goal.scatter_(1, merged, 2 * target.gather(1, merged // 2) + 1)
        row = torch.searchsorted(stay, goal)  # [B, n]: the row among those that stay
        tokens, sizes = selection.means(tokens, sizes, row, n - r)
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
    "scope": scope,
    "cen-prune": cen_prune,
    "cdpruner": cdpruner,
    "lrcp": lrcp,
    "spare": spare,
}
NEED_ATTENTION = ("fastv", "visionzip", "scope")
NEED_RELEVANCE = ("cdpruner",)
MERGING = ("visionzip", "tome", "lrcp")  # the rows of the others are tokens as they were
# What benchmarks/kept.py times and benchmarks/quality compares. The others are in benchmarks/vlm only.
EARLIER = ("random", "uniform", "norm", "fps", "fastv", "visionzip", "divprune", "tome")


def _diverse(x: Tensor, features: Tensor, keep: int, weight: Tensor | float) -> tuple[Tensor, Tensor]:
    """Keeps tokens of x by greedy max-min selection in cosine distance of features [B, N, D], from the token whose
    nearest other is farthest, distances times the weight [B, N]."""
    unit = F.normalize(features, dim=-1)
    distance = 1 - unit @ unit.mT  # [B, N, N]
    nearest_other = (distance + torch.diag_embed(torch.full_like(distance[:, 0], torch.inf))).amin(-1)  # [B, N]
    image = torch.arange(len(x), device=x.device)
    picked = farthest((weight * nearest_other).argmax(-1), keep, lambda p: distance[image, p], weight)
    return _rows(x, picked.sort(-1).values)


def _rows(x: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    return take(x, indices), indices


def _ascending(tokens: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    indices, order = indices.sort(-1)
    return take(tokens, order), indices


def given(name: str, value: Tensor | None, x: Tensor) -> Tensor:
    """Returns the value. Raises: ValueError, with its name, if it is not there or not [B, N] for x [B, N, D]."""
    if value is None or value.shape != x.shape[:2]:
        shape = None if value is None else list(value.shape)
        raise ValueError(f"{name} must be [{x.shape[0]}, {x.shape[1]}], as x has images and tokens, got {shape}")
    return value.float()


def _check(x: Tensor, keep: int) -> None:
    if x.dim() != 3:
        raise ValueError(f"x must be [B, N, D], got {list(x.shape)}")
    if not 1 <= keep <= x.shape[1]:
        raise ValueError(f"keep={keep} is outside 1..{x.shape[1]}, the tokens of an image")
