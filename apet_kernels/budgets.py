"""Budgets and weights that depend on what images contain: `share`, `needed`, `distinct`."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from . import ops
from .options import Options
from .ragged import check_lengths, whole
from .reference import U

F = TypeVar("F", bound=Callable[..., Any])
LEAST = 4  # an image keeps at least a quarter of what it would keep alone
STEPS = 16  # picks between two looks at whether more of them can change the result
# Of `distinct`: the largest power and the least weight. Weights then differ by less than the 10^7 above which copies of
# a heavy token end a round early (docs/algorithm.md, "Weights").
STEEPEST, LIGHTEST = 4.0, 1e-5
LIMIT = 0.2  # of the mean square: docs/vlm.md has what it foretells


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Returns whether tensors on this device can be float64."""
    try:
        torch.empty(0, dtype=torch.float64, device=device)
    except (RuntimeError, TypeError):  # MPS raises TypeError
        return False
    return True


def without_autocast(function: F) -> F:
    """Decorates a function of x so that torch.autocast, which would round products to 16 bits, is off within it."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        device = x.device.type
        has_autocast = torch.amp.is_autocast_available(device)
        off = torch.autocast(device, enabled=False) if has_autocast else contextlib.nullcontext()
        with torch.no_grad(), off:
            return function(x, *args, **kwargs)

    return cast("F", run)


@without_autocast
def share(x: Tensor, lengths: Sequence[int], keep: Sequence[int]) -> list[int]:
    """Divides the tokens that the images of a call keep among them, so that images with more to tell keep more.

    In every image, tokens are picked one at a time, each the one that the earlier picks reconstruct worst (pivoted QR,
    docs/algorithm.md). Its squared residual at that moment, the pivot, says how much it adds, and never rises from pick
    to pick. The largest pivots of all images are taken, sum(keep) of them, ties in the order of the images, but at
    least a quarter of its `keep`, and one, of each image. So the result depends on the other images of the call.

    It runs in torch, in float64 (float32 on devices without), on the device of x, which it waits for. Time is that of
    up to sum(keep) passes over the images, memory O(N (M + D)) for M picks.

    Args:
        x: [T, D] float32, float16 or bfloat16, images packed one after another, as in `compress_packed`.
        lengths: how many tokens each image has; S integers from 1, whose sum is T.
        keep: how many tokens each image would keep alone; S integers, each from 1 to the length of its image.

    Returns:
        How many tokens each image keeps, S integers with the sum of `keep`, each from 1 to the length of its image.

    Raises:
        ValueError: as `compress_packed` does.

    Example:
        >>> import torch
        >>> flat, rich = torch.randn(1, 128).repeat(576, 1), torch.randn(576, 128)
        >>> x = torch.cat([flat, rich])
        >>> keep = apet_kernels.share(x, lengths=[576, 576], keep=[40, 40])
        >>> keep
        [10, 70]
        >>> tokens, indices = apet_kernels.compress_packed(x, [576, 576], keep)
    """
    lengths, keep = whole("length", lengths), whole("keep", keep)
    ops.check_tokens(x, 2)
    check_lengths(x, lengths, keep, Options())
    least = [max(1, k // LEAST) for k in keep]
    spare = sum(keep) - sum(least)
    most = [min(n, k + spare) for n, k in zip(lengths, least, strict=True)]
    if len(keep) < 2 or spare == 0:
        return keep
    images = x.split(lengths)
    groups = [
        Pivots(torch.stack([images[s] for s in numbers]), numbers)
        for numbers in ([s for s, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths))
    ]
    floors, upper = (torch.tensor(counts, device="cpu")[:, None] for counts in (least, most))  # [S, 1]
    steps = 0
    while True:
        steps += STEPS
        shape = (len(keep), min(steps, max(most)))  # [S, steps]
        values = torch.full(shape, -torch.inf, dtype=torch.float32, device="cpu")
        for group in groups:
            wanted = min(steps, max(most[s] for s in group.numbers))
            values[group.numbers, :wanted] = group.first(wanted).cpu()
        step = torch.arange(values.shape[1], device="cpu")
        values.masked_fill_(step >= upper, -torch.inf).masked_fill_(step < floors, torch.inf)
        taken = values.flatten().sort(descending=True, stable=True)
        enough = steps >= max(least) and values.numel() >= sum(keep)
        if enough:  # unless one of the next pivots, none of which is larger than the last ones, may be taken
            enough = bool((values[:, -1] < taken.values[sum(keep) - 1]).all())
        if enough or steps >= max(most):
            image = taken.indices[: sum(keep)] // values.shape[1]
            return torch.bincount(image, minlength=len(keep)).tolist()


@without_autocast
def needed(x: Tensor, lengths: Sequence[int], keep: Sequence[int], limit: float = LIMIT) -> list[int]:
    """Returns how many tokens each image has to keep so that none of the others is far from what is kept.

    In every image, tokens are picked one at a time as in `share`, at least `keep`, and until no token that is left has
    a squared residual above `limit` times the mean square of the image's tokens. The result for an image does not
    depend on the other images of the call.

    It runs in torch, in float64 (float32 on devices without), on the device of x, which it waits for, image after
    image. Time is that of as many passes over an image as it returns.

    Args:
        x: [T, D] float32, float16 or bfloat16, images packed one after another, as in `compress_packed`.
        lengths: how many tokens each image has; S integers from 1, whose sum is T.
        keep: how many tokens each image keeps at least; S integers, each from 1 to the length of its image.
        limit: above 0. In the study of docs/vlm.md, answers were lost more often above 0.2, the default.

    Returns:
        How many tokens each image keeps, S integers, each from its `keep` to the length of its image.

    Raises:
        ValueError: as `compress_packed` does, and if limit is not a number above 0.

    Example:
        >>> import torch
        >>> flat, rich = torch.randn(1, 128).repeat(576, 1), torch.randn(576, 128)
        >>> apet_kernels.needed(torch.cat([flat, rich]), lengths=[576, 576], keep=[40, 40], limit=0.5)[0]
        40
    """
    lengths, keep = whole("length", lengths), whole("keep", keep)
    ops.check_tokens(x, 2)
    check_lengths(x, lengths, keep, Options())
    if not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
        raise ValueError(f"limit={limit!r} is not a number above 0")
    found = []
    for image, least in zip(x.split(lengths), keep, strict=True):  # one by one, so that no bit depends on the others
        pivots, most = Pivots(image[None], [0]), len(image)
        count = least
        while count < most:
            upto = min(most, count + STEPS)
            far = pivots.first(upto)[0, count:] > limit * pivots.mean_sq[0]
            count += int(far.sum())  # pivots never rise, so those above the limit come first
            if count < upto:
                break
        found.append(count)
    return found


@without_autocast
def distinct(x: Tensor, lengths: Sequence[int], power: float = 2.0) -> Tensor:
    """Returns weights for `compress_packed` that prefer tokens which differ from the rest of their image.

    The weight of a token is (1 - its mean cosine with all tokens of its image) ** power, at least 1e-5. Large areas of
    one kind (sky, paper) have small weights, and so lose tokens to small things that occur once. Cen-Prune (Wen et al.,
    arXiv 2608.30263) weights its distances by the same mean cosine. The weights of an image do not depend on the other
    images of the call.

    It runs in torch, in float64 (float32 on devices without), on the device of x, image after image. Time is that of
    two passes over x.

    Args:
        x: [T, D] float32, float16 or bfloat16, images packed one after another, as in `compress_packed`.
        lengths: how many tokens each image has; S integers from 1, whose sum is T.
        power: 0 to 4; 0 gives weights of 1. docs/vlm.md has what it gains.

    Returns:
        Weights [T] float32, from 1e-5 to 2 ** power. Tokens of zero length, or with an entry that is not
        finite, have no cosine: their weight is 1, and they do not count in the mean.

    Raises:
        ValueError: as `compress_packed` does, and if power is not a number from 0 to 4.

    Example:
        >>> import torch
        >>> x = torch.cat([torch.ones(575, 128), -torch.ones(1, 128)])
        >>> weights = apet_kernels.distinct(x, lengths=[576])
        >>> int(weights.argmax())
        575
        >>> tokens, indices = apet_kernels.compress_packed(x, [576], [64], weights=weights)
    """
    lengths = whole("length", lengths)
    ops.check_tokens(x, 2)
    check_lengths(x, lengths, [1] * len(lengths), Options())
    if not isinstance(power, (int, float)) or isinstance(power, bool) or not 0 <= power <= STEEPEST:
        raise ValueError(f"power={power!r} is outside 0..{STEEPEST:g}")
    weights = x.new_empty(len(x), dtype=torch.float32)
    for image, out in zip(x.split(lengths), weights.split(lengths), strict=True):  # so that no bit depends on others
        X = image.to(torch.float64 if has_float64(x.device) else torch.float32)  # [N, D]
        largest = X.abs().amax(1, keepdim=True)  # [N, 1]: divided by it, no token's square overflows
        usable = (largest > 0) & largest.isfinite()
        unit = torch.where(usable, X / largest, 0)
        unit = unit / unit.square().sum(1, keepdim=True).sqrt().clamp(min=1)  # [N, D]; at least 1 after the division
        mean = unit.sum(0) / usable.sum().clamp(min=1)  # [D]
        cosine = (unit * mean).sum(1)  # [N]; 0 where it is unknown
        out.copy_(((1 - cosine).clamp(min=0) ** power).clamp(min=LIGHTEST))
    return weights


class Pivots:
    """The pivots of images of one length, computed as far as they are asked for."""

    def __init__(self, x: Tensor, numbers: list[int]) -> None:
        """x: [B, N, D]; numbers: those of the images in the call."""
        self.numbers = numbers
        # torch.set_float32_matmul_precision() lets products of float32 round to 16 bits or to TF32, not of float64.
        self._wide = has_float64(x.device)
        X = x.to(torch.float64 if self._wide else torch.float32)  # [B, N, D]
        norm_sq = X.square().sum(-1)  # [B, N]
        finite = norm_sq <= torch.finfo(torch.float32).max
        self._X = torch.where(finite[..., None], X, 0)
        # One matrix product is faster than a product for each pick, and no larger than X.
        one_product = self._wide and x.shape[1] <= x.shape[2]
        self._gram = self._X @ self._X.mT if one_product else None  # [B, N, N]
        self._norm_sq = torch.where(finite, norm_sq, 0)
        self.mean_sq = self._norm_sq.mean(-1)  # [B]
        self._resid_sq = self._norm_sq.clone()
        self._open = torch.ones_like(finite)
        self._y = X.new_empty(len(x), STEPS, x.shape[1])  # [B, M, N]
        self._values: list[Tensor] = []  # [B] each

    def first(self, count: int) -> Tensor:
        """Returns the first pivots [B, count], in picking order; 0 where the earlier picks reconstruct all tokens."""
        while len(self._values) < count:
            self._pick()
        return torch.stack(self._values[:count], 1).float()

    def _product(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Returns rows [B, k] times columns [B, k, N]: [B, N]."""
        return (rows[:, None] @ columns)[:, 0] if self._wide else (rows[..., None] * columns).sum(1)

    def _pick(self) -> None:
        m, image = len(self._values), torch.arange(len(self._X), device=self._X.device)
        if m == self._y.shape[1]:
            self._y = torch.cat([self._y, torch.empty_like(self._y)], 1)
        pick = self._resid_sq.masked_fill(~self._open, -1).argmax(-1)  # [B]
        pivot = self._resid_sq[image, pick]  # [B]
        self._values.append(pivot)
        self._open[image, pick] = False
        gram = self._gram
        products = self._product(self._X[image, pick], self._X.mT) if gram is None else gram[image, pick]  # [B, N]
        y = self._y[:, :m]  # [B, m, N]
        known = self._product(y[image, :, pick], y)  # [B, N]
        y_new = torch.where(pivot[:, None] > 0, (products - known) / pivot[:, None].sqrt(), 0)  # [B, N]
        self._y[:, m] = y_new
        resid_sq = self._resid_sq - y_new.square()
        self._resid_sq = torch.where(resid_sq > 4 * (m + 1) * U * self._norm_sq, resid_sq, 0)
