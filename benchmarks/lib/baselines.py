"""The baselines of the kernels: ApET (arXiv 2602.19870) in torch, in three forms. They run on the device of x.

`published` is the published formulation, `eager` is batched torch as an experienced engineer would write it, and
`tuned` is the fastest form found. All take x [B, N, D] and return tokens [B, K, D] in x's dtype and indices [B, K], as
`torch.ops.apet.compress` does. Unlike the op, they do not handle repeated tokens (a singular system), zeros, values
that are not finite, or strides.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

U = 2.0**-24
Compress = Callable[..., tuple[Tensor, Tensor]]


def published(x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The published formulation, layout="overwrite" only: step-by-step FPS, an explicit reconstruction, and the cosine
    similarity broadcast to [N-K, K-M, D]; one image after another.

    Two changes keep its results comparable: distances and the sums of merged tokens are float32, not x's dtype. The
    broadcast stays in x's dtype, which is faster, but rounds the similarity in 16 bits.
    """
    if layout != "overwrite":
        raise ValueError(f'the published code has layout="overwrite", not {layout!r}')
    tokens, indices = zip(*(_published_image(image, keep, basis, start, ridge) for image in x), strict=True)
    return torch.stack(tokens), torch.stack(indices)


def published_bytes(N: int, D: int, keep: int, basis: int, itemsize: int) -> int:
    """Returns the bytes that cosine_similarity holds at once: both sides normalised and expanded, and their product."""
    return 3 * (N - keep) * (keep - basis) * D * itemsize


def _published_image(x: Tensor, keep: int, basis: int, start: int, ridge: float) -> tuple[Tensor, Tensor]:
    X = x.float()  # [N, D]
    dist_sq = X.new_full((len(X),), math.inf)  # [N]
    picks = [start]
    while len(picks) < basis:
        dist_sq = torch.minimum(dist_sq, (X - X[picks[-1]]).square().sum(-1))  # [N]
        picks.append(int(dist_sq.argmax()))
    S = X[picks]  # [M, D]
    W = torch.linalg.solve(S @ S.T + ridge * torch.eye(basis, device=x.device), S @ X.T)  # [M, N]
    residual = (X - W.T @ S).norm(dim=-1)  # [N]

    top = residual.topk(keep).indices  # [K], descending
    kept = top.sort().values  # [K]
    targets, lost = top[: keep - basis].sort().values, top[keep - basis :].sort().values  # [K-M], [M]
    dropped = torch.ones_like(residual, dtype=torch.bool).index_fill_(0, kept, False)  # [N]
    similarity = F.cosine_similarity(x[dropped][:, None], x[targets][None], dim=-1)  # [N-K, K-M]
    target = similarity.argmax(-1)  # [N-K]

    total = X[targets].index_add_(0, target, X[dropped])  # [K-M, D]
    count = 1 + target.bincount(minlength=keep - basis)  # [K-M]
    tokens = x.new_empty(keep, x.shape[1])
    tokens[torch.searchsorted(kept, targets)] = (total / count[:, None]).to(x.dtype)
    tokens[torch.searchsorted(kept, lost)] = x[picks]
    return tokens, kept


