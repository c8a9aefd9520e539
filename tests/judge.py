"""Checks the result of any backend image by image in float64.

Selection is chaotic: one unit in the last place can change a pick and everything after it. So a backend is checked
given its own choices. Each pick must be as good as the best to within rounding; the residuals must be those of its
basis; the kept set must be exactly the one its residuals imply; the tokens must be the means that its kept set implies.
If every choice has a margin above rounding, the choices must also be the reference's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from apet_kernels import reference
from apet_kernels.reference import Tokens, U, widen

PICK = 40 * U  # allowed error of a float32 distance or norm, relative to the squared norms (4 M u at M = 10)
# Allowed error of the difference of two float32 x.t / ||t||, relative to ||x||, if summed in chains (docs/algorithm.md,
# "Rounding"). Tensor cores truncate when they add (Fasi et al., PeerJ CS 330, 2021): they align 8 products and the sum
# to the largest of them, cut each to 25 bits, and the new sum to 24. So a similarity near ||x|| loses half a unit or
# more in each addition. Most of this loss is common to all targets, except if their sums pass a power of 2, and except
# for the bits that each product loses. tests/test_judge.py adds in this way: the bound holds with chains, and would not
# hold with one sum over D.
SIMILARITY = 16 * U
SUBNORMAL = 1e-37  # absolute: below it, squares are outside the float32 range


def bits(t: Tensor) -> Tensor:
    """Returns the same bytes as integers, so that NaN equals NaN and 0 differs from -0."""
    return t.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def assert_same(a: Tensor, b: Tensor, what: str = "result") -> None:
    """Asserts equal dtype, shape and bytes."""
    assert a.dtype == b.dtype, f"{what}: dtypes {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    differ = (bits(a) != bits(b)).nonzero()
    assert not len(differ), f"{what}: {len(differ)} of {a.numel()} elements differ, first at {differ[0].tolist()}"


def reconstruct(image: Tokens, p: Tensor, ridge: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Ridge least squares by Gram-Schmidt on the augmented rows [p; sqrt(ridge) e_k], each orthogonalised twice.

    Returns e_sq [N] with no threshold; resid_sq [N] = ||x||^2 - ||y||^2; and stretch [N] >= 1, the largest a_k^2, by
    which small pivots stretch the bound 4 M u ||x||^2 (docs/algorithm.md, "Rounding").
    """
    X, norm_sq = image.X, image.norm_sq
    m, (N, D) = len(p), X.shape
    Z = torch.cat([X, X.new_zeros(N, m)], 1)  # [N, D + m]
    rows: list[Tensor] = []
    stretch = torch.ones_like(norm_sq)
    for k in range(m):
        v = torch.cat([X[p[k]], ridge**0.5 * torch.eye(m, dtype=X.dtype)[k]])  # [D + m]
        for q in rows * 2:
            v = v - (q @ v) * q
        pivot = v @ v
        if pivot <= tolerance * norm_sq[p[k]]:
            continue
        rows.append(v / pivot.sqrt())
        y = Z @ rows[-1]  # [N]
        Z = Z - y[:, None] * rows[-1]
        stretch = torch.maximum(stretch, norm_sq[p[k]] / pivot * y**2 / norm_sq.clamp_min(1e-300))
    return (Z[:, :D] ** 2).sum(1), (Z**2).sum(1), stretch


def check_basis(x: Tensor, p: Tensor, basis: int, select: str, start: int, ridge: float) -> bool:
    """Replays the picks p [m] of image x [N, D]; True if rounding could not change any pick, or the stop."""
    image = widen(x)
    X, norm_sq, finite, _ = image
    N = len(X)
    assert len(p) <= min(basis, N)
    assert len(set(p.tolist())) == len(p), f"basis tokens picked twice: {p.tolist()}"
    assert finite[p].all(), f"basis tokens of non-finite norm: {p.tolist()}"
    fixed = start >= 0 and bool(finite[start])
    if not fixed and norm_sq.max() == 0:
        assert len(p) == 0, "a basis where every token is zero"
        return True
    assert len(p) > 0, "no basis though a token has a norm"
    sure = True
    dist_sq = torch.full_like(norm_sq, torch.inf)
    for k in range(len(p) + (len(p) < basis)):
        stopped = k == len(p)
        if k == 0:
            value, slack = norm_sq, PICK * norm_sq
        elif select == "fps":
            dist_sq = torch.minimum(dist_sq, ((X - X[p[k - 1]]) ** 2).sum(1))
            value, slack = dist_sq, PICK * (norm_sq + norm_sq[p[:k]].max())
        else:
            _, value, stretch = reconstruct(image, p[:k], ridge, 4 * U)
            slack = max(4 * basis * U, PICK) * norm_sq * stretch
        open_ = finite.index_fill(0, p[:k], False)  # [N] bool
        if k == 0 and fixed:
            assert p[0] == start
            continue
        if not open_.any():
            assert stopped
            continue
        best = int(value.masked_fill(~open_, -1).argmax())
        if stopped:  # no other token may be picked
            limit = 0 if select == "fps" else max(0.0, 4 * U * float(norm_sq[best]) - ridge)
            assert value[best] <= limit + slack[best], f"stopped after {k} picks with {best} at {float(value[best])}"
            sure &= bool(value[best] == 0) or (select == "qr" and bool(value[best] <= limit - slack[best]))
            continue
        c = int(p[k])
        if k > 0 and select == "fps":
            assert value[c] > 0, f"pick {k} repeats a basis token"
        if k > 0 and select == "qr":
            assert value[c] + ridge >= 4 * U * norm_sq[c] - slack[c], f"pick {k} is dependent"
            sure &= bool(value[c] + ridge > 4 * U * norm_sq[c] + slack[c])
        assert value[c] + slack[c] >= value[best] - slack[best], f"pick {k} is {c}, but {best} is farther"
        copies = X.eq(X[c]).all(1)  # [N]
        assert not (copies & open_)[:c].any(), f"pick {k} is {c}, but an earlier token equals it"
        others = open_ & ~copies
        sure &= not bool((value + slack >= value[c] - slack[c])[others].any())
    return sure


