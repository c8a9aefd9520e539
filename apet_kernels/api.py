"""The functions in front of the ops: named results, a choice of backend, ValueError.

Their arguments are those of the ops, in the same order, and `backend`. Ragged images: `ragged.py`.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import available, dispatch, ops
from .options import BACKENDS, Backend, Layout, Options, Select
from .registry import registered


class Compressed(NamedTuple):
    """What `compress` returns. Dense: [B, R, ...]; of packed images: [R, ...]."""

    tokens: Tensor  # [B, R, D] in the dtype of x
    indices: Tensor  # [B, R] int64, the position of each row in x


class Scored(NamedTuple):
    """What `score` returns."""

    residual: Tensor  # [B, N] float32, the squared residual e^2 of each token
    basis_indices: Tensor  # [B, M] int64, in picking order, padded with -1


def compress(
    x: Tensor,
    keep: int,
    basis: int | None = 10,
    *,
    layout: Layout = "inplace",
    select: Select = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
    backend: Backend | None = None,
) -> Compressed:
    """Compress each image from N to `keep` tokens.

    ApET (arXiv 2602.19870: selection of basis tokens, approximation error, merging; docs/algorithm.md has the stages):
    a basis S [M, D] of far-apart tokens rebuilds each token x as S^T w, by ridge least squares; the tokens of
    largest error e^2 = ||x - S^T w||^2 are kept, and every other token is averaged into the kept one of largest
    cosine similarity.

    Args:
        x: [B, N, D] float32, float16 or bfloat16; any strides. If the last dimension is not contiguous, x is copied.
        keep: K, 1..N. keep = N returns x bit for bit.
        basis: M, 1..64 basis tokens. With select="qr" and layout="inplace" also more, up to keep, and None, which is
            keep: then all that stays are pivots. More than 64, and None, are picked in four rounds.
        layout: "inplace" (basis and largest residuals, each at its own position), "overwrite" (the released code: the
            lowest of the kept are overwritten by the basis; needs keep > basis) or "append" (the basis after them).
        select: "fps" (farthest point) or "qr" (column-pivoted QR: the largest residual so far).
        start: the first basis token, or -1: the one of largest norm.
        ridge: >= 0, added to the diagonal of the Gram matrix of the basis.
        blend: "overwrite" only: blend * basis + (1 - blend) * token.
        refine: steps, 0..8, that replace each kept token by the medoid of the tokens nearest to it (k-medoids, by
            Euclidean distance); "inplace" only, and where M is keep.
        backend: "cpu", "triton", "cuda" or "reference"; None: that of `use_backend` or `set_backend`, else the
            dispatcher's choice.

    Returns:
        tokens [B, R, D] in x's dtype and indices [B, R] int64, the position of every row, ascending. R = keep; with
        "append" R = keep + basis, and the basis rows follow in picking order.

    Raises:
        ValueError: for an argument out of range, an input that requires grad (in grad mode), or a backend that cannot
            run here; the message names the value.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 576, 1024)
        >>> tokens, indices = apet_kernels.compress(x, keep=64)
        >>> tokens.shape, indices.shape
        (torch.Size([5, 64, 1024]), torch.Size([5, 64]))
    """
    options = Options(basis, layout, select, start, ridge, blend, refine)
    return Compressed(*call("compress", backend, x, keep, **options.arguments))


def score(
    x: Tensor,
    basis: int | None = 10,
    *,
    select: Select = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    backend: Backend | None = None,
) -> Scored:
    """Score each token by how badly the basis rebuilds it: the first half of `compress`, for budgets chosen elsewhere.

    Stages s1 to s3 (arXiv 2602.19870: selection of basis tokens, approximation error; docs/algorithm.md):
    e^2 = ||x - S^T w||^2 with the weights w that minimise ||x - S^T w||^2 + ridge ||w||^2.

    Args:
        x: [B, N, D] float32, float16 or bfloat16, as in `compress`.
        basis, select, start, ridge, backend: as in `compress`.

    Returns:
        residual [B, N] float32, the squared residual e^2 of every token that s4 ranks (0 where it is within rounding
        of 0, inf where the norm of a token is not finite), and basis_indices [B, M] int64 in picking order, padded
        with -1.

    Raises:
        ValueError: as `compress` does.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 576, 1024)
        >>> residual, basis_indices = apet_kernels.score(x)
        >>> residual.shape, basis_indices.shape
        (torch.Size([5, 576]), torch.Size([5, 10]))
    """
    return Scored(*call("score", backend, x, basis, select=select, start=start, ridge=ridge))


def merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None, backend: Backend | None = None) -> Tensor:
    """Merge all tokens into those that are kept: the second half of `compress`, for kept tokens chosen elsewhere.

    Stage s5 (arXiv 2602.19870: merging; docs/algorithm.md): each token that is not listed goes to the listed one x_j of
    largest cosine similarity, which becomes the mean (x_j + sum of those) / (1 + their number).

    Args:
        x: [B, N, D] float32, float16 or bfloat16, as in `compress`.
        indices: [B, K] int64, the kept tokens of each image, K in 1..N; any order, repetitions allowed (the earliest
            receives), clamped into [0, N).
        targets: [B, K] bool, which of them may be merged into; None: all.
        backend: as in `compress`.

    Returns:
        tokens [B, K, D] in x's dtype, row r for token indices[b, r].

    Raises:
        ValueError: as `compress` does.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 576, 1024)
        >>> kept = apet_kernels.score(x).residual.topk(64).indices
        >>> apet_kernels.merge(x, kept).shape
        torch.Size([5, 64, 1024])
    """
    result: Tensor = call("merge", backend, x, indices, targets=targets)
    return result


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it can be used here, else the reason why not. Deprecated."""
    warnings.warn(
        "apet_kernels.backends() is deprecated: use apet_kernels.available_backends() and "
        "apet_kernels.why_unavailable(name)",
        DeprecationWarning,
        stacklevel=2,
    )
    return {name: available.why_unavailable(name) for name in BACKENDS}


def call(op: str, backend: Backend | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the op, or one backend's implementation of it."""
    # torch.compile cannot trace the look-up; on a GPU the op itself looks (dispatch.py).
    if backend is None and not torch.compiler.is_compiling():
        backend = dispatch.chosen_backend()
    function = getattr(registered, op) if backend is None else dispatch.forced(op, backend, args[0])
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        try:
            ops.check(op, *args, **kwargs)
        except ValueError as wrong:  # an argument is at fault; other errors stay as they are
            raise wrong from None
        except Exception:  # an argument of a type that the check does not expect: keep the op's own message
            raise error from None
        raise
