"""Launches 2 to M + 1: one step of basis, solve and residual, in one sweep over the tokens.

With the newest basis token p (S gains the row p, A = S S^T + ridge I = L L^T the row l, docs/algorithm.md):

    l = y[:, p]          pivot = ||p||^2 + ridge - l.l          y_k = (x.p - l.y) / sqrt(pivot)
    nearest = min(nearest, ||x - p||^2)                         rest = ||x||^2 - ||y||^2

and after the last of the M steps, with W = y^T L^-1:  e^2 = rest - ridge ||w||^2.

Programs are (image, tile of BLOCK_N tokens), as in s1_norms. Each first takes the maximum of the candidates that the
launch before left, so that no launch waits for the host and none needs an atomic; then reads its tile of x once, with
p beside it from L2. The distance is the norm of the difference, not the expansion in dot products: it is 0 exactly
where a token repeats p, however the compiler orders the sum, and the two more operations hide behind the load. What is
done once per token and not once per channel is float64: its rounding would add up over the steps, its cost does not.

    x [n, D] --read once a step-->  y[k] [n], nearest [n], rest [n]      candidates [PARTIALS] for the next launch
"""

import triton.language as tl

from .device import BASE, COUNT, FLT_MAX, TOKEN, U, at, field, jit, pack, unpack_position


@jit
def s1_s3_step(
    x,
    images,  # [S, FIELDS] int64
    norm2,  # [tokens] float32
    nearest,  # [tokens] float32, updated: squared distance to the basis; 0 for basis tokens and those not finite
    rest,  # [tokens] float32, updated: ||x||^2 - ||y||^2
    y,  # [M, tokens] float32, row `step` written
    inverse,  # [S, M, M] float64, L^-1, row `step` written
    candidates,  # [2, S, PARTIALS] int64: halves read and written in turn
    basis,  # [S, M] int64, column `step` written: a position in the image, or -1 once there is nothing left to pick
    e2,  # [tokens] float32, written by the last step
    stride_xn: tl.int64,
    tokens: tl.int64,
    image_count: tl.int64,
    step: tl.int32,
    M: tl.int32,
    qr: tl.int32,  # select="qr": the next candidate has the largest rest, not the largest distance
    ridge: tl.float32,
    programs: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # M rounded up to a power of 2
    SUM: tl.constexpr,  # the dtype of sums over D
    PARTIALS: tl.constexpr,
):
    s = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    base = field(images, s, BASE)
    token = field(images, s, TOKEN)
    count = field(images, s, COUNT)
    last = step == M - 1

    q = tl.arange(0, PARTIALS)
    half = step % 2
    arrived = tl.load(candidates + (half * image_count + s) * PARTIALS + q, mask=q < programs, other=0)
    winner = tl.max(arrived, 0)
    value = (winner >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    norm_p = tl.load(norm2 + token + unpack_position(winner), mask=winner > 0, other=0.0)
    alive = (winner > 0) & ((qr == 0) | (value + ridge > norm_p * (4 * U)))
    p = tl.where(alive, unpack_position(winner), -1)

    j = tl.arange(0, BLOCK_M)
    earlier = j < step
    known_y = tl.where(alive, step, 0)
    new_l = tl.load(y + j * tokens + token + p, mask=j < known_y, other=0.0).to(tl.float64)  # [BLOCK_M]
    pivot = norm_p.to(tl.float64) + ridge - tl.sum(new_l * new_l, 0)
    independent = alive & (pivot > norm_p * (4 * U))
    inv = tl.where(independent, 1.0 / tl.sqrt(tl.where(independent, pivot, 1.0)), 0.0)
    new_row = tl.zeros((BLOCK_M,), tl.float64)  # of L^-1
    if (tile == 0) | last:
        known = tl.load(
            inverse + (s * M + j[:, None]) * M + j[None, :], mask=earlier[:, None] & earlier[None, :], other=0.0
        )
        new_row = (tl.where(j == step, 1.0, 0.0) - tl.sum(new_l[:, None] * known, 0)) * inv
        if tile == 0:
            tl.store(inverse + (s * M + step) * M + j, new_row, mask=j < M)
            tl.store(basis + s * M + step, p)

    d = tl.arange(0, BLOCK_D)
    width = tl.where(alive, D, 0)
    pointer_p = at(x, base + p * stride_xn, ALIGN)
    best = tl.zeros((BLOCK_N,), tl.int64)
    for t in range(tile, tl.cdiv(count, BLOCK_N), programs):
        n = t * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = n < count
        rows = at(x, base + n.to(tl.int64) * stride_xn, ALIGN)
        dots = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        squares = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        for d0 in range(0, width, BLOCK_D):  # not D: the compiler would unroll a constant bound, and spill
            within = d0 + d < D
            v = tl.load(rows[:, None] + (d0 + d)[None, :], mask=inside[:, None] & within[None, :], other=0.0)
            c = tl.load(pointer_p + d0 + d, mask=d0 + d < width, other=0.0)
            v = v.to(SUM)
            c = tl.broadcast_to(c.to(SUM)[None, :], (BLOCK_N, BLOCK_D))
            dots = tl.fma(v, c, dots)
            squares = tl.fma(v - c, v - c, squares)
        own = token + n
        rows_y = tl.load(y + j[:, None] * tokens + own[None, :], mask=earlier[:, None] & inside[None, :], other=0.0)
        new_y = (tl.sum(dots, 1).to(tl.float64) - tl.sum(new_l[:, None] * rows_y, 0)) * inv
        left = tl.load(rest + own, mask=inside, other=0.0)
        near = tl.load(nearest + own, mask=inside, other=0.0)
        tl.debug_barrier()  # several threads hold each element, and all have to read it before one writes it
        left = (left - new_y * new_y).to(tl.float32)
        distance = tl.where(alive & (qr == 0), tl.sum(squares, 1).to(tl.float32), float("inf"))
        near = tl.where(distance < near, distance, near)
        near = tl.where(n == p, 0.0, near)
        if last:
            all_y = tl.where((j == step)[:, None], new_y[None, :], rows_y)
            penalty = tl.zeros((BLOCK_N,), tl.float64)
            for k in range(0, step + 1):
                column = tl.load(inverse + (s * M + j) * M + k, mask=earlier, other=0.0)
                column = tl.where(j == step, tl.sum(tl.where(j == k, new_row, 0.0), 0), column)
                w = tl.sum(column[:, None] * all_y, 0)
                penalty += w * w
            sq = tl.load(norm2 + own, mask=inside, other=0.0)
            error = (left - ridge * penalty).to(tl.float32)
            error = tl.where(error > sq * M * (4 * U), error, 0.0)  # less is rounding
            tl.store(e2 + own, tl.where(sq <= FLT_MAX, error, float("inf")), mask=inside)
        else:
            tl.store(y + step.to(tl.int64) * tokens + own, new_y, mask=inside)
            tl.store(rest + own, left, mask=inside)
            tl.store(nearest + own, near, mask=inside)
            value_n = tl.where(qr == 0, near, left)
            best = tl.maximum(best, tl.where(inside & (near > 0) & (value_n > 0), pack(value_n, n), 0))
    found = tl.where(alive, tl.max(best, 0), 0)  # once nothing was left to pick, nothing is
    tl.store(candidates + ((1 - half) * image_count + s) * PARTIALS + tile, found)