def check_residual(x: Tensor, e_sq: Tensor, p: Tensor, basis: int, ridge: float) -> Tensor:
    """Checks |delta e_sq| <= 4 M u ||x||^2 for e_sq [N] float32 of image x [N, D]. Returns the allowed range [2, N].

    Rows whose pivot is within rounding of the dependency threshold may count either way.
    """
    image = widen(x)
    _, norm_sq, finite, _ = image
    zero = 4 * basis * U * norm_sq  # [N], what counts as 0
    low, _, stretch = reconstruct(image, p, ridge, 1e-9 * U)
    high, _, _ = reconstruct(image, p, ridge, 4 * (basis + 1) * U)
    low, high = torch.minimum(low, high), torch.maximum(low, high)
    slack = zero * stretch + SUBNORMAL
    low, high = (low - slack).clamp_min(0), high + slack
    low = low.masked_fill(low <= zero, 0)
    got = e_sq.double()
    assert (got[~finite] == torch.inf).all(), "a token of non-finite norm does not rank highest"
    wrong = finite & ~((got >= low) & (got <= high))
    assert not wrong.any(), _first("squared residual", wrong, got, low, high)
    tiny = finite & (got > 0) & (got < zero * (1 - 1e-4) - SUBNORMAL)
    assert not tiny.any(), "a residual that is rounding is not 0"
    return torch.stack([low, high]).masked_fill(~finite, torch.inf)


def check_kept(x: Tensor, kept: Tensor, range_: Tensor, p: Tensor, keep: int, layout: str, expected: Tensor) -> None:
    """Checks that kept [K] equals the reference's, if the cut is wider than the range [2, N] of every residual."""
    N = x.shape[0]
    ranked = torch.ones(N, dtype=torch.bool)
    if layout == "inplace":
        ranked[p] = False
    inside = torch.zeros(N, dtype=torch.bool)
    inside[kept] = True
    inner, outer = range_[0][ranked & inside], range_[1][ranked & ~inside]
    if not len(inner) or not len(outer) or inner.min() > outer.max():
        assert kept.tolist() == expected.tolist(), "kept set differs from the reference although every margin is wide"


def check_merge(x: Tensor, tokens: Tensor, rows: Tensor, targets: Tensor, skip: Tensor | None = None) -> int:
    """Checks that tokens [R, D] are x [N, D] merged into x[rows], except in `skip` [R]. Returns how many were checked.

    A row is not checked if rounding may move a dropped token into it or out of it. The mean may be off by half a unit
    of the output dtype, and by the roundings of a float32 sum.
    """
    X, norm_sq, finite, _ = widen(x)
    allowed = targets & finite[rows]  # [R]
    dropped = finite.index_fill(0, rows, False)  # [N]
    Xd, T, norm = X[dropped], X[rows], norm_sq[rows].sqrt()  # [n, D], [R, D], [R]
    similarity = (Xd @ T.T / norm.clamp_min(1e-300)).masked_fill(~allowed, -torch.inf)  # [n, R]
    length = norm_sq[dropped].sqrt()[:, None]  # [n, 1]
    member = torch.zeros_like(similarity)  # [n, R]
    unsure = torch.zeros(len(rows), dtype=torch.bool)
    if allowed.any() and len(Xd):
        best = similarity.amax(1, keepdim=True)
        target = (similarity >= best - 1e-12 * length).int().argmax(1)  # [n], the earliest of equals
        member[torch.arange(len(target)), target] = 1
        near = (similarity >= best - 2 * SIMILARITY * length) & (length > 0)  # [n, R]; zero vectors: to the first
        copies = (T[target][:, None] == T[None]).all(-1) if len(rows) * Xd.numel() < 2**24 else torch.zeros_like(near)
        tie = (near & ~copies).index_put((torch.arange(len(target)), target), torch.tensor(False)).any(1)  # [n]
        unsure = near[tie].any(0)
    count = member.sum(0)[:, None]  # [R, 1]
    mean = (T + member.T @ Xd) / (1 + count)
    size = (T.abs() + member.T @ Xd.abs()) / (1 + count)
    info = torch.finfo(tokens.dtype)
    allowance = info.eps / 2 * 1.001 * mean.abs() + (count + 3) * U * size + info.smallest_normal * info.eps
    checked = ~unsure if skip is None else ~unsure & ~skip
    untouched = checked & (count[:, 0] == 0)
    assert_same(tokens[untouched], x[rows[untouched]], "rows that receive nothing")
    wrong = checked & (count[:, 0] > 0) & ~((tokens.double() - mean).abs() <= allowance).all(1)
    assert not wrong.any(), _first("row", wrong, tokens.double(), mean - allowance, mean + allowance)
    return int(checked.sum())


