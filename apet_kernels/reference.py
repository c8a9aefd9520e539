"""The specification of ApET (arXiv 2602.19870): five stages in plain torch, in float64, one image at a time.

    x [N, D] -s1_basis-> p [m] -s2_solve-> W [m, N] -s3_residual-> e_sq [N]
             -s4_topk-> kept [K] -s5_merge-> tokens [K, D]

`s1_rounds` picks a basis as large as K, and returns the residuals with it; `s4_medoids` replaces each kept token by the
medoid of its cluster.

Every backend is compared with this file, so it follows the definitions and is not written for speed: the ridge least
squares is solved by QR, the residual is the norm of a difference, distances are squared differences. docs/algorithm.md
has the glossary of names, derives the one-sweep form of the kernels and lists the decisions made here. The functions
run on any device that has float64, synchronise with it, and do not check arguments: `apet_kernels.ops` does. The four
functions at the end take the arguments of the ops: `basis` and, by name, the other fields of `Options`.

Sizes: B images, N tokens of D features, M basis tokens asked for and m <= M found, K tokens kept, S packed images of T
tokens in all; `u` is the unit roundoff of float32, in which kernels accumulate.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import FEW, POOL, ROUNDS, Options, Select

U = 2.0**-24
FLT_MAX = torch.finfo(torch.float32).max
SLACK = 2.0**-44  # relative difference of float64 sums of equal terms that a BLAS adds in different orders


class Tokens(NamedTuple):
    """One image in float64. A token whose squared norm overflows float32 has a zero row here, and is marked in
    `finite`."""

    X: Tensor  # [N, D] float64
    norm_sq: Tensor  # [N] float64, ||x||^2
    finite: Tensor  # [N] bool
    weight: Tensor  # [N] float64, what the values are multiplied by that tokens are picked and ranked by

    def weighted(self, value: Tensor) -> Tensor:
        """Returns the values [N] times the weights; what float32 cannot hold counts as its largest number."""
        return (self.weight * value.clamp(max=FLT_MAX)).clamp(max=FLT_MAX)


def widen(x: Tensor, weights: Tensor | None = None) -> Tokens:
    """Converts x [N, D] of any float dtype, and the weights [N] of its tokens (None: 1), to Tokens."""
    X = x.double()  # [N, D]
    norm_sq = (X * X).sum(-1)  # [N]
    finite = norm_sq <= FLT_MAX  # [N], false for NaN as well
    weight = torch.ones_like(norm_sq) if weights is None else weights.nan_to_num(0, FLT_MAX, 0).clamp(min=0).double()
    return Tokens(X.masked_fill(~finite[:, None], 0), norm_sq.masked_fill(~finite, 0), finite, weight)


def s1_basis(image: Tokens, basis: int, select: str = "fps", start: int = -1, ridge: float = Options.ridge) -> Tensor:
    """Returns the positions of the basis tokens in the order they are picked: [m] int64, m <= basis.

    The first is token `start`, or, if start=-1 or that token's norm is not finite, the one of largest norm; if that
    norm is 0 there is no basis. Then "fps" picks the token farthest from the basis so far and stops at distance 0; "qr"
    picks the token that the basis so far reconstructs worst, ridge penalty included, and stops when that token would be
    dependent (column-pivoted QR). Ties go to the lower position. Norms, distances and residuals are compared times the
    weights.
    """
    X, norm_sq, finite, _ = image
    if start >= 0 and finite[start]:
        picks = [start]
    else:
        value = image.weighted(norm_sq)  # [N]
        picks = [int(value.argmax())]
        if value[picks[0]] == 0:
            return torch.empty(0, dtype=torch.int64, device=X.device)
    dist_sq = torch.full_like(norm_sq, math.inf)  # [N]
    while len(picks) < basis:
        if select == "fps":
            # ||x - p||^2, in a form that is exactly 0 where x = p
            distance = ((X - X[picks[-1]]) ** 2).sum(-1)  # [N]
            dist_sq = torch.minimum(dist_sq, distance).masked_fill(~finite, 0)  # [N]
            value = image.weighted(dist_sq)  # [N]
            best = int(value.argmax())
            if value[best] == 0:
                break
        else:
            p = torch.tensor(picks, device=X.device)  # [m]
            W = s2_solve(image, p, ridge)  # [m, N]
            resid_sq = ((X - W.T @ X[p]) ** 2).sum(-1) + ridge * (W * W).sum(0)  # [N], = ||x||^2 - ||y||^2
            value = image.weighted(resid_sq).index_fill(0, p, -math.inf).masked_fill(~finite, -math.inf)  # [N]
            best = int((value >= value.max() - SLACK * image.weighted(norm_sq)).int().argmax())
            if value[best] <= 0 or resid_sq[best] + ridge <= 4 * U * norm_sq[best]:
                break
        picks.append(best)
    return torch.tensor(picks, device=X.device)


def s1_rounds(image: Tokens, basis: int, start: int = -1, ridge: float = Options.ridge) -> tuple[Tensor, Tensor]:
    """Picks the basis by column-pivoted QR in rounds. Returns its positions [m] int64, m <= basis, and resid_sq [N]
    float64.

    A round makes a share of the picks from a pool of candidates, `POOL` for each pick: the unpicked tokens of largest
    resid_sq = ||x||^2 - ||y||^2, ties to the lower position. Within the pool it is the pivoted QR of `s1_basis`: each
    pick is the token of largest resid_sq, after all picks before it. A round ends early if that token is dependent:
    pivot = resid_sq + ridge <= 4 m u ||x||^2, m the picks of the rounds before it (at least 1), whose sums round it.
    `start` is the first pick of the first round; if its norm is not finite, it counts as -1. Tokens of non-finite norm,
    and those that the basis reconstructs exactly (zero vectors too), are never picked. resid_sq is compared times the
    weights.
    """
    X, norm_sq, finite, _ = image
    picks: list[int] = []
    Q = X.new_zeros(0, X.shape[1])  # [m, D], the upper part of the Q of QR([S^T; sqrt(ridge) I]), transposed
    resid_sq = norm_sq.clone()  # [N]
    first = start if start >= 0 and bool(finite[start]) else -1
    for t in range(ROUNDS):
        bound = 4 * max(len(picks), 1) * U
        size = (t + 1) * basis // ROUNDS - t * basis // ROUNDS
        value = image.weighted(resid_sq).masked_fill(~finite, -math.inf)  # [N]
        value[picks] = -math.inf
        if t == 0 and first >= 0:
            value[first] = math.inf
        order = value.float().sort(descending=True, stable=True).indices  # [N]
        pool = order[: POOL * size].sort().values  # [P]
        pool = pool[value[pool] > 0]
        for _ in range(min(size, len(pool))):
            least = (value[pool] - SLACK * image.weighted(norm_sq)[pool]).max()
            best = int(pool[(value[pool] >= least).int().argmax()])
            pivot = resid_sq[best] + ridge
            if best != first and (resid_sq[best] <= 0 or pivot <= bound * norm_sq[best]):
                break
            q = X.new_zeros(1, X.shape[1])  # a dependent first pick reduces no residual
            if pivot > bound * norm_sq[best]:
                q = (X[best] - (Q @ X[best]) @ Q) / pivot.sqrt()
            y = X @ q.view(-1)  # [N]
            picks.append(best)
            Q = torch.cat([Q, q.view(1, -1)])
            resid_sq = resid_sq - y**2
            value = image.weighted(resid_sq).masked_fill(~finite, -math.inf)
            value[picks] = -math.inf
    return torch.tensor(picks, dtype=torch.int64, device=X.device), resid_sq


def s2_solve(image: Tokens, p: Tensor, ridge: float = Options.ridge) -> Tensor:
    """Returns W [m, N] float64 that minimises ||x - S^T w||^2 + ridge ||w||^2 for every token x, S = X[p] [m, D].

    With Q R = [S^T; sqrt(ridge) I] the minimum is R w = Q_top^T x. A basis token that the earlier ones reconstruct to
    within rounding (pivot = ||p||^2 + ridge - ||Q_top^T p||^2 <= 4u ||p||^2) is dependent: its row of W is 0.
    """
    X, norm_sq = image.X, image.norm_sq
    S = X[p]  # [m, D]
    rows: list[int] = []  # the independent rows of S, r of them
    for k in range(len(S)):
        y = _qr(S[rows], ridge)[0].T @ S[k]  # [r]
        if norm_sq[p[k]] + ridge - y @ y > 4 * U * norm_sq[p[k]]:
            rows.append(k)
    Q, R = _qr(S[rows], ridge)  # [D, r], [r, r]
    W = X.new_zeros(len(S), len(X))  # [m, N]
    W[rows] = torch.linalg.solve_triangular(R, Q.T @ X.T, upper=True)  # [r, N]
    return W


def _qr(S: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Returns, for S [r, D], the upper D rows of Q [D, r], and R [r, r], of QR([S^T; sqrt(ridge) I])."""
    eye = torch.eye(len(S), dtype=S.dtype, device=S.device)
    Q, R = torch.linalg.qr(torch.cat([S.T, math.sqrt(ridge) * eye]))  # [D + r, r], [r, r]
    return Q[: S.shape[1]], R


