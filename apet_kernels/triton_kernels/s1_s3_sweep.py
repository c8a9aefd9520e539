"""Launches 2 to M + 1: each computes a step of basis, solve and residual, in one sweep over the tokens.

With the newest basis token p (S gains the row p, A = S S^T + ridge I = L L^T the row l, docs/algorithm.md):

    l = y[:, p]          pivot = ||p||^2 + ridge - l.l          y_k = (x.p - l.y) / sqrt(pivot)
    dist_sq = min(dist_sq, ||x - p||^2)                         resid_sq = ||x||^2 - ||y||^2

and after the last of the M steps, with W = y^T L^-1:  e_sq = resid_sq - ridge ||w||^2.

Programs are (image, tile of BLOCK_N tokens), as in s1_norms. Each program first takes the maximum of the candidates of
the previous launch, so no launch waits for the host and none needs an atomic. It then reads its tile of x once, and p
from L2. The distance is the norm of the difference and not an expansion in dot products: it is exactly 0 if a token
repeats p, in whatever order the compiler adds, and the two additional operations are hidden by the load. Values that
are computed once per token, not once per feature, are float64, because float32 rounding errors would add up over the
steps. float64 costs little on sm_80, sm_90 and sm_100; on other GPUs it costs more (docs/cuda.md), not measured.

    x [N, D] --read once per step--> y[k], dist_sq, resid_sq [N]      candidates [PARTIALS] for the next launch
"""

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call
from .device import FLT_MAX, U, at, image_of, jit, pack, tile_rows, unpack_position, weighted
from .s1_norms import SWEEP_REGISTERS, Norms


