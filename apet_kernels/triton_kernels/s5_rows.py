"""In place of launches 2 to M + 2, for rows chosen elsewhere (the op `merge`): which tokens they leave over.

    dropped = the positions that indices [K] do not hold, ascending

One program per image: mark the listed positions, then compact the unmarked.
"""

import triton.language as tl

from .device import COUNT, DROPPED, FIELDS, KEEP, ROW, TOKEN, field, jit


@jit
def s5_rows(
    indices,  # [S, K] int64, any values
    targets,  # [S, K] bool: which rows may be merged into; read only if `chosen`
    images,  # [S, FIELDS] int64
    marks,  # [tokens] int32, scratch
    kept,  # [S, K] int32, written: indices clamped into the image
    source,  # [S, K] int32, written: -1, or -2 for rows that take nothing
    dropped,  # [tokens] int32, written
    stride_ib: tl.int64,
    stride_ik: tl.int64,
    stride_tb: tl.int64,
    stride_tk: tl.int64,
    chosen: tl.int32,
    CHUNK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    token = field(images, s, TOKEN)
    count = field(images, s, COUNT)
    row = field(images, s, ROW)
    keep = field(images, s, KEEP)
    c = tl.arange(0, CHUNK)
    marks += token

    for c0 in range(0, count, CHUNK):
        tl.store(marks + c0 + c, 0, mask=c0 + c < count)
    tl.debug_barrier()  # every mark is cleared before any is set
    flagged = tl.where(chosen != 0, keep, 0)
    for c0 in range(0, keep, CHUNK):
        k = c0 + c
        position = tl.load(indices + s * stride_ib + k * stride_ik, mask=k < keep, other=0)
        position = tl.minimum(tl.maximum(position, 0), count - 1)
        tl.store(marks + position, 1, mask=k < keep)
        tl.store(kept + row + k, position.to(tl.int32), mask=k < keep)
        flag = tl.load(targets + s * stride_tb + k * stride_tk, mask=k < flagged, other=1)
        tl.store(source + row + k, tl.where(flag != 0, -1, -2), mask=k < keep)
    tl.debug_barrier()

    rows = 0
    for c0 in range(0, count, CHUNK):
        inside = c0 + c < count
        free = inside & (tl.load(marks + c0 + c, mask=inside, other=1) == 0)
        r = rows + tl.cumsum(free.to(tl.int32), 0) - 1
        tl.store(dropped + token + r, (c0 + c).to(tl.int32), mask=free)
        rows += tl.sum(free.to(tl.int32), 0)
    tl.store(images + s * FIELDS + DROPPED, rows.to(tl.int64))