def s3_residual(image: Tokens, p: Tensor, W: Tensor, basis: int) -> Tensor:
    """Returns e_sq [N] float64 = ||x - S^T w||^2; 0 if it is within rounding of 0, +inf if the norm is not finite.

    `basis` is the M of the call, not the m found: the bound 4 M u ||x||^2 belongs to the problem, not to the data.
    """
    return _above_rounding(image, ((image.X - W.T @ image.X[p]) ** 2).sum(-1), basis)


def _above_rounding(image: Tokens, e_sq: Tensor, basis: int) -> Tensor:
    """Returns e_sq [N] times the weights; 0 where float32 cannot distinguish e_sq from 0, +inf where the norm is not
    finite."""
    zero = e_sq <= 4 * basis * U * image.norm_sq  # [N]
    return image.weighted(e_sq.masked_fill(zero, 0)).masked_fill(~image.finite, math.inf)


def s4_topk(e_sq: Tensor, p: Tensor, keep: int, layout: str = "inplace") -> tuple[Tensor, Tensor]:
    """Chooses the tokens that stay: kept [K] int64, ascending, and overwritten [K] bool, the rows that basis tokens
    overwrite.

    Order: largest float32 e_sq first, ties to the lower position. "inplace" keeps the basis (the first K picks if they
    do not all fit) and then the first of the others; "overwrite" and "append" keep the first of all tokens, and with
    "overwrite" the last m of these are overwritten. keep = N keeps every token as it is.
    """
    order = e_sq.float().sort(descending=True, stable=True).indices  # [N]
    if layout == "inplace":
        order = torch.cat([p, order[~torch.isin(order, p)]])  # [N]
    kept = order[:keep].sort().values  # [K]
    overwritten = len(p) if layout == "overwrite" and keep < len(order) else 0
    return kept, torch.isin(kept, order[max(keep - overwritten, 0) : keep])


