"""The public functions: they call the ops, return named tuples and raise ValueError for wrong arguments.

They take the arguments of the ops, in the same order, and `backend`. Functions for ragged images: `ragged.py`.
"""

from __future__ import annotations

import contextlib
import warnings
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree

from . import available, dispatch, ops
from .options import BACKENDS, Backend, Layout, Options, Select
from .registry import registered


class Compressed(NamedTuple):
    """The result of `compress`, and of packed images, without the dimension B."""

    tokens: Tensor  # [B, R, D] in the dtype of x
    indices: Tensor  # [B, R] int64, the position of each row in x


class Scored(NamedTuple):
    """The result of `score`."""

    residual: Tensor  # [B, N] float32, the squared residual e^2 of each token
    basis_indices: Tensor  # [B, M] int64, in picking order, padded with -1


for _result in (Compressed, Scored):  # so that torch.export.save() can write programs that return them
    with contextlib.suppress(ValueError):  # registered by an earlier execution of this module
        _pytree._register_namedtuple(_result, serialized_type_name=f"{__name__}.{_result.__name__}")


def compress(
    x: Tensor,
    keep: int,
    basis: int | None = None,
    *,
    layout: Layout = "inplace",
    select: Select = "qr",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
    weights: Tensor | None = None,
    backend: Backend | None = None,
) -> Compressed:
    """Compress each image from N to `keep` tokens.

    This is ApET (arXiv 2602.19870; docs/algorithm.md describes the stages). A basis S [M, D] of far-apart tokens
    reconstructs each token x as S^T w, by ridge least squares. The tokens of largest error e^2 = ||x - S^T w||^2 are
    kept, and every other token is averaged into the kept one of largest cosine similarity.

    Args:
        x: [B, N, D] float32, float16 or bfloat16; any strides. If the last dimension is not contiguous, x is copied.
        keep: K, 1..N. keep = N returns x bit for bit.
        basis: M, 1..64 basis tokens. With select="qr" and layout="inplace", M may be up to keep; None means M = keep:
            all kept tokens are basis tokens. With more than 64, or None, the basis is picked in four rounds.
        layout: "inplace" (basis and largest residuals, each at its own position), "overwrite" (as in the released code:
            the basis overwrites the kept tokens of lowest residual; needs keep > basis) or "append" (the basis follows
            the kept tokens).
        select: "fps" (farthest point) or "qr" (column-pivoted QR: the largest residual so far).
        start: position of the first basis token; -1: the token of largest norm.
        ridge: >= 0, added to the diagonal of the Gram matrix of the basis.
        blend: 0..1; with "overwrite", a row becomes blend * basis + (1 - blend) * token. Other layouts need 1.
        refine: number of k-medoids steps, 0..8. Each replaces every kept token by the medoid of the tokens nearest to
            it (Euclidean distance). Needs layout="inplace" and M = keep.
        weights: [B, N] float32, >= 0, on x's device; the values by which tokens are picked and ranked are multiplied by
            them, so that a caller can prefer tokens, for example those that resemble a question. Only ratios matter; a
            token of weight 0 is taken last. Negative values and NaN count as 0. Merging does not use them.
        backend: "cpu", "triton", "cuda" or "reference"; None: the backend set by `use_backend` or `set_backend`, else
            the dispatcher's choice.

    Returns:
        tokens [B, R, D] in x's dtype and indices [B, R] int64, the position of every row, ascending. R = keep; with
        "append" R = keep + basis, and the last rows are the basis in picking order.

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
    return Compressed(*call("compress", backend, x, keep, **options.arguments, weights=weights))


def score(
    x: Tensor,
    basis: int | None = 10,
    *,
    select: Select = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    backend: Backend | None = None,
) -> Scored:
    """Score each token by its reconstruction error: the first half of `compress`, for callers that choose `keep` later.

    Stages s1 to s3 (arXiv 2602.19870, docs/algorithm.md): e^2 = ||x - S^T w||^2 with the weights w that minimise
    ||x - S^T w||^2 + ridge ||w||^2.

    Args:
        x: [B, N, D] float32, float16 or bfloat16, as in `compress`.
        basis, select, start, ridge, backend: as in `compress`.

    Returns:
        residual [B, N] float32, the squared residual e^2 of every token (0 if it is within rounding of 0, inf if the
        norm of the token is not finite), and basis_indices [B, M] int64 in picking order, padded with -1.

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
    """Merge all tokens into the kept ones: the second half of `compress`, for callers that choose the kept tokens.

    Stage s5 (arXiv 2602.19870, docs/algorithm.md): each dropped token is merged into the kept token x_j of largest
    cosine similarity, which becomes the mean (x_j + sum of its dropped tokens) / (1 + their number).

    Args:
        x: [B, N, D] float32, float16 or bfloat16, as in `compress`.
        indices: [B, K] int64, the kept tokens of each image, K in 1..N, in any order, clamped into [0, N). Of repeated
            ones, tokens are merged into the earliest.
        targets: [B, K] bool, which of them are merge targets; None: all.
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
    """Deprecated. Maps every backend to None if it can run here, else to the reason why not."""
    warnings.warn(
        "apet_kernels.backends() is deprecated: use apet_kernels.available_backends() and "
        "apet_kernels.why_unavailable(name)",
        DeprecationWarning,
        stacklevel=2,
    )
    return {name: available.why_unavailable(name) for name in BACKENDS}


def call(op: str, backend: Backend | None, *args: Any, **kwargs: Any) -> Any:
    """Runs the op, or one backend's implementation of it."""
    # torch.compile cannot trace chosen_backend(). For tensors on a GPU, the op itself calls it (dispatch.py).
    if backend is None and not torch.compiler.is_compiling():
        backend = dispatch.chosen_backend()
    function = getattr(registered, op) if backend is None else dispatch.forced(op, backend, args[0])
    try:
        return function(*args, **kwargs)
    except RuntimeError as error:
        try:
            ops.check(op, *args, **kwargs)
        except ValueError as wrong:  # a wrong argument; other errors are raised unchanged
            raise wrong from None
        except Exception:  # the check fails on an argument of an unexpected type: keep the op's own message
            raise error from None
        raise