def eager(x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float) -> tuple[Tensor, Tensor]:
    """ApET as an experienced engineer would write it: batched, in float32, with a matrix product for every heavy step,
    and no array of size N x K x D.

    (For 16-bit tokens the products are float32 too: 16-bit products would round the similarity, and a tenth to half of
    the merged rows would differ.)
    """
    B, N, D = x.shape
    T = keep - basis if layout == "overwrite" else keep
    X = x.float()  # [B, N, D]
    norm_sq = X.square().sum(-1)  # [B, N]
    image = torch.arange(B, device=x.device)[:, None]  # [B, 1]
    far = torch.full_like(image, start) if start >= 0 else norm_sq.argmax(-1, keepdim=True)  # [B, 1]
    dist_sq = torch.full_like(norm_sq, math.inf)  # [B, N]
    picks = [far]
    for _ in range(basis - 1):
        dot = torch.bmm(X, X[image, far].mT).squeeze(-1)  # [B, N]
        dist_sq = torch.minimum(dist_sq, norm_sq + norm_sq[image, far] - 2 * dot)  # [B, N]
        far = dist_sq.argmax(-1, keepdim=True)
        picks.append(far)
    p = torch.cat(picks, 1)  # [B, M]
    S = X[image, p]  # [B, M, D]
    L = torch.linalg.cholesky_ex(S @ S.mT + ridge * torch.eye(basis, device=x.device)).L  # [B, M, M]
    W = torch.cholesky_solve(S @ X.mT, L)  # [B, M, N]
    e_sq = (X - W.mT @ S).square().sum(-1)  # [B, N]
    e_sq = torch.where(e_sq > 4 * basis * U * norm_sq, e_sq, 0.0)
    if layout == "inplace":
        e_sq = e_sq.scatter(1, p, math.inf)

    top = e_sq.topk(keep).indices  # [B, K], descending
    kept = top.sort(1).values  # [B, K]
    targets = top[:, :T].sort(1).values  # [B, T]
    dropped = torch.ones_like(norm_sq, dtype=torch.int64).scatter(1, kept, 0).topk(N - keep).indices  # [B, N-K]
    x_t, x_d = X[image, targets], X[image, dropped]  # [B, T, D], [B, N-K, D]
    similarity = x_d @ F.normalize(x_t, dim=-1).mT  # [B, N-K, T]; the length of x_d changes no arg-max
    target = similarity.argmax(-1) + image * T  # [B, N-K]
    total = x_t.flatten(0, 1).index_add(0, target.flatten(), x_d.flatten(0, 1))  # [B*T, D]
    count = total.new_ones(B * T).index_add(0, target.flatten(), total.new_ones(B * (N - keep)))  # [B*T]
    means = (total / count[:, None]).view(B, T, D).to(x.dtype)
    if layout == "inplace":
        return means, kept
    tokens = x.new_empty(B, keep, D)
    tokens[image, torch.searchsorted(kept, targets)] = means
    tokens[image, torch.searchsorted(kept, top[:, T:].sort(1).values)] = x[image, p]
    return tokens, kept


def compiled() -> Compress:
    """Returns `eager` under torch.compile, for one shape: it is compiled at the first call and recompiled for no
    other."""
    torch.compiler.reset()
    return torch.compile(eager, dynamic=False, fullgraph=True)


def tuned(x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float) -> tuple[Tensor, Tensor]:
    """The fastest eager torch found: products are reused, means are computed by embedding_bag. On a CPU it multiplies
    halves on two threads, and lets oneDNN multiply float32 as bfloat16 if that is exact. On a GPU it multiplies 16-bit
    tokens without conversion, into float32 (not tuned there: it was written without a GPU)."""
    return _two_steps(_s1_to_s4, _s5_merge, x, keep, basis, layout, start, ridge)


def tuned_compiled() -> Compress:
    """Returns `tuned` under torch.compile, for one shape."""
    rank, merge = (torch.compile(step, dynamic=False, fullgraph=True) for step in (_s1_to_s4, _s5_merge))

    def compress(x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float) -> tuple[Tensor, Tensor]:
        return _two_steps(rank, merge, x, keep, basis, layout, start, ridge)

    return compress


def _two_steps(
    rank: Callable, merge: Callable, x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float
) -> tuple[Tensor, Tensor]:
    X, norm_sq, order, p = rank(x, keep, basis, layout, start, ridge)
    with _bfloat16_products(x.dtype is torch.bfloat16):
        return merge(X, norm_sq, order, p, keep, layout, x.dtype)