@jit
def s1_s3_sweep(
    x,
    table,  # [images, FIELDS] int64
    norm_sq,  # [all_tokens] float32
    dist_sq,  # [all_tokens] float32, updated; 0 for basis tokens and those whose norm is not finite
    resid_sq,  # [all_tokens] float32, updated
    y,  # [M, all_tokens] float32, row `step` written
    L_inv,  # [images, M, M] float64, row `step` written
    candidates,  # [2, images, PARTIALS] int64: halves read and written in turn
    basis,  # [images, M] int64, column `step` written: a position, or -1 once there is nothing left to pick
    e_sq,  # [all_tokens] float32, written by the last step
    weights,  # [all_tokens] float32, if WEIGHTED
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    images: tl.int64,
    step: tl.int32,
    M: tl.int32,
    qr: tl.int32,  # select="qr": the next candidate has the largest resid_sq, not the largest dist_sq
    ridge: tl.float32,
    programs: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,  # M rounded up to a power of 2
    SUM: tl.constexpr,  # the dtype of sums over D
    PARTIALS: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    s = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    base, token, _, tokens, _, _ = image_of(table, s)
    last = step == M - 1

    q = tl.arange(0, PARTIALS)
    half = step % 2
    keys = tl.load(candidates + (half * images + s) * PARTIALS + q, mask=q < programs, other=0)
    candidate = tl.max(keys, 0)
    pick_value = (candidate >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    p_norm_sq = tl.load(norm_sq + token + unpack_position(candidate), mask=candidate > 0, other=0.0)
    picked = (candidate > 0) & ((qr == 0) | (pick_value + ridge > p_norm_sq * (4 * U)))
    if WEIGHTED:  # pick_value is no residual then; the pivot decides, below
        picked = candidate > 0
    p = tl.where(picked, unpack_position(candidate), -1)

    j = tl.arange(0, BLOCK_M)
    earlier = j < step
    L_size = tl.where(picked, step, 0)
    L_row = tl.load(y + j * all_tokens + token + p, mask=j < L_size, other=0.0).to(tl.float64)  # [BLOCK_M]
    pivot = p_norm_sq.to(tl.float64) + ridge - tl.sum(L_row * L_row, 0)
    independent = picked & (pivot > p_norm_sq * (4 * U))
    if WEIGHTED:
        picked = picked & ((qr == 0) | (step == 0) | independent)
        p = tl.where(picked, p, -1)
    inv_diag = tl.where(independent, 1.0 / tl.sqrt(tl.where(independent, pivot, 1.0)), 0.0)
    L_inv_row = tl.zeros((BLOCK_M,), tl.float64)
    if (tile == 0) | last:
        L_inv_above = tl.load(
            L_inv + (s * M + j[:, None]) * M + j[None, :], mask=earlier[:, None] & earlier[None, :], other=0.0
        )
        L_inv_row = (tl.where(j == step, 1.0, 0.0) - tl.sum(L_row[:, None] * L_inv_above, 0)) * inv_diag
        if tile == 0:
            tl.store(L_inv + (s * M + step) * M + j, L_inv_row, mask=j < M)
            tl.store(basis + s * M + step, p)

    d = tl.arange(0, BLOCK_D)
    width = tl.where(picked, D, 0)
    p_row = at(x, base + p * stride_xn, ALIGN)
    best = tl.zeros((BLOCK_N,), tl.int64)
    for t in range(tile, tl.cdiv(tokens, BLOCK_N), programs):
        n, inside, rows = tile_rows(x, base, stride_xn, t, tokens, ALIGN, BLOCK_N)
        products = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        squares = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        for d0 in range(0, width, BLOCK_D):  # not D: with a constant bound the compiler would unroll, and spill
            within = d0 + d < D
            v = tl.load(rows[:, None] + (d0 + d)[None, :], mask=inside[:, None] & within[None, :], other=0.0)
            c = tl.load(p_row + d0 + d, mask=d0 + d < width, other=0.0)
            v = v.to(SUM)
            c = tl.broadcast_to(c.to(SUM)[None, :], (BLOCK_N, BLOCK_D))
            products = tl.fma(v, c, products)
            squares = tl.fma(v - c, v - c, squares)
        own = token + n
        y_above = tl.load(
            y + j[:, None] * all_tokens + own[None, :], mask=earlier[:, None] & inside[None, :], other=0.0
        )
        y_row = (tl.sum(products, 1).to(tl.float64) - tl.sum(L_row[:, None] * y_above, 0)) * inv_diag
        n_resid_sq = tl.load(resid_sq + own, mask=inside, other=0.0)
        n_dist_sq = tl.load(dist_sq + own, mask=inside, other=0.0)
        tl.debug_barrier()  # several threads hold each element, and all must read it before one of them writes it
        n_resid_sq = (n_resid_sq - y_row * y_row).to(tl.float32)
        to_p = tl.where(picked & (qr == 0), tl.sum(squares, 1).to(tl.float32), float("inf"))
        n_dist_sq = tl.where(to_p < n_dist_sq, to_p, n_dist_sq)
        n_dist_sq = tl.where(n == p, 0.0, n_dist_sq)
        if last:
            all_y = tl.where((j == step)[:, None], y_row[None, :], y_above)
            w_sq = tl.zeros((BLOCK_N,), tl.float64)
            for k in range(0, step + 1):
                column = tl.load(L_inv + (s * M + j) * M + k, mask=earlier, other=0.0)
                column = tl.where(j == step, tl.sum(tl.where(j == k, L_inv_row, 0.0), 0), column)
                w = tl.sum(column[:, None] * all_y, 0)
                w_sq += w * w
            n_norm_sq = tl.load(norm_sq + own, mask=inside, other=0.0)
            n_e_sq = (n_resid_sq - ridge * w_sq).to(tl.float32)
            n_e_sq = tl.where(n_e_sq > n_norm_sq * M * (4 * U), n_e_sq, 0.0)  # below this it is rounding
            n_e_sq = weighted(weights + own, n_e_sq, inside, WEIGHTED)
            tl.store(e_sq + own, tl.where(n_norm_sq <= FLT_MAX, n_e_sq, float("inf")), mask=inside)
        else:
            tl.store(y + step.to(tl.int64) * all_tokens + own, y_row, mask=inside)
            tl.store(resid_sq + own, n_resid_sq, mask=inside)
            tl.store(dist_sq + own, n_dist_sq, mask=inside)
            n_pick_value = weighted(weights + own, tl.where(qr == 0, n_dist_sq, n_resid_sq), inside, WEIGHTED)
            best = tl.maximum(best, tl.where(inside & (n_dist_sq > 0) & (n_pick_value > 0), pack(n_pick_value, n), 0))
    found = tl.where(picked, tl.max(best, 0), 0)  # after a step that picked nothing there are no more candidates
    tl.store(candidates + ((1 - half) * images + s) * PARTIALS + tile, found)


def launch(call: Call, norms: Norms, basis: Tensor, e_sq: Tensor, select: str, ridge: float) -> None:
    """Adds the M launches of s1_s3_sweep. They fill basis [images, M] int64 and e_sq [all tokens] float32."""
    M = basis.shape[1]
    args = {
        "x": call.x,
        "table": norms.table,
        "norm_sq": norms.norm_sq,
        "dist_sq": norms.dist_sq,
        "resid_sq": norms.resid_sq,
        "y": call.new(torch.float32, M, call.all_tokens),
        "L_inv": call.new(torch.float64, call.images, M, M),
        "candidates": norms.candidates,
        "basis": basis,
        "e_sq": e_sq,
        "weights": norms.weights,
        "stride_xn": call.x.stride(-2),
        "all_tokens": call.all_tokens,
        "images": call.images,
        "M": M,
        "qr": int(select == "qr"),
        "ridge": ridge,
        "programs": norms.programs,
    }
    constants = {**norms.constants, "BLOCK_M": configs.block_m(M)}
    programs, warps = call.images * norms.programs, call.tiles.sweep_warps
    for step in range(M):
        call.add(s1_s3_sweep, programs, {**args, "step": step}, constants, warps, registers=SWEEP_REGISTERS)