def check(
    backend,
    x: Tensor,
    keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Runs compress and score on x [B, N, D], checks everything, returns (tokens, indices)."""
    choose = {"select": select, "start": start, "ridge": ridge}
    residual, picks = backend.score(x, basis, **choose)
    tokens, indices = backend.compress(x, keep, basis, layout=layout, blend=blend, **choose)
    B, N, D = x.shape
    R = keep + basis * (layout == "append")
    assert residual.shape == (B, N)
    assert residual.dtype == torch.float32
    assert picks.shape == (B, basis)
    assert picks.dtype == torch.int64
    assert tokens.shape == (B, R, D)
    assert tokens.dtype == x.dtype
    assert indices.shape == (B, R)
    assert indices.dtype == torch.int64
    for b in range(B):
        m = int((picks[b] >= 0).sum())
        p = picks[b, :m]
        assert (picks[b, m:] == -1).all(), f"basis not padded with -1: {picks[b].tolist()}"
        sure = check_basis(x[b], p, basis, select, start, ridge)
        range_ = check_residual(x[b], residual[b], p, basis, ridge)
        kept, overwritten = reference.s4_topk(residual[b], p, keep, layout)
        assert indices[b, :keep].tolist() == kept.tolist(), "the kept set is not the one that the residuals imply"
        if sure:
            expected = reference.compress(x[b : b + 1], keep, basis, layout=layout, blend=blend, **choose)[1][0]
            assert p.tolist() == [i for i in reference.score(x[b : b + 1], basis, **choose)[1][0].tolist() if i >= 0]
            check_kept(x[b], kept, range_, p, keep, layout, expected[:keep])
        check_merge(x[b], tokens[b, :keep], kept, ~overwritten, skip=overwritten)
        check_basis_rows(x[b], tokens[b], indices[b], kept, overwritten, p, basis, layout, blend)
    return tokens, indices


def check_basis_rows(
    x: Tensor,
    tokens: Tensor,
    indices: Tensor,
    kept: Tensor,
    overwritten: Tensor,
    p: Tensor,
    basis: int,
    layout: str,
    blend: float,
) -> None:
    """Checks the rows of the basis: the overwritten slots in ascending position, or the rows after the kept ones."""
    if layout == "append":
        rows = (p.tolist() + [int(p[0]) if len(p) else 0] * basis)[:basis]
        assert indices[len(kept) :].tolist() == rows
        assert_same(tokens[len(kept) :], x[rows], "appended basis tokens")
    got, slots = tokens[: len(kept)][overwritten], kept[overwritten]
    a = x[p[: len(slots)]]
    if blend == 1:
        assert_same(got, a, "overwritten slots")
    else:
        mixed = blend * a.double() + (1 - blend) * x[slots].double()
        size = blend * a.double().abs() + (1 - blend) * x[slots].double().abs()
        info = torch.finfo(x.dtype)
        allowance = info.eps / 2 * 1.001 * mixed.abs() + 4 * U * size + info.smallest_normal * info.eps
        finite = widen(x).finite[slots]
        assert ((got.double() - mixed).abs() <= allowance)[finite].all(), "blended slots"


def _first(what: str, wrong: Tensor, got: Tensor, low: Tensor, high: Tensor) -> str:
    n = int(wrong.nonzero()[0])
    if got.dim() == 2:
        d = int(((got[n] < low[n]) | (got[n] > high[n]) | got[n].isnan()).nonzero()[0])
        what, n, got, low, high = f"{what} {n}, channel", d, got[n], low[n], high[n]
    return f"{what} {n}: {float(got[n])!r}, allowed {float(low[n])!r} .. {float(high[n])!r}"
