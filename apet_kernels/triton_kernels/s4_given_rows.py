"""In place of launches 2 to M + 2, for rows that the caller has chosen (the op `merge`): lists the tokens to merge.

    dropped = the positions that indices [K] do not hold, ascending

One program per image marks the listed positions, then compacts the others.
"""

import torch
import triton.language as tl
from torch import Tensor

from .call import Call, Rows, new_rows
from .device import COPIED, DROPPED_COUNT, FIELDS, TARGET, image_of, jit


@jit
def s4_given_rows(
    indices,  # [images, K] int64, any values
    targets,  # [images, K] bool: which rows may be merged into; read only if `chosen`
    table,  # [images, FIELDS] int64, DROPPED_COUNT written
    marks,  # [all_tokens] int32, scratch
    kept,  # [images, K] int32, written: indices clamped into the image
    row_basis,  # [images, K] int32, written
    dropped,  # [all_tokens] int32, written
    stride_ib: tl.int64,
    stride_ik: tl.int64,
    stride_tb: tl.int64,
    stride_tk: tl.int64,
    chosen: tl.int32,
    CHUNK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    _, token, _, tokens, row, keep = image_of(table, s)
    c = tl.arange(0, CHUNK)
    marks += token

    for c0 in range(0, tokens, CHUNK):
        tl.store(marks + c0 + c, 0, mask=c0 + c < tokens)
    tl.debug_barrier()  # all marks are cleared before one is set
    flagged = tl.where(chosen != 0, keep, 0)
    for c0 in range(0, keep, CHUNK):
        k = c0 + c
        position = tl.load(indices + s * stride_ib + k * stride_ik, mask=k < keep, other=0)
        position = tl.minimum(tl.maximum(position, 0), tokens - 1)
        tl.store(marks + position, 1, mask=k < keep)
        tl.store(kept + row + k, position.to(tl.int32), mask=k < keep)
        flag = tl.load(targets + s * stride_tb + k * stride_tk, mask=k < flagged, other=1)
        tl.store(row_basis + row + k, tl.where(flag != 0, TARGET, COPIED), mask=k < keep)
    tl.debug_barrier()  # all marks are set

    dropped_count = 0
    for c0 in range(0, tokens, CHUNK):
        inside = c0 + c < tokens
        unmarked = inside & (tl.load(marks + c0 + c, mask=inside, other=1) == 0)
        r = dropped_count + tl.cumsum(unmarked.to(tl.int32), 0) - 1
        tl.store(dropped + token + r, (c0 + c).to(tl.int32), mask=unmarked)
        dropped_count += tl.sum(unmarked.to(tl.int32), 0)
    tl.store(table + s * FIELDS + DROPPED_COUNT, dropped_count.to(tl.int64))


def launch(call: Call, table: Tensor, indices: Tensor, targets: Tensor | None) -> Rows:
    """Adds the launch of s4_given_rows. It fills DROPPED_COUNT of the table."""
    rows = new_rows(call, indices.numel())
    flags = (table if targets is None else targets).view(torch.int8)
    args = {
        "indices": indices,
        "targets": flags,
        "table": table,
        "marks": call.new(torch.int32, call.all_tokens),
        **rows._asdict(),
        "stride_ib": indices.stride(0),
        "stride_ik": indices.stride(1),
        "stride_tb": flags.stride(0),
        "stride_tk": flags.stride(1),
        "chosen": int(targets is not None),
    }
    call.add(s4_given_rows, call.images, args, {"CHUNK": call.tiles.topk_chunk}, call.tiles.topk_warps)
    return rows