@contextlib.contextmanager
def _bfloat16_products(on: bool) -> Iterator[None]:
    """Lets oneDNN multiply float32 matrices as bfloat16, summing in float32: exact if they hold bfloat16 values.

    A product of bfloat16 tensors is faster still, but its result is rounded to bfloat16: 10 to 50 % of the merged rows
    then differ. This pays only for the similarity; the matrix-vector products of s1 are faster as float32.
    """
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    if on:
        matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _s1_to_s4(
    x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns X [B, N, D] (on a CPU float32), ||x||^2 [B, N], tokens by rank [B, N] and basis p [B, M].

    One product per basis token gives its distances, and is stored as the right-hand side of the solve. It is made as
    [B*G, 1, D] x [B*G, D, N/G]: on a CPU a single matrix-vector product runs on one thread, two halves run on two.
    """
    B, N, D = x.shape
    X = x if x.is_cuda else x.float()  # [B, N, D]
    G = math.gcd(N, 2) if B == 1 and not x.is_cuda else 1
    halves = X.view(B * G, N // G, D).mT  # [B*G, D, N/G]
    image = torch.arange(B, device=x.device)[:, None]  # [B, 1]
    norm_sq = torch.linalg.vector_norm(X, dim=-1, dtype=torch.float32).square()  # [B, N]
    far = torch.full_like(image, start) if start >= 0 else norm_sq.argmax(-1, keepdim=True)  # [B, 1]
    dist_sq = torch.full_like(norm_sq, math.inf)  # [B, N]
    picks, products = [far], []
    for k in range(basis):
        dot = _product(X[image, far].expand(B * G, 1, D), halves).view(B, N)  # [B, N]
        products.append(dot)
        if k + 1 < basis:
            dist_sq = torch.minimum(dist_sq, torch.sub(norm_sq, dot, alpha=2) + norm_sq.gather(1, far))  # [B, N]
            far = dist_sq.argmax(-1, keepdim=True)  # [B, 1]
            picks.append(far)
    p = torch.cat(picks, 1)  # [B, M]
    SX = torch.stack(products, 1)  # [B, M, N]

    A = SX.gather(2, p[:, None].expand(B, basis, basis)) + ridge * torch.eye(basis, device=x.device)  # [B, M, M]
    L = torch.linalg.cholesky_ex(A).L  # [B, M, M]
    y = torch.linalg.solve_triangular(L, SX, upper=False)  # [B, M, N]
    w = torch.linalg.solve_triangular(L.mT, y, upper=True)  # [B, M, N]
    e_sq = norm_sq - y.square().sum(1) - ridge * w.square().sum(1)  # [B, N]
    e_sq = torch.where(e_sq > 4 * basis * U * norm_sq, e_sq, 0.0)
    if layout == "inplace":
        e_sq = e_sq.scatter(1, p, math.inf)
    return X, norm_sq, e_sq.argsort(dim=1, descending=True, stable=True), p


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Returns a @ b in float32: rounding the product to 16 bits would change rows of the result."""
    return torch.bmm(a, b) if a.dtype is torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)


def _s5_merge(
    X: Tensor, norm_sq: Tensor, order: Tensor, p: Tensor, keep: int, layout: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes the similarity by one batched product, and the means by one embedding_bag that reads X in place.

    (On a CPU embedding_bag over 16-bit tokens is faster, but rounds twice: long rows then miss their mean by more than
    a unit. On a GPU it sums in float32.)
    """
    B, N, D = X.shape
    T = keep - p.shape[1] if layout == "overwrite" else keep
    image = torch.arange(B, device=X.device)[:, None]  # [B, 1]
    kept = order[:, :keep].sort(1).values  # [B, K]
    targets = order[:, :T].sort(1).values  # [B, T]
    dropped = order[:, keep:]  # [B, N-K]
    inv_norm = norm_sq.gather(1, targets).clamp_min(1e-30).rsqrt()[..., None]  # [B, T, 1]
    few = 6 * keep <= N  # multiplying also the kept tokens costs less than copying the dropped ones
    compared = X if few else X[image, dropped]  # [B, N or N-K, D]
    similarity = _product(X[image, targets], compared.mT).mul_(inv_norm)  # [B, T, N or N-K]
    target = similarity.max(1).indices  # [B, N or N-K]
    if few:
        target = target.gather(1, dropped)  # [B, N-K]

    first = kept  # [B, K], the first token of each row
    if layout == "overwrite":
        lost = order[:, T:keep].sort(1).values  # [B, M]
        first = kept.scatter(1, torch.searchsorted(kept, lost), p)
    row = torch.searchsorted(kept, targets).gather(1, target)  # [B, N-K]
    row = torch.cat([torch.arange(keep, device=X.device).expand(B, keep), row], 1) + image * keep  # [B, N]
    token = torch.cat([first, dropped], 1) + image * N  # [B, N]
    row, by_row = row.flatten().sort(stable=True)  # [B*N]
    offsets = torch.searchsorted(row, torch.arange(B * keep, device=X.device))  # [B*K]
    tokens = F.embedding_bag(token.flatten()[by_row], X.view(B * N, D), offsets, mode="mean")  # [B*K, D]
    return tokens.view(B, keep, D).to(dtype), kept
