"""Launch M + 4: the rows of the result.

    tokens[j] = (x_j + sum of the dropped tokens that go to j) / (1 + their count)      in float32, ascending position

One program per row of an image's result (kept, then appended). It scans the targets of the dropped tokens CHUNK at a
time, so a dropped token's features are read by the one program that adds them, and the list of who goes where needs
neither a sort nor an atomic: within a chunk the tokens of row j are stored behind those of rows below j, whose number
the same scan counts, so every program knows its own place. GROUP rows are in flight at once, added one by one.

    best [shares, n] --once a row, from L2/L1-->  members (scratch)      x [dropped] --once-->  tokens [R, D]

Rows that no image fills (ragged input with offsets that lie) are set to zero here, and their indices to 0.
"""

import triton.language as tl

from .device import BASE, COUNT, DROPPED, END, KEEP, ROW, TOKEN, at, field, jit


@jit
def s5_mean(
    x,
    images,  # [S, FIELDS] int64
    kept,  # [rows] int32
    source,  # [rows] int32: -1, or the basis token that overwrites the row, or -2: copied
    dropped,  # [tokens] int32
    best,  # [shares, tokens] int64
    members,  # [tokens] int32, scratch
    basis,  # [S, M] int64; not read by the op `merge`
    result,  # [rows, D], written
    indices,  # [rows] int64, written where no image fills a row
    stride_xn: tl.int64,
    tokens: tl.int64,
    M: tl.int32,
    appended: tl.int64,
    blend: tl.float32,
    rows_per_image: tl.int32,
    shares: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of 2
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
):
    s = (tl.program_id(0) // rows_per_image).to(tl.int64)
    j = tl.program_id(0) % rows_per_image
    base = field(images, s, BASE)
    token = field(images, s, TOKEN)
    count = field(images, s, COUNT)
    row = field(images, s, ROW)
    keep = field(images, s, KEEP)
    end = field(images, s, END)
    left = field(images, s, DROPPED)
    d = tl.arange(0, BLOCK_D)
    filled = tl.where(count > 0, keep + appended, 0)

    if j < filled:
        comes_from = tl.load(source + row + j, mask=j < keep, other=0)
        position = tl.load(kept + row + j, mask=j < keep, other=0).to(tl.int64)
        if (j >= keep) | (comes_from >= 0):
            k = tl.where(j < keep, comes_from, j - keep)
            p = tl.load(basis + s * M + k)
            p = tl.where(p >= 0, p, tl.maximum(tl.load(basis + s * M), 0))
            picked = tl.load(at(x, base + p * stride_xn, ALIGN) + d, mask=d < D)
            if (j < keep) & (blend != 1.0):
                under = tl.load(at(x, base + position * stride_xn, ALIGN) + d, mask=d < D).to(tl.float32)
                mixed = tl.fma(picked.to(tl.float32), blend, under * (1.0 - blend))
                picked = mixed.to(picked.dtype)
            tl.store(at(result, (row + j) * D, ALIGN) + d, picked, mask=d < D)
        else:
            own = tl.load(at(x, base + position * stride_xn, ALIGN) + d, mask=d < D)
            total = own.to(tl.float32)
            received = tl.full((), 0, tl.int32)
            c = tl.arange(0, CHUNK)
            for c0 in range(0, left, CHUNK):
                inside = c0 + c < left
                key = tl.load(best + token + c0 + c, mask=inside, other=-1)
                for share in range(1, shares):
                    other = tl.load(best + share * tokens + token + c0 + c, mask=inside, other=-1)
                    key = tl.maximum(key, other)
                to = tl.where(key >= 0, 0x7FFFFFFF - (key & 0x7FFFFFFF), 0x7FFFFFFF)
                mine = to == j
                here = tl.sum(mine.to(tl.int32), 0)
                if here > 0:
                    place = members + token + c0 + tl.sum((to < j).to(tl.int32), 0)
                    n = tl.load(dropped + token + c0 + c, mask=mine, other=0)
                    tl.store(place + tl.cumsum(mine.to(tl.int32), 0) - 1, n, mask=mine)
                    tl.debug_barrier()  # members are read by other threads than stored them
                    for g in range(0, here, GROUP):
                        for i in tl.static_range(GROUP):
                            there = g + i < here
                            n_i = tl.load(place + g + i, mask=there, other=0).to(tl.int64)
                            width = tl.where(there, D, 0)
                            added = tl.load(at(x, base + n_i * stride_xn, ALIGN) + d, mask=d < width, other=0.0)
                            total = tl.where(there, total + added.to(tl.float32), total)
                    received += here
            mean = tl.div_rn(total, tl.zeros_like(total) + (1 + received).to(tl.float32)).to(own.dtype)
            own = tl.where(received > 0, mean, own)  # a row that receives nothing is copied bit for bit
            tl.store(at(result, (row + j) * D, ALIGN) + d, own, mask=d < D)

    # Blank rows: after this image's own, and before those of the first image.
    lead = tl.where(s == 0, row, 0)
    for i in range(j, lead + end - row - filled, rows_per_image):
        blank = tl.where(i < lead, i, row + filled + i - lead)
        tl.store(at(result, blank * D, ALIGN) + d, tl.zeros((BLOCK_D,), result.dtype.element_ty), mask=d < D)
        tl.store(indices + blank, 0)
