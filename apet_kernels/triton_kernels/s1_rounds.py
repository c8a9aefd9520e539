"""Second launch of each round: updates every token with the picks of the round.

    z        = X_picks X^T - Y_picks^T Y          one product with the picks, one reading of X
    y        = L^-1 z                             forward substitution
    resid_sq = resid_sq - sum y^2                 and e_sq, as s4 ranks it

Programs are (image, tile of BLOCK_R tokens). Products are bitwise those of s5_assign, so a copy of a pick has the
products of the pick. z is stored in the rows of y, where the substitution replaces it pick by pick.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..options import FEW, POOL, ROUNDS
from . import configs
from .call import Call
from .device import FLT_MAX, U, at, dot_rows, image_of, jit, weighted
from .s1_norms import Norms


class State(NamedTuple):
    """The tensors and sizes that the launches of all rounds share."""

    basis: Tensor  # [images, M] int64
    limit: int  # the most basis tokens of an image, which also has at most as many as it keeps
    rounds: int
    most: int  # the most picks of a round
    progress: Tensor  # [images, 2] int32
    y: Tensor  # [M, all tokens] float32
    L: Tensor  # [images, most, most] float32
    inv_diag: Tensor  # [images, most] float32
    rank: Tensor  # [all tokens] int32
    pool: Tensor  # [images, POOL most] int32
    gram: Tensor  # [images, POOL most, POOL most] float32
    pool_y: Tensor  # [images, most, POOL most] float32


def new_state(call: Call, basis: int | None, max_keep: int, ragged: bool) -> State:
    """Allocates the tensors for the rounds of every image. Ragged images of few basis tokens have a round for each of
    them."""
    M = max_keep if basis is None else min(basis, max_keep)
    many = M > FEW
    most = -(-M // ROUNDS) if many else 1
    P = POOL * most
    return State(
        basis=call.new(torch.int64, call.images, M),
        limit=2**31 if basis is None else basis,
        rounds=(FEW if ragged else ROUNDS) if many else M,
        most=most,
        progress=call.new(torch.int32, call.images, 2),
        y=call.new(torch.float32, M, call.all_tokens),
        L=call.new(torch.float32, call.images, most, most),
        inv_diag=call.new(torch.float32, call.images, most),
        rank=call.new(torch.int32, call.all_tokens),
        pool=call.new(torch.int32, call.images, P),
        gram=call.new(torch.float32, call.images, P, P),
        pool_y=call.new(torch.float32, call.images, most, P),
    )


@triton.jit
def y_products(y, n, m, n_in, begin, all_tokens, BLOCK_K: tl.constexpr):
    """Returns Y_n^T Y_m [A, B] float32 over the rows of y before `begin`, for tokens n [A] and m [B] of an image.

    Every m is a token, also of columns that are not used: a mask of m would take registers that s1_rounds lacks.
    """
    k = tl.arange(0, BLOCK_K)
    product = tl.zeros((n.shape[0], m.shape[0]), tl.float32)
    for k0 in range(0, begin, BLOCK_K):
        at_k = y + (k0 + k).to(tl.int64) * all_tokens
        earlier = k0 + k < begin
        a = tl.load(at_k[None, :] + n[:, None], mask=n_in[:, None] & earlier[None, :], other=0.0)
        b = tl.load(at_k[None, :] + m[:, None], mask=earlier[None, :], other=0.0)
        product = tl.dot(a, b.T, product, input_precision="ieee")
    return product


@jit
def s1_rounds(
    x,
    table,  # [images, FIELDS] int64
    norm_sq,  # [all_tokens] float32
    resid_sq,  # [all_tokens] float32, updated
    y,  # [M, all_tokens] float32, the rows of this round written
    basis,  # [images, M] int64
    progress,  # [images, 2] int32
    L,  # [images, most, most] float32
    inv_diag,  # [images, most] float32
    e_sq,  # [all_tokens] float32, written
    weights,  # [all_tokens] float32, if WEIGHTED
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    M: tl.int32,
    limit: tl.int64,
    most: tl.int32,
    tiles: tl.int32,  # of one image
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    s = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    base, token, _, tokens, _, keep = image_of(table, s)
    begin = tl.load(progress + s * 2)
    size = tl.load(progress + s * 2 + 1)
    n = (tile * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    inside = n < tokens
    own = token + n
    t = tl.arange(0, BLOCK_T)
    k = tl.arange(0, BLOCK_K)
    if tile * BLOCK_R < tokens:
        rows = at(x, base + n * stride_xn, ALIGN)
        width = tl.where(size > 0, D, 0)
        for t0 in range(0, size, BLOCK_T):
            is_pick = t0 + t < size
            p = tl.load(basis + s * M + begin + t0 + t, mask=is_pick, other=0)
            columns = at(x, base + p * stride_xn, ALIGN)
            product = dot_rows(rows, columns, inside, is_pick, width, D, BLOCK_D)
            product -= y_products(y + token, n, p, inside, begin, all_tokens, BLOCK_K)
            z = y + (begin + t0 + t).to(tl.int64)[None, :] * all_tokens + own[:, None]
            tl.store(z, product, mask=inside[:, None] & is_pick[None, :])
        tl.debug_barrier()  # other threads read z
        total = tl.zeros((BLOCK_R,), tl.float64)
        for j in range(0, size):
            y_j = y + (begin + j).to(tl.int64) * all_tokens + own
            value = tl.load(y_j, mask=inside, other=0.0).to(tl.float64)
            for k0 in range(0, j, BLOCK_K):
                earlier = k0 + k < j
                l_j = tl.load(L + (s * most + j) * most + k0 + k, mask=earlier, other=0.0)
                above = y + (begin + k0 + k).to(tl.int64)[:, None] * all_tokens + own[None, :]
                block = tl.load(above, mask=earlier[:, None] & inside[None, :], other=0.0)
                value -= tl.sum(l_j[:, None].to(tl.float64) * block.to(tl.float64), 0)
            value = value * tl.load(inv_diag + s * most + j).to(tl.float64)
            tl.debug_barrier()  # several threads hold each element, and all must read it before one of them writes it
            tl.store(y_j, value.to(tl.float32), mask=inside)
            total += value * value
            tl.debug_barrier()  # other threads read y
        n_norm_sq = tl.load(norm_sq + own, mask=inside, other=0.0)
        n_resid_sq = tl.load(resid_sq + own, mask=inside, other=0.0)
        tl.debug_barrier()  # as above
        n_resid_sq = (n_resid_sq - total).to(tl.float32)
        tl.store(resid_sq + own, n_resid_sq, mask=inside)
        rounding = tl.minimum(limit, keep).to(tl.float32) * (4 * U)
        n_e_sq = tl.where(n_resid_sq > n_norm_sq * rounding, n_resid_sq, 0.0)
        n_e_sq = weighted(weights + own, n_e_sq, inside, WEIGHTED)
        tl.store(e_sq + own, tl.where(n_norm_sq <= FLT_MAX, n_e_sq, float("inf")), mask=inside)


def launch(call: Call, norms: Norms, state: State, e_sq: Tensor) -> None:
    """Adds the launch of s1_rounds for one round. The last one fills e_sq [all tokens] float32."""
    t = call.tiles
    tiles = max(-(-call.max_tokens // min(t.assign_r, 64)), 1)
    args = {
        "x": call.x,
        "table": norms.table,
        "norm_sq": norms.norm_sq,
        "resid_sq": norms.resid_sq,
        "y": state.y,
        "basis": state.basis,
        "progress": state.progress,
        "L": state.L,
        "inv_diag": state.inv_diag,
        "e_sq": e_sq,
        "weights": norms.weights,
        "stride_xn": call.x.stride(-2),
        "all_tokens": call.all_tokens,
        "M": state.basis.shape[1],
        "limit": state.limit,
        "most": state.most,
        "tiles": tiles,
    }
    constants = {
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_R": min(t.assign_r, 64),
        "BLOCK_T": min(t.assign_t, 64),
        "BLOCK_D": min(t.assign_d, max(configs.power_of_2(call.dim), 16)),
        "BLOCK_K": 16,
        "WEIGHTED": norms.constants["WEIGHTED"],
    }
    # On AMD three tiles of input in flight take up to 256 registers, and for some D more: they would spill.
    stages = min(t.assign_stages, 2) if call.device_class.startswith("gfx") else t.assign_stages
    call.add(s1_rounds, call.images * tiles, args, constants, t.assign_warps, stages)
