"""The functions in front of the ops: named results, a choice of backend, lists for ragged images, ValueError.

Their arguments are those of the ops, in the same order, and `backend`.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from . import dispatch, ops
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
    return Compressed(*_call("compress", backend, x, keep, **options.arguments))


@overload
def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int | None = 10,
    *,
    layout: Layout = "inplace",
    select: Select = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
    backend: Backend | None = None,
) -> Compressed: ...
@overload
def compress_varlen(
    x: Tensor,
    cu_seqlens: Sequence[int],
    cu_keep: Sequence[int],
    *,
    basis: int | None = 10,
    layout: Layout = "inplace",
    select: Select = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
    backend: Backend | None = None,
) -> Compressed: ...
def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    cu_keep: Tensor | Sequence[int],
    total_keep: int | None = None,
    max_seqlen: int | None = None,
    max_keep: int | None = None,
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
    """`compress` for S ragged images packed one after another in x, given by running sums on x's device.

    Nothing here waits for the device, so the values of cu_seqlens and cu_keep are not checked: whatever they hold,
    kernels stay in bounds. `compress_packed` takes lists of lengths, and checks them.

    Args:
        x: [T, D] float32, float16 or bfloat16, as in `compress`.
        cu_seqlens: [S + 1] int32 on x's device, running sums of the lengths of the images: 0, ..., T.
        cu_keep: [S + 1] int32 on x's device, running sums of how many tokens each image keeps: 0, ..., total_keep.
        total_keep: how many tokens all images keep, 0..T.
        max_seqlen: the length of the longest image.
        max_keep: the most that one image keeps.
        basis, layout, select, start, ridge, blend, refine, backend: as in `compress`.

    Returns:
        tokens [R, D] in x's dtype, image after image, and indices [R] int64 into x. R = total_keep; with "append"
        R = total_keep + S * basis, and the basis rows of an image follow its others.

    Raises:
        ValueError: as `compress` does.

    Example:
        >>> import torch
        >>> x = torch.randn(576 + 1369, 1024)
        >>> cu_seqlens = torch.tensor([0, 576, 576 + 1369], dtype=torch.int32)
        >>> cu_keep = torch.tensor([0, 64, 64 + 137], dtype=torch.int32)
        >>> tokens, indices = apet_kernels.compress_varlen(
        ...     x, cu_seqlens, cu_keep, total_keep=64 + 137, max_seqlen=1369, max_keep=137
        ... )
        >>> tokens.shape
        torch.Size([201, 1024])
    """
    options = Options(basis, layout, select, start, ridge, blend, refine)
    sizes = (total_keep, max_seqlen, max_keep)
    if not isinstance(cu_seqlens, Tensor) and not isinstance(cu_keep, Tensor):
        if sizes != (None, None, None):
            raise ValueError(
                f"total_keep={total_keep}, max_seqlen={max_seqlen} and max_keep={max_keep} follow from the lists; "
                "leave them out"
            )
        if not torch.compiler.is_compiling():  # torch.compile cannot trace a warning
            warnings.warn(
                "apet_kernels.compress_varlen with lists is deprecated: call apet_kernels.compress_packed(x, lengths, "
                "keep, ...)",
                DeprecationWarning,
                stacklevel=2,
            )
        return _packed(x, cu_seqlens, cu_keep, options, backend)
    if not isinstance(cu_seqlens, Tensor) or not isinstance(cu_keep, Tensor):
        raise ValueError("cu_seqlens and cu_keep must both be tensors [S + 1]; compress_packed takes lists")
    if None in sizes:
        raise ValueError(
            f"total_keep={total_keep}, max_seqlen={max_seqlen} and max_keep={max_keep} must be given: reading them off "
            "the device would wait for it"
        )
    return Compressed(*_call("compress_varlen", backend, x, cu_seqlens, cu_keep, *sizes, **options.arguments))


def compress_packed(
    x: Tensor,
    lengths: Sequence[int],
    keep: Sequence[int],
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
    """`compress` for S ragged images packed one after another in x, given by lists.

    Args:
        x: [T, D] float32, float16 or bfloat16, as in `compress`.
        lengths: how many tokens each image has; S integers from 1, whose sum is T.
        keep: how many tokens each image keeps; S integers, each from 1 to the length of its image.
        basis, layout, select, start, ridge, blend, refine, backend: as in `compress`.

    Returns:
        tokens [R, D] in x's dtype, image after image, and indices [R] int64 into x. R = sum(keep); with "append"
        R = sum(keep) + S * basis, and the basis rows of an image follow its others.

    Raises:
        ValueError: as `compress` does; the message names the image where one is at fault.

    Example:
        >>> import torch
        >>> x = torch.randn(576 + 1369, 1024)
        >>> tokens, indices = apet_kernels.compress_packed(x, lengths=[576, 1369], keep=[64, 137])
        >>> tokens.shape
        torch.Size([201, 1024])
    """
    return _packed(x, lengths, keep, Options(basis, layout, select, start, ridge, blend, refine), backend)


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
    return Scored(*_call("score", backend, x, basis, select=select, start=start, ridge=ridge))


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
    result: Tensor = _call("merge", backend, x, indices, targets=targets)
    return result


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it can be used here, else the reason why not. Deprecated."""
    warnings.warn(
        "apet_kernels.backends() is deprecated: use apet_kernels.available_backends() and "
        "apet_kernels.why_unavailable(name)",
        DeprecationWarning,
        stacklevel=2,
    )
    return {name: dispatch.why_unavailable(name) for name in BACKENDS}


def _call(op: str, backend: Backend | None, *args: Any, **kwargs: Any) -> Any:
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


def _packed(
    x: Tensor, lengths: Sequence[int], keep: Sequence[int], options: Options, backend: Backend | None
) -> Compressed:
    lengths, keep = _whole("length", lengths), _whole("keep", keep)
    _check_lengths(x, lengths, keep, options)
    sizes = (sum(keep), max(lengths, default=0), max(keep, default=0))
    cu_seqlens, cu_keep = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=x.device) for n in (lengths, keep)
    )
    return Compressed(*_call("compress_varlen", backend, x, cu_seqlens, cu_keep, *sizes, **options.arguments))


def _whole(name: str, values: Sequence[int]) -> list[int]:
    for s, value in enumerate(values):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value} of image {s} is not a whole number")
    return [operator.index(value) for value in values]


def _check_lengths(x: Tensor, lengths: list[int], keep: list[int], options: Options) -> None:
    if len(lengths) != len(keep):
        raise ValueError(f"{len(lengths)} lengths but {len(keep)} keeps were given")
    if x.dim() == 2 and sum(lengths) != x.shape[0]:
        raise ValueError(f"the lengths add up to {sum(lengths)}, but x has {x.shape[0]} tokens")
    for s, (n, k) in enumerate(zip(lengths, keep, strict=True)):
        if n < 1:
            raise ValueError(f"image {s} has {n} tokens; at least 1 is needed")
        if not 1 <= k <= n:
            raise ValueError(f"keep={k} is outside 1..{n}, the tokens of image {s}")
        if options.layout == "overwrite" and options.basis is not None and k <= options.basis and k != n:
            raise ValueError(
                f"layout='overwrite' needs keep > basis, got keep={k} for image {s} and basis={options.basis}"
            )
