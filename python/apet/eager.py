"""The published formulation of ApET in eager torch: what `apet compress` is timed against.

Its shape is kept on purpose (one image at a time, a Python loop, a solve, cosine similarity by broadcast); see
arXiv 2602.19870. Only the start is not: the authors' is random, here it is the token of largest norm, so that both
sides pick the same basis.
"""

from __future__ import annotations

import torch


def s1_basis(x: torch.Tensor, basis: int) -> torch.Tensor:
    """Farthest-point sampling. x: [N, D]. Returns: positions [M]."""
    picked = [int(x.norm(dim=-1).argmax())]
    nearest = torch.full((len(x),), float("inf"))  # [N] squared distance to the basis so far
    for _ in range(min(basis, len(x)) - 1):
        nearest = torch.minimum(nearest, (x - x[picked[-1]]).square().sum(-1))
        picked.append(int(nearest.argmax()))
    return torch.tensor(picked)


def compress(x: torch.Tensor, keep: int, basis: int = 10, ridge: float = 1e-5) -> tuple[torch.Tensor, torch.Tensor]:
    """The authors' released rule (`layout="overwrite"`) on one image.

    x: [N, D] float32, basis < keep < N. Returns: tokens [K, D], positions [K], ascending.
    Memory: [N-K, K-M, D] for the similarities.
    """
    chosen = s1_basis(x, basis)  # [M]
    s = x[chosen]  # [M, D]
    w = torch.linalg.solve(s @ s.T + ridge * torch.eye(len(s)), s @ x.T)  # [M, N]
    residual = (x - w.T @ s).norm(dim=-1)  # [N]
    ranked = residual.topk(keep).indices  # [K] descending
    targets = ranked[: keep - len(s)].sort().values  # [K-M]
    slots = ranked[keep - len(s) :].sort().values  # [M]: the lowest ranked give way to the basis
    dropped = torch.ones(len(x), dtype=torch.bool).index_fill_(0, ranked, False).nonzero()[:, 0]  # [N-K]
    cosine = torch.cosine_similarity(x[dropped][:, None], x[targets][None], dim=-1)  # [N-K, K-M]
    goal = cosine.argmax(-1)  # [N-K]
    total = x[targets].index_add(0, goal, x[dropped])  # [K-M, D]
    count = torch.ones(len(targets)).index_add_(0, goal, torch.ones(len(dropped)))  # [K-M]
    out = x.clone()  # [N, D]
    out[targets], out[slots] = total / count[:, None], s
    kept = ranked.sort().values  # [K]
    return out[kept], kept