def s4_medoids(image: Tokens, kept: Tensor, steps: int) -> Tensor:
    """Returns the kept tokens [K] int64 after `steps` medoid steps (k-medoids), ascending; so must be `kept`.

    A step assigns each token to the nearest kept token (Euclidean, ties to the lower position; a kept token to itself),
    and replaces every kept token by the token of its cluster that is nearest to the mean of the cluster. Tokens of
    non-finite norm are in no cluster, and stay if they are kept.
    """
    X, norm_sq, finite, _ = image
    for _ in range(steps if len(kept) < len(X) else 0):
        centres = kept[finite[kept]]  # [C]
        if len(centres) == 0:
            return kept
        dist_sq = torch.stack([((X - X[c]) ** 2).sum(-1) for c in centres], 1)  # [N, C]
        slack = SLACK * (norm_sq[:, None] + norm_sq[centres])  # [N, C]
        cluster = (dist_sq <= (dist_sq + slack).amin(1, keepdim=True)).int().argmax(1)  # [N]
        cluster[centres] = torch.arange(len(centres), device=X.device)
        medoids = []
        for j in range(len(centres)):
            member = ((cluster == j) & finite).nonzero().view(-1)  # [C_j], ascending
            off = ((X[member] - X[member].mean(0)) ** 2).sum(-1)  # [C_j]
            medoids.append(member[(off <= (off + SLACK * norm_sq[member]).min()).int().argmax()])
        kept = torch.cat([torch.stack(medoids), kept[~finite[kept]]]).sort().values
    return kept


