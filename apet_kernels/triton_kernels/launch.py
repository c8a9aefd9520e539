"""Turns a call of each op into a list of launches. Nothing here looks at the data.

`compress` takes M + 4 launches, or with a basis in rounds 2 a round + 4, and 3 more for each medoid step. The list is
built from shapes, so meta tensors are enough to count the launches (`plan`) and to compile them for another GPU
(tests).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..options import MAX_BASIS, Options, Select
from . import s1_norms, s1_pool, s1_rounds, s1_s3_sweep, s4_given_rows, s4_medoids, s4_topk, s5_assign, s5_mean
from .call import Call
from .s1_norms import Extents


def compress(
    x: Tensor,
    keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    device_class: str | None = None,
    **options: Any,
) -> Call:
    """Returns the launches of the op `compress`; its arguments are already checked."""
    B, N, D = x.shape
    chosen = Options(basis, **options)
    extents = Extents(keep, chosen.rows(0))
    rows = keep + extents.appended
    tokens = torch.empty(B, rows, D, dtype=x.dtype, device=x.device)
    indices = torch.empty(B, rows, dtype=torch.int64, device=x.device)
    call = Call(x, B, N, (tokens, indices), device_class, weights)
    if B > 0:
        _compress(call, extents, N - keep, chosen)
    return call


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
    device_class: str | None = None,
    **options: Any,
) -> Call:
    """Returns the launches of the op `compress_varlen`; its arguments are already checked."""
    images, (T, D) = cu_seqlens.shape[0] - 1, x.shape
    longest, chosen = min(max_seqlen, T), Options(basis, **options)
    most_kept, appended = min(max_keep, longest, total_keep), chosen.rows(0)
    extents = Extents(most_kept, appended, cu_seqlens.contiguous(), cu_keep.contiguous(), T, total_keep)
    rows = total_keep + images * appended
    new = torch.empty if images > 0 and longest > 0 else torch.zeros  # without tokens no image fills a row
    tokens = new(rows, D, dtype=x.dtype, device=x.device)
    indices = new(rows, dtype=torch.int64, device=x.device)
    call = Call(x, images, longest, (tokens, indices), device_class, weights)
    if images > 0 and longest > 0:
        _compress(call, extents, longest, chosen)
    return call


def _compress(call: Call, extents: Extents, most_dropped: int, options: Options) -> None:
    """Adds the launches of s1 to s5, dense or ragged."""
    M, start, ridge, layout = options.basis, options.start, options.ridge, options.layout
    tokens, indices = call.results
    e_sq = call.new(torch.float32, call.all_tokens)
    norms = s1_norms.launch(call, extents, start)
    if M is None or M > MAX_BASIS:
        state = s1_rounds.new_state(call, M, max(extents.max_keep, 1), extents.cu_keep is not None)
        basis = state.basis
        for number in range(state.rounds):
            s1_pool.launch(call, norms, state, number, start, ridge)
            s1_rounds.launch(call, norms, state, e_sq)
    else:
        basis = call.new(torch.int64, call.images, M)
        s1_s3_sweep.launch(call, norms, basis, e_sq, options.select, ridge)
    rows = s4_topk.launch(call, norms.table, basis, e_sq, indices, layout, extents.appended)
    for _ in range(options.refine if extents.max_keep > 0 else 0):
        cluster_key = s5_assign.launch(call, norms, rows, most_dropped, extents.max_keep, distance=True)
        basis = s4_medoids.launch(call, norms.table, rows, cluster_key, extents.max_keep)
        rows = s4_topk.launch(call, norms.table, basis, e_sq, indices, layout, extents.appended)
    target_key = s5_assign.launch(call, norms, rows, most_dropped, extents.max_keep)
    s5_mean.launch(call, norms.table, rows, target_key, basis, tokens, indices, extents, options.blend)


def score(
    x: Tensor, basis: int = 10, *, select: Select = "fps", device_class: str | None = None, **options: Any
) -> Call:
    """Returns the launches of the op `score`; its arguments are already checked."""
    (B, N, _), chosen = x.shape, Options(basis, select=select, **options)
    e_sq = torch.empty(B, N, dtype=torch.float32, device=x.device)
    basis_indices = torch.empty(B, basis, dtype=torch.int64, device=x.device)
    call = Call(x, B, N, (e_sq, basis_indices), device_class)
    if B > 0:
        norms = s1_norms.launch(call, Extents(N, 0), chosen.start)
        s1_s3_sweep.launch(call, norms, basis_indices, e_sq, chosen.select, chosen.ridge)
    return call


def merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None, device_class: str | None = None) -> Call:
    """Returns the launches of the op `merge`; its arguments are already checked."""
    (B, N, D), K = x.shape, indices.shape[1]
    tokens = torch.empty(B, K, D, dtype=x.dtype, device=x.device)
    call = Call(x, B, N, (tokens,), device_class)
    if B > 0:
        extents = Extents(K, 0)
        norms = s1_norms.launch(call, extents)
        rows = s4_given_rows.launch(call, norms.table, indices, targets)
        target_key = s5_assign.launch(call, norms, rows, N - 1, K)  # repeated indices leave more than N - K tokens
        # No row is unfilled and none holds a basis token, so s5_mean reads neither indices nor a basis.
        s5_mean.launch(call, norms.table, rows, target_key, indices, tokens, indices, extents)
    return call
