"""Launch M + 3: the target of every dropped token.

    to[r] = arg max_t  x_r . x_t / ||x_t||        (the length of x_r changes no arg-max), ties to the earlier row

Programs are (image, tile of BLOCK_R dropped tokens, share of the targets). A program forms its tile's similarities with
BLOCK_T targets after BLOCK_T targets on the tensor cores and keeps the best of each row in registers: the [n - K, K]
matrix exists nowhere. Small images have few tiles, so `shares` programs divide the targets between them, and the next
launch takes the maximum of their packed keys: an integer, so it does not matter who computed which.

A tile's sum over D runs in steps of BLOCK_D in order, inside one matrix instruction after the other: float32 input is
multiplied as IEEE float32, never tf32.

    dropped rows of x: once per share; targets: once per tile, from L2      best [shares, tokens] int64
"""

import triton.language as tl

from .device import BASE, DROPPED, FLT_MAX, KEEP, ROW, TOKEN, at, field, jit


@jit
def s5_assign(
    x,
    images,  # [S, FIELDS] int64
    norm2,  # [tokens] float32
    kept,  # [rows] int32
    source,  # [rows] int32: only rows with -1 are targets
    dropped,  # [tokens] int32
    best,  # [shares, tokens] int64, written: key of similarity and row, or -1 for none
    stride_xn: tl.int64,
    tokens: tl.int64,
    tiles: tl.int32,  # of one image
    shares: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    share = tl.program_id(0) % shares
    tile = (tl.program_id(0) // shares) % tiles
    s = (tl.program_id(0) // shares // tiles).to(tl.int64)
    base = field(images, s, BASE)
    token = field(images, s, TOKEN)
    row = field(images, s, ROW)
    keep = field(images, s, KEEP)
    left = field(images, s, DROPPED)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    if tile * BLOCK_R < left:
        has_row = r < left
        n = tl.load(dropped + token + r, mask=has_row, other=0)
        movable = has_row & (tl.load(norm2 + token + n, mask=has_row, other=0.0) <= FLT_MAX)
        rows = at(x, base + n.to(tl.int64) * stride_xn, ALIGN)
        d = tl.arange(0, BLOCK_D)
        width = tl.where(left > 0, D, 0)  # D, as no constant: the compiler would unroll the loop over it, and spill
        similarity = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        target = tl.full((BLOCK_R,), -1, tl.int32)
        for t0 in range(share * BLOCK_T, keep, shares * BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            is_row = t < keep
            m = tl.load(kept + row + t, mask=is_row, other=0)
            sq = tl.load(norm2 + token + m, mask=is_row, other=0.0)
            allowed = is_row & (tl.load(source + row + t, mask=is_row, other=-2) == -1) & (sq <= FLT_MAX)
            columns = at(x, base + m.to(tl.int64) * stride_xn, ALIGN)
            product = tl.zeros((BLOCK_R, BLOCK_T), tl.float32)
            for d0 in range(0, width, BLOCK_D):
                within = d0 + d < D
                a = tl.load(rows[:, None] + (d0 + d)[None, :], mask=movable[:, None] & within[None, :], other=0.0)
                b = tl.load(columns[:, None] + (d0 + d)[None, :], mask=allowed[:, None] & within[None, :], other=0.0)
                product = tl.dot(a, b.T, product, input_precision="ieee")
            scale = tl.where(allowed & (sq > 0), tl.div_rn(1.0, tl.sqrt_rn(tl.where(sq > 0, sq, 1.0))), 0.0)
            product = tl.where(allowed[None, :], product * scale[None, :], float("-inf"))
            here, which = tl.max(product, 1, return_indices=True, return_indices_tie_break_left=True)
            better = here > similarity  # an earlier tile keeps a tie
            similarity = tl.where(better, here, similarity)
            target = tl.where(better, (t0 + which).to(tl.int32), target)
        goes = (target >= 0) & movable  # a token that is not finite goes nowhere
        bits = (similarity + 0.0).to(tl.int32, bitcast=True)  # -0 is +0
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000  # unsigned and monotone
        key = (order << 31) | (0x7FFFFFFF - target.to(tl.int64))
        tl.store(best + share * tokens + token + r, tl.where(goes, key, -1), mask=has_row)