def s5_merge(x: Tensor, image: Tokens, rows: Tensor, targets: Tensor) -> Tensor:
    """Returns tokens [R, D] in x's dtype: x[rows], each averaged with the tokens not in `rows` that are merged into it.

    A token is merged into the row of largest cosine similarity among those whose `targets` [R] flag is set, ties to the
    earlier row; similarity with a zero vector is 0. Tokens of non-finite norm are neither merged nor targets. A row
    without merged tokens is copied bit for bit.
    """
    X, norm_sq, finite, _ = image
    allowed = targets & finite[rows]  # [R]
    dropped = finite.index_fill(0, rows, False)  # [N] bool, true for n
    if not allowed.any() or not dropped.any():
        return x[rows]
    Xd, T = X[dropped], X[rows]  # [n, D], [R, D]
    norm = norm_sq[rows].sqrt()  # [R]
    similarity = torch.where(norm > 0, Xd @ T.T / norm, 0).masked_fill(~allowed, -math.inf)  # [n, R], times ||x||
    best = similarity.amax(-1, keepdim=True) - SLACK * norm_sq[dropped].sqrt()[:, None]  # [n, 1]
    target = (similarity >= best).int().argmax(-1)  # [n]
    member = torch.nn.functional.one_hot(target, len(rows)).double()  # [n, R]
    count = member.sum(0)[:, None]  # [R, 1]
    mean = (T + member.T @ Xd) / (1 + count)  # [R, D]
    return torch.where(count > 0, mean.to(x.dtype), x[rows])


def _score(image: Tokens, options: Options, keep: int = 0) -> tuple[Tensor, Tensor]:
    """Runs s1 to s3 on one image: e_sq [N] float64, p [m]. `keep` determines M if the basis is picked in rounds.

    With a basis that is picked in rounds, e_sq is resid_sq, the value by which its tokens were picked. The residual
    would be resid_sq - ridge w_sq, which differs only if the ridge is large.
    """
    basis = options.basis_of(keep)
    if options.in_rounds and basis > FEW:
        p, resid_sq = s1_rounds(image, basis, options.start, options.ridge)
        return _above_rounding(image, resid_sq, basis), p
    p = s1_basis(image, basis, options.select, options.start, options.ridge)
    return s3_residual(image, p, s2_solve(image, p, options.ridge), basis), p


