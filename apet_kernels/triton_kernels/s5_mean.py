"""Launch M + 4: computes the rows of the result.

    tokens[r] = (x_r + sum of the dropped tokens whose target is r) / (1 + their count)   in float32, ascending position

One program per row of an image's result (kept, then appended). It scans the targets of the dropped tokens CHUNK at a
time, so only the program that adds a dropped token reads its features. The list of the tokens of a row needs neither a
sort nor an atomic: within a chunk, the tokens of row r are stored behind those of lower rows, which the same scan
counts, so every program knows where its tokens go. UNROLL rows are loaded at once and added one by one.

    target_key [shares, N] --once per row, from L2/L1--> merged (scratch)     x [dropped] --once--> tokens [R, D]

Rows that no image fills (ragged input with wrong offsets) are set to zero, and their indices to 0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call, Rows
from .device import DROPPED_COUNT, ROW_END, at, field, image_of, jit
from .s1_norms import Extents


@triton.jit
def list_members(target_key, dropped, merged, token, c0, dropped_count, r, shares, all_tokens, CHUNK: tl.constexpr):
    """Lists the dropped tokens with target r among CHUNK tokens from c0 on. Returns their number, and where
    `merged` lists them, ascending."""
    c = tl.arange(0, CHUNK)
    inside = c0 + c < dropped_count
    key = tl.load(target_key + token + c0 + c, mask=inside, other=-1)
    for share in range(1, shares):
        other = tl.load(target_key + share * all_tokens + token + c0 + c, mask=inside, other=-1)
        key = tl.maximum(key, other)
    target = tl.where(key >= 0, 0x7FFFFFFF - (key & 0x7FFFFFFF), 0x7FFFFFFF)
    mine = target == r
    here = tl.sum(mine.to(tl.int32), 0)
    place = merged + token + c0 + tl.sum((target < r).to(tl.int32), 0)
    if here > 0:
        n = tl.load(dropped + token + c0 + c, mask=mine, other=0)
        tl.store(place + tl.cumsum(mine.to(tl.int32), 0) - 1, n, mask=mine)
        tl.debug_barrier()  # the threads that load `merged` are not those that stored it
    return here, place


@jit
def s5_mean(
    x,
    table,  # [images, FIELDS] int64
    kept,  # [all rows] int32
    row_basis,  # [all rows] int32
    dropped,  # [all_tokens] int32
    target_key,  # [shares, all_tokens] int64
    merged,  # [all_tokens] int32, scratch: positions of dropped tokens, grouped by row within a chunk
    basis,  # [images, M] int64; not read by the op `merge`
    result,  # [all rows, D], written
    indices,  # [all rows] int64, written where no image fills a row
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    M: tl.int32,
    appended: tl.int64,
    blend: tl.float32,
    rows_per_image: tl.int32,
    shares: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of 2
    CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    s = (tl.program_id(0) // rows_per_image).to(tl.int64)
    r = tl.program_id(0) % rows_per_image
    base, token, _, tokens, row, keep = image_of(table, s)
    row_end = field(table, s, ROW_END)
    dropped_count = field(table, s, DROPPED_COUNT)
    d = tl.arange(0, BLOCK_D)
    filled = tl.where(tokens > 0, keep + appended, 0)

    if r < filled:
        r_row_basis = tl.load(row_basis + row + r, mask=r < keep, other=0)
        position = tl.load(kept + row + r, mask=r < keep, other=0).to(tl.int64)
        if (r >= keep) | (r_row_basis >= 0):  # a basis token, appended or in place of a kept one
            k = tl.where(r < keep, r_row_basis, r - keep)
            p = tl.load(basis + s * M + k)
            p = tl.where(p >= 0, p, tl.maximum(tl.load(basis + s * M), 0))
            own = tl.load(at(x, base + p * stride_xn, ALIGN) + d, mask=d < D)
            if (r < keep) & (blend != 1.0):
                kept_row = tl.load(at(x, base + position * stride_xn, ALIGN) + d, mask=d < D).to(tl.float32)
                blended = tl.fma(own.to(tl.float32), blend, kept_row * (1.0 - blend))
                own = blended.to(own.dtype)
            tl.store(at(result, (row + r) * D, ALIGN) + d, own, mask=d < D)
        else:
            own = tl.load(at(x, base + position * stride_xn, ALIGN) + d, mask=d < D)
            total = own.to(tl.float32)
            received = tl.full((), 0, tl.int32)
            for c0 in range(0, dropped_count, CHUNK):
                here, place = list_members(
                    target_key, dropped, merged, token, c0, dropped_count, r, shares, all_tokens, CHUNK
                )
                if here > 0:
                    for g in range(0, here, UNROLL):
                        for i in tl.static_range(UNROLL):
                            there = g + i < here
                            n_i = tl.load(place + g + i, mask=there, other=0).to(tl.int64)
                            width = tl.where(there, D, 0)
                            added = tl.load(at(x, base + n_i * stride_xn, ALIGN) + d, mask=d < width, other=0.0)
                            total = tl.where(there, total + added.to(tl.float32), total)
                    received += here
            mean = tl.div_rn(total, tl.zeros_like(total) + (1 + received).to(tl.float32)).to(own.dtype)
            own = tl.where(received > 0, mean, own)  # a row that receives no token is copied bit for bit
            tl.store(at(result, (row + r) * D, ALIGN) + d, own, mask=d < D)

    # Unfilled rows: those after this image's own rows, and those before the rows of the first image.
    lead = tl.where(s == 0, row, 0)
    for i in range(r, lead + row_end - row - filled, rows_per_image):
        unfilled = tl.where(i < lead, i, row + filled + i - lead)
        tl.store(at(result, unfilled * D, ALIGN) + d, tl.zeros((BLOCK_D,), result.dtype.element_ty), mask=d < D)
        tl.store(indices + unfilled, 0)


def launch(
    call: Call,
    table: Tensor,
    rows: Rows,
    target_key: Tensor,
    basis: Tensor,
    result: Tensor,
    indices: Tensor,
    extents: Extents,
    blend: float = 1.0,
) -> None:
    """Adds the launch of s5_mean. It fills result [all rows, D], and indices [all rows] int64 of unfilled rows."""
    x, t = call.x, call.tiles
    rows_per_image = max(extents.max_keep + extents.appended, 1)
    args = {
        "x": x,
        "table": table,
        **rows._asdict(),
        "target_key": target_key,
        "merged": call.new(torch.int32, call.all_tokens),
        "basis": basis,
        "result": result,
        "indices": indices,
        "stride_xn": x.stride(-2),
        "all_tokens": call.all_tokens,
        "M": basis.shape[-1],
        "appended": extents.appended,
        "blend": blend,
        "rows_per_image": rows_per_image,
        "shares": target_key.shape[0],
    }
    constants = {
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_D": configs.power_of_2(call.dim),
        "CHUNK": t.mean_chunk,
        "UNROLL": t.mean_unroll,
    }
    call.add(s5_mean, call.images * rows_per_image, args, constants, t.mean_warps)
