"""Checks a result before it may be timed.

A result is compared image by image with `apet_kernels.reference` in float64, given its own choices:

1. Its kept set is the reference's, except for tokens whose squared residual is within 4 M u ||x||^2 of the cut
   (u = 2^-24: the rounding that any float32 implementation may make). The same holds for its overwritten slots.
2. Given that kept set, each row is the mean of the tokens that float64 merges into it, to the rounding of the dtype.
   A row is not checked if rounding may move a dropped token into it or out of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apet_kernels import reference
from benchmarks.lib.alternatives import MERGING
from benchmarks.lib.cases import RIDGE, Case

U = reference.U
# Larger products take a CPU too long in float64, so a GPU makes those of its own result: in float64, by other kernels.
ON_CPU_FLOPS = 3e10


def judge(case: Case, name: str, x: Tensor, result: tuple[Tensor, Tensor]) -> float:
    """Runs `check` on the result of the implementation `name`, which may be on a GPU: on the CPU, or there if the
    products are large.

    Rows that `published` rounds in 16 bits are not checked. Raises AssertionError, which begins with the fault.
    """
    rounded = name == "published" and case.dtype is not torch.float32
    similarity_error = 2 * torch.finfo(case.dtype).eps if rounded else None
    flops = 2 * case.B * (case.N - case.keep) * case.targets * case.D
    device = x.device if flops > ON_CPU_FLOPS else torch.device("cpu")
    try:
        return check(case, x.to(device), *(t.to(device) for t in result), similarity_error)
    except AssertionError as wrong:
        raise AssertionError(f"{wrong} ({name}, {case})") from None


def checked(case: Case, name: str, call: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> float:
    """Returns the share of rows checked, of the second of two calls: the first one warms up."""
    with torch.inference_mode():
        call(x)
        return judge(case, name, x, call(x))


def check(case: Case, x: Tensor, tokens: Tensor, indices: Tensor, similarity_error: float | None = None) -> float:
    """Returns the share of rows that were checked.

    similarity_error: the error of x.t / ||t||, relative to ||x||. None: that of float32 sums in any order, and of
    tensor cores, which truncate when they add (Fasi et al., PeerJ CS 330, 2021). Raises AssertionError, which names
    what is wrong and by how much.
    """
    assert tokens.shape == (case.B, case.keep, case.D), f"tokens have shape {tuple(tokens.shape)}"
    assert tokens.dtype == x.dtype, f"tokens are {tokens.dtype}, not {x.dtype}"
    if similarity_error is None:
        similarity_error = max(32, case.D / 64) * U
    rows = sum(_check_image(case, *image, similarity_error) for image in zip(x, tokens, indices, strict=True))
    return rows / (case.B * case.keep)


def check_other(name: str, case: Case, x: Tensor, kept: Tensor, indices: Tensor) -> None:
    """Checks what must hold for the result of any method; tests/test_alternatives.py checks which tokens it chooses.
    Raises AssertionError."""
    assert kept.shape == (case.B, case.keep, case.D), f"{name}, {case}: tokens have shape {tuple(kept.shape)}"
    assert indices.shape == (case.B, case.keep), f"{name}, {case}: indices have shape {tuple(indices.shape)}"
    assert indices.min() >= 0, f"{name}, {case}: an index is {int(indices.min())}"
    assert indices.max() < case.N, f"{name}, {case}: an index is {int(indices.max())}"
    assert (indices.diff() > 0).all(), f"{name}, {case}: indices do not ascend"
    assert kept.isfinite().all(), f"{name}, {case}: a token is not finite"
    moved = (kept != x.gather(1, indices[..., None].expand_as(kept))).any(-1)  # [B, K]
    assert moved.any() == (name in MERGING), f"{name}, {case}: {int(moved.sum())} rows are not tokens of x"


def _check_image(case: Case, x: Tensor, tokens: Tensor, kept: Tensor, similarity_error: float) -> int:
    """Checks x [N, D], tokens [K, D], kept [K]. Returns the number of rows checked."""
    image = reference.widen(x)
    X, norm_sq = image.X, image.norm_sq
    p = reference.s1_basis(image, case.basis, start=case.start, ridge=RIDGE)  # [M]
    e_sq = reference.s3_residual(image, p, reference.s2_solve(image, p, RIDGE), case.basis)  # [N]
    if case.layout == "inplace":
        e_sq = e_sq.index_fill(0, p, torch.inf)
    assert (kept.diff() > 0).all(), "indices do not ascend"
    overwritten = torch.zeros(case.keep, dtype=torch.bool, device=x.device)  # [K]
    slack = 4 * case.basis * U * norm_sq  # [N]
    _check_cut(e_sq, slack, kept, "kept")
    if case.layout == "overwrite":
        overwritten = (tokens[:, None] == x[p]).all(-1).any(1)  # [K]
        assert torch.equal(tokens[overwritten], x[p]), "the overwritten slots do not hold the basis in picking order"
        _check_cut(e_sq, slack, kept[~overwritten], "not overwritten")

    dropped = torch.ones(case.N, dtype=torch.bool, device=x.device).index_fill_(0, kept, False)  # [N]
    rows = (~overwritten).nonzero()[:, 0]  # [T]
    targets = X[kept[rows]]  # [T, D]
    found, excused = [], torch.zeros_like(rows, dtype=torch.bool)  # of every dropped token; [T]
    for part in X[dropped].split(8192):  # [n, D]
        similarity = (part @ targets.T).div_(targets.norm(dim=-1))  # [n, T]
        best, target = similarity.max(1)  # [n]
        found.append(target)
        near = similarity >= (best - 2 * similarity_error * part.norm(dim=-1))[:, None]  # [n, T]
        excused |= near[near.sum(1) > 1].any(0)
    target = torch.cat(found)  # [N-K]
    count = 1 + target.bincount(minlength=len(rows))[:, None]  # [T, 1]
    mean = targets.index_add(0, target, X[dropped]) / count  # [T, D]
    allowed = torch.finfo(x.dtype).eps * mean.abs() + 8 * U * X.abs().amax()  # [T, D]
    wrong = ((tokens[rows].double() - mean).abs() > allowed).any(1) & ~excused  # [T]
    assert not wrong.any(), f"{int(wrong.sum())} of {int((~excused).sum())} rows are not the mean of their tokens"
    return case.keep - int(excused.sum())


def _check_cut(e_sq: Tensor, slack: Tensor, chosen: Tensor, what: str) -> None:
    """Checks that `chosen` holds the largest of e_sq [N], give or take slack [N]."""
    inside = torch.zeros_like(e_sq, dtype=torch.bool).index_fill_(0, chosen, True)  # [N]
    surely_out, surely_in = (e_sq + slack)[inside].min(), (e_sq - slack)[~inside].max()
    assert surely_out >= surely_in, f"{what}: a token of e_sq {surely_out:.6g} is in, one of {surely_in:.6g} is out"