def _compress(x: Tensor, keep: int, options: Options, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compresses one image x [N, D] with weights [N] to tokens [R, D] in x's dtype, indices [R]; R = keep, or keep +
    basis with "append"."""
    layout, blend = options.layout, options.blend
    image = widen(x, weights)
    if keep == 0 and options.in_rounds:  # ragged: no rows, and no basis either
        return x[:0], torch.empty(0, dtype=torch.int64, device=x.device)
    e_sq, p = _score(image, options, keep)  # [N], [m]
    kept, overwritten = s4_topk(e_sq, p, keep, layout)  # [K], [K]
    kept = s4_medoids(image, kept, options.refine)  # [K]
    tokens = s5_merge(x, image, kept, ~overwritten)  # [K, D]
    if layout == "overwrite":
        below = kept[overwritten]  # [min(m, K)]
        p = p[: len(below)]  # [min(m, K)]
        blended = blend * x[p].double() + (1 - blend) * x[below].double()  # [min(m, K), D]
        tokens[overwritten] = x[p] if blend == 1 else blended.to(x.dtype)
    if layout == "append":
        fill = p[:1] if len(p) else p.new_zeros(1)
        rows = torch.cat([p, fill.expand(options.rows(0) - len(p))])  # [M]
        return torch.cat([tokens, x[rows]]), torch.cat([kept, rows])
    return tokens, kept


@torch.no_grad()
def score(
    x: Tensor,
    basis: int = 10,
    *,
    select: Select = "fps",
    out_dtype: torch.dtype = torch.float32,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Runs s1 to s3 on x [B, N, D]: squared residuals [B, N] in out_dtype, basis positions [B, M] int64 padded with
    -1."""
    chosen = Options(basis, select=select, **options)
    B, N, _ = x.shape
    residual = x.new_empty(B, N, dtype=out_dtype)
    picks = torch.full((B, basis), -1, dtype=torch.int64, device=x.device)
    for b in range(B):
        residual[b], p = _score(widen(x[b]), chosen)
        picks[b, : len(p)] = p
    return residual, picks


@torch.no_grad()
def merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None, out_dtype: torch.dtype | None = None) -> Tensor:
    """Runs s5 on x [B, N, D] for given rows: indices [B, K] int64, targets [B, K] bool (None: all) -> tokens [B, K, D].

    Indices may come in any order and repeat (then tokens are merged into the earliest row); they are clamped into [0,
    N).
    """
    x = x.to(out_dtype or x.dtype)
    tokens = x.new_empty(*indices.shape, x.shape[-1])
    flags = torch.ones_like(indices, dtype=torch.bool) if targets is None else targets
    for b, rows in enumerate(indices.clamp(0, x.shape[1] - 1)):
        tokens[b] = s5_merge(x[b], widen(x[b]), rows, flags[b])
    return tokens


@torch.no_grad()
def compress(
    x: Tensor,
    keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compresses x [B, N, D] to tokens [B, R, D] in x's dtype (or out_dtype) and their positions [B, R] int64.

    R = keep, or keep + basis if layout="append". Everything is computed in float64 and rounded once at the end.

    Example:
        >>> import torch
        >>> x = torch.randn(2, 576, 64)
        >>> exact, indices = apet_kernels.reference.compress(x, keep=64, out_dtype=torch.float64)
        >>> exact.dtype, indices.shape
        (torch.float64, torch.Size([2, 64]))
    """
    chosen = Options(basis, **options)
    x = x.to(out_dtype or x.dtype)
    B, _, D = x.shape
    R = chosen.rows(keep)
    tokens, indices = x.new_empty(B, R, D), torch.empty(B, R, dtype=torch.int64, device=x.device)
    for b in range(B):
        tokens[b], indices[b] = _compress(x[b], keep, chosen, None if weights is None else weights[b])
    return tokens, indices


@torch.no_grad()
def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Compresses ragged images in x [T, D]: image s is x[cu_seqlens[s]:cu_seqlens[s+1]], keeps cu_keep[s+1] -
    cu_keep[s].

    Both cu tensors are [S+1] int32. Returns tokens [R, D] and positions in x [R] int64, R = total_keep (append: + S *
    basis), image after image. All values of the cu tensors are clamped; so are lengths to max_seqlen and max_keep, the
    bounds by which kernels size their work. Rows that no image fills hold zeros and index 0.
    """
    chosen = Options(basis, **options)
    x = x.to(out_dtype or x.dtype)
    S, appended = len(cu_seqlens) - 1, chosen.rows(0)
    tokens = x.new_zeros(chosen.rows(total_keep, images=S), x.shape[1])
    indices = torch.zeros(len(tokens), dtype=torch.int64, device=x.device)
    bounds = cu_seqlens.clamp(0, len(x)).tolist()
    slots = cu_keep.clamp(0, total_keep).tolist()
    for s in range(S):
        n = min(max(bounds[s + 1] - bounds[s], 0), max_seqlen)
        keep = min(max(slots[s + 1] - slots[s], 0), n, max_keep)
        if n == 0:
            continue
        image = x[bounds[s] : bounds[s] + n]  # [n, D]
        rows = slice(slots[s] + s * appended, slots[s] + s * appended + keep + appended)
        of_image = None if weights is None else weights[bounds[s] : bounds[s] + n]  # [n]
        tokens[rows], at = _compress(image, keep, replace(chosen, start=min(chosen.start, n - 1)), of_image)
        indices[rows] = at + bounds[s]
    return tokens, indices
