"""`compress` for ragged images packed one after another: by running sums on the device, or by lists of lengths."""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from .api import Compressed, call
from .options import Backend, Layout, Options, Select


@overload
def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
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
) -> Compressed: ...
@overload
def compress_varlen(
    x: Tensor,
    cu_seqlens: Sequence[int],
    cu_keep: Sequence[int],
    *,
    basis: int | None = None,
    layout: Layout = "inplace",
    select: Select = "qr",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
    weights: Tensor | None = None,
    backend: Backend | None = None,
) -> Compressed: ...
def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    cu_keep: Tensor | Sequence[int],
    total_keep: int | None = None,
    max_seqlen: int | None = None,
    max_keep: int | None = None,
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
        weights: [T] float32, as in `compress`.

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
        return _packed(x, cu_seqlens, cu_keep, options, weights, backend)
    if not isinstance(cu_seqlens, Tensor) or not isinstance(cu_keep, Tensor):
        raise ValueError("cu_seqlens and cu_keep must both be tensors [S + 1]; compress_packed takes lists")
    if None in sizes:
        raise ValueError(
            f"total_keep={total_keep}, max_seqlen={max_seqlen} and max_keep={max_keep} must be given: reading them off "
            "the device would wait for it"
        )
    more = {**options.arguments, "weights": weights}
    return Compressed(*call("compress_varlen", backend, x, cu_seqlens, cu_keep, *sizes, **more))


def compress_packed(
    x: Tensor,
    lengths: Sequence[int],
    keep: Sequence[int],
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
    """`compress` for S ragged images packed one after another in x, given by lists.

    Args:
        x: [T, D] float32, float16 or bfloat16, as in `compress`.
        lengths: how many tokens each image has; S integers from 1, whose sum is T.
        keep: how many tokens each image keeps; S integers, each from 1 to the length of its image.
        basis, layout, select, start, ridge, blend, refine, backend: as in `compress`.
        weights: [T] float32, as in `compress`.

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
    return _packed(x, lengths, keep, Options(basis, layout, select, start, ridge, blend, refine), weights, backend)


def _packed(
    x: Tensor,
    lengths: Sequence[int],
    keep: Sequence[int],
    options: Options,
    weights: Tensor | None,
    backend: Backend | None,
) -> Compressed:
    lengths, keep = whole("length", lengths), whole("keep", keep)
    check_lengths(x, lengths, keep, options)
    sizes = (sum(keep), max(lengths, default=0), max(keep, default=0))
    cu_seqlens, cu_keep = (
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=x.device) for n in (lengths, keep)
    )
    more = {**options.arguments, "weights": weights}
    return Compressed(*call("compress_varlen", backend, x, cu_seqlens, cu_keep, *sizes, **more))


def whole(name: str, values: Sequence[int]) -> list[int]:
    found = []
    for s, value in enumerate(values):
        try:
            found.append(operator.index(value))
        except TypeError:  # also of a tensor, which has __index__ whatever its dtype is
            raise ValueError(f"{name}={value} of image {s} is not a whole number") from None
    return found


def check_lengths(x: Tensor, lengths: list[int], keep: list[int], options: Options) -> None:
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
