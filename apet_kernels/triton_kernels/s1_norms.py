"""Launch 1: squared norms, and the first basis candidate of every tile.

    norm2[n] = ||x_n||^2        first basis token = arg max_n norm2[n], or `start`

Programs are (image, tile of BLOCK_N tokens); a program takes every `programs`-th tile of its image, so that however
large the image is, at most PARTIALS candidates are left for the next launch, which takes their maximum on arrival.

    x  [n, D] --read once-->  norm2 [n], nearest [n]    candidates [PARTIALS] a program's best key each

The first program of an image also writes its row of `images` (device.py): for ragged input from cu_seqlens and cu_keep,
whose entries are clamped into range and to their running maximum, so that images never overlap whatever they hold.
"""

import triton
import triton.language as tl

from .device import BASE, COUNT, DROPPED, END, FIELDS, FIRST, FLT_MAX, KEEP, ROW, TOKEN, at, jit, pack


@triton.jit
def _extent(cu, s, limit, CHUNK: tl.constexpr):
    """Running maxima of cu[0..s] and cu[0..s+1], clamped into [0, limit]."""
    j = tl.arange(0, CHUNK)
    lower = tl.zeros((CHUNK,), tl.int64)
    upper = tl.zeros((CHUNK,), tl.int64)
    for j0 in range(0, s + 2, CHUNK):
        entry = tl.load(cu + j0 + j, mask=j0 + j <= s + 1, other=0).to(tl.int64)
        entry = tl.minimum(tl.maximum(entry, 0), limit)
        upper = tl.maximum(upper, entry)
        lower = tl.maximum(lower, tl.where(j0 + j <= s, entry, 0))
    return tl.max(lower, 0), tl.max(upper, 0)


@jit
def s1_norms(
    x,  # [S, N, D], or ragged [T, D]
    cu_seqlens,  # [S + 1] int32, ragged only
    cu_keep,  # [S + 1] int32, ragged only
    images,  # [S, FIELDS] int64, written
    norm2,  # [tokens] float32, written: ||x||^2
    nearest,  # [tokens] float32, written: inf, or 0 where the norm is not finite: never a candidate
    rest,  # [tokens] float32, written: ||x||^2; what s1_s3_step takes ||y||^2 from
    candidates,  # [2, S, PARTIALS] int64, the first half written
    stride_xb: tl.int64,  # in elements, 0 for ragged input
    stride_xn: tl.int64,
    ragged: tl.int32,
    max_tokens: tl.int64,  # N, or max_seqlen
    max_keep: tl.int64,  # K, or max_keep
    image_count: tl.int64,
    total_tokens: tl.int64,  # T, ragged only
    total_keep: tl.int64,  # ragged only
    appended: tl.int64,  # rows that follow the kept ones: M with layout="append", else 0
    start: tl.int64,
    programs: tl.int32,  # of one image, at most PARTIALS
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTIALS: tl.constexpr,
    SUM: tl.constexpr,  # the dtype of sums over D
):
    s = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    if ragged != 0:
        first, end = _extent(cu_seqlens, s, total_tokens, 128)
        count = tl.minimum(end - first, max_tokens)
        row, row_end = _extent(cu_keep, s, total_keep, 128)
        keep = tl.minimum(tl.minimum(row_end - row, max_keep), count)
        row_end = tl.where(s == image_count - 1, total_keep, row_end)  # the last image owns what is left
        token = first
        base = first * stride_xn
    else:
        first = s * 0
        count = max_tokens
        row = s * max_keep
        row_end = row + max_keep
        keep = max_keep
        token = s * max_tokens
        base = s * stride_xb
    if tile == 0:
        mine = images + s * FIELDS
        tl.store(mine + BASE, base)
        tl.store(mine + TOKEN, token)
        tl.store(mine + FIRST, first)
        tl.store(mine + COUNT, count)
        tl.store(mine + ROW, row + s * appended)
        tl.store(mine + KEEP, keep)
        tl.store(mine + END, row_end + (s + 1) * appended)
        tl.store(mine + DROPPED, count - keep)

    chosen = tl.minimum(start, count - 1)
    d = tl.arange(0, BLOCK_D)
    best = tl.zeros((BLOCK_N,), tl.int64)
    for t in range(tile, tl.cdiv(count, BLOCK_N), programs):
        n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < count
        rows = at(x, base + n.to(tl.int64) * stride_xn, ALIGN)
        squares = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        for d0 in range(0, D, BLOCK_D):
            mask = inside[:, None] & (d0 + d < D)[None, :]
            v = tl.load(rows[:, None] + (d0 + d)[None, :], mask=mask, other=0.0).to(SUM)
            squares = tl.fma(v, v, squares)
        sq = tl.sum(squares, 1).to(tl.float32)
        finite = sq <= FLT_MAX  # false for NaN
        tl.store(norm2 + token + n, sq, mask=inside)
        tl.store(nearest + token + n, tl.where(finite, float("inf"), 0.0), mask=inside)
        tl.store(rest + token + n, sq, mask=inside)
        value = tl.where(n == chosen, float("inf"), sq)  # above every norm: `start` is taken whatever its norm
        best = tl.maximum(best, tl.where(inside & finite & (value > 0), pack(value, n), 0))
    tl.store(candidates + s * PARTIALS + tile, tl.max(best, 0))
