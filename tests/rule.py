"""A second implementation of the basis in rounds and the medoid steps, in float64 and with margins.

`reference.s1_rounds` projects tokens; here the whole residual Gram matrix [N, N] is updated, as in a pivoted Cholesky
factorisation. It also returns whether every choice had a margin above rounding; if so, a backend must make the same
choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apet_kernels.reference import U, widen

ROUNDS, POOL, FEW = 4, 2, 16
SLACK = 24 * U  # allowed error of a float32 residual or distance, relative to the squared norms


def basis_in_rounds(x: Tensor, basis: int, start: int = -1, ridge: float = 1e-5) -> tuple[list[int], Tensor, bool]:
    """Returns the picks of x [N, D] in order, resid_sq [N], and whether every choice had a margin above rounding."""
    X, norm_sq, finite, _ = widen(x)
    A = X @ X.T  # [N, N]
    kind = x.unique(dim=0, return_inverse=True)[1].tolist()  # [N] equal numbers: equal tokens
    norm, open_ = norm_sq.tolist(), finite.tolist()
    sure, picks = True, []
    rounds = ROUNDS if basis > FEW else basis

    def slack(a: int, b: int) -> float:
        return SLACK * (norm[a] + norm[b])

    for t in range(rounds):
        size = (t + 1) * basis // rounds - t * basis // rounds
        bound = 4 * max(len(picks), 1) * U
        r = A.diagonal().tolist()
        first = start if t == 0 and start >= 0 and finite[start] else -1
        candidates = [n for n in range(len(r)) if open_[n] and (r[n] > 0 or n == first)]
        candidates.sort(key=lambda n: (n != first, -r[n], n))
        pool = sorted(candidates[: POOL * size] if basis > FEW else candidates)
        least = min((p for p in pool if p != first), key=lambda n: r[n], default=None)
        for n in set(candidates) - set(pool):
            sure &= least is None or r[least] - r[n] > slack(least, n) or kind[least] == kind[n]
        for _ in range(size):
            r = A.diagonal().tolist()
            left = [n for n in pool if open_[n]]
            if not left:
                break
            best = max(left, key=lambda n: r[n])
            best = next(n for n in left if kind[n] == kind[best])
            if first >= 0 and not picks:
                best = first
            else:
                sure &= all(kind[n] == kind[best] or r[n] < r[best] - slack(n, best) for n in left)
                stop = max(0.0, bound * norm[best] - ridge)
                copied = ridge == 0 and kind[best] in {kind[p] for p in picks}  # 0 exactly, and to within rounding
                sure &= copied or abs(r[best] - stop) > SLACK * norm[best]
                if copied or r[best] <= stop:
                    break
            picks.append(best)
            open_[best] = False
            pivot = float(A[best, best] + ridge)
            if pivot > bound * norm[best]:
                A = A - A[:, best, None] * A[None, best] / pivot
    return picks, A.diagonal().clone(), sure


def kept(
    x: Tensor, keep: int, basis: int | None = None, start: int = -1, ridge: float = 1e-5
) -> tuple[list[int], bool]:
    """Returns the kept positions of image x [N, D], ascending, with M = basis (None: keep) in rounds, and whether they
    are certain: every choice had a margin above rounding."""
    M = keep if basis is None else min(basis, keep)
    picks, r, sure = basis_in_rounds(x, M, start, ridge)
    _, norm_sq, finite, _ = widen(x)
    value = r.masked_fill(r <= 4 * M * U * norm_sq, 0).masked_fill(~finite, torch.inf).tolist()
    others = sorted(set(range(len(x))) - set(picks), key=lambda n: (-value[n], n))
    fill, lost = others[: keep - len(picks)], others[keep - len(picks) :]
    if fill and lost and 0 < value[fill[-1]] < torch.inf:
        sure &= value[fill[-1]] - value[lost[0]] > SLACK * float(norm_sq[fill[-1]] + norm_sq[lost[0]])
    return sorted([*picks, *fill]), sure


def medoid_step(x: Tensor, kept: list[int]) -> list[set[int]]:
    """Returns, for each kept token of x [N, D], the positions that may replace it: one, if every choice had a margin
    above rounding."""
    X, norm_sq, finite, _ = widen(x)
    centres = [k for k in kept if finite[k]]
    allowed: list[set[int]] = [{k} for k in kept if not finite[k]]
    if not centres:
        return allowed
    dist_sq = torch.cdist(X, X[centres], compute_mode="donot_use_mm_for_euclid_dist") ** 2  # [N, C]
    near = dist_sq <= dist_sq.amin(1, keepdim=True) + 2 * SLACK * (norm_sq[:, None] + norm_sq[centres])  # [N, C]
    near[centres] = torch.eye(len(centres), dtype=torch.bool)
    near[~finite] = False
    certain = near.sum(1) == 1  # [N]
    for j in range(len(centres)):
        here = near[:, j]
        if not certain[here].all():  # some tokens may belong to another cluster: any member may be the medoid
            allowed.append(set(here.nonzero().view(-1).tolist()))
            continue
        member = here.nonzero().view(-1).tolist()
        if len(member) == 2:  # both have exactly the same distance from their mean
            allowed.append({member[0]})
            continue
        off = ((X[member] - X[member].mean(0)) ** 2).sum(1)
        least = [n for n, o in zip(member, off.tolist(), strict=True) if o <= off.min() + SLACK * norm_sq[member].max()]
        equal = all((x[n] == x[least[0]]).all() for n in least)
        allowed.append({least[0]} if equal else set(least))
    return allowed
