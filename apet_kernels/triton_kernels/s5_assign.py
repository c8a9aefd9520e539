"""Launch M + 3: finds the target of every dropped token.

    target[r] = arg max_t  x_r . x_t / ||x_t||     (scaling x_r changes no arg-max), ties to the earlier row

Programs are (image, tile of BLOCK_R dropped tokens, share of the targets). A program multiplies its tile with BLOCK_T
targets after BLOCK_T targets on the tensor cores and keeps the best of each row in registers: the [dropped, targets]
matrix is never stored. Small images have few tiles, so `shares` programs divide the targets between them, and the next
launch takes the maximum of their keys: integers, so the division does not change the result.

    dropped rows of x: once per share; targets: once per tile, from L2      target_key [shares, all_tokens] int64
"""

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call, Rows
from .device import DROPPED_COUNT, FLT_MAX, TARGET, at, dot_rows, field, image_of, jit
from .s1_norms import Norms

# Programs that fill the largest devices (132 to 304 multiprocessors). If dropped tokens make fewer tiles than this,
# several programs share the targets of a tile. More than 8 would not shorten s5_assign, since each program must load
# its dropped tokens.
ENOUGH_PROGRAMS = 256
MOST_SHARES = 8


@jit
def s5_assign(
    x,
    table,  # [images, FIELDS] int64
    norm_sq,  # [all_tokens] float32
    kept,  # [all rows] int32
    row_basis,  # [all rows] int32: only TARGET rows are compared
    dropped,  # [all_tokens] int32
    target_key,  # [shares, all_tokens] int64, written: similarity and target of every dropped token; -1: none
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    tiles: tl.int32,  # of one image
    shares: tl.int32,
    DISTANCE: tl.constexpr,  # the nearest row instead, for medoid steps
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    share = tl.program_id(0) % shares
    tile = (tl.program_id(0) // shares) % tiles
    s = (tl.program_id(0) // shares // tiles).to(tl.int64)
    base, token, _, _, row, keep = image_of(table, s)
    dropped_count = field(table, s, DROPPED_COUNT)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    if tile * BLOCK_R < dropped_count:
        inside = r < dropped_count
        n = tl.load(dropped + token + r, mask=inside, other=0)
        n_norm_sq = tl.load(norm_sq + token + n, mask=inside, other=0.0)
        finite = inside & (n_norm_sq <= FLT_MAX)
        n_norm_sq = tl.where(finite, n_norm_sq, 0.0)  # no NaN below: a maximum over NaN depends on the order
        rows = at(x, base + n.to(tl.int64) * stride_xn, ALIGN)
        width = tl.where(dropped_count > 0, D, 0)
        similarity = tl.full((BLOCK_R,), float("-inf"), tl.float32)
        target = tl.full((BLOCK_R,), -1, tl.int32)
        for t0 in range(share * BLOCK_T, keep, shares * BLOCK_T):
            t = t0 + tl.arange(0, BLOCK_T)
            is_row = t < keep
            m = tl.load(kept + row + t, mask=is_row, other=0)
            t_norm_sq = tl.load(norm_sq + token + m, mask=is_row, other=0.0)
            t_row_basis = tl.load(row_basis + row + t, mask=is_row, other=-2)
            is_target = is_row & (t_row_basis == TARGET) & (t_norm_sq <= FLT_MAX)
            columns = at(x, base + m.to(tl.int64) * stride_xn, ALIGN)
            product = dot_rows(rows, columns, finite, is_target, width, D, BLOCK_D)
            nonzero = t_norm_sq > 0
            inv_norm = tl.where(is_target & nonzero, tl.div_rn(1.0, tl.sqrt_rn(tl.where(nonzero, t_norm_sq, 1.0))), 0.0)
            if DISTANCE:
                product = -((n_norm_sq[:, None] - product) + (t_norm_sq[None, :] - product))
            else:
                product = product * inv_norm[None, :]
            product = tl.where(is_target[None, :], product, float("-inf"))
            here, which = tl.max(product, 1, return_indices=True, return_indices_tie_break_left=True)
            better = here > similarity  # at a tie the earlier target stays
            similarity = tl.where(better, here, similarity)
            target = tl.where(better, (t0 + which).to(tl.int32), target)
        merges = (target >= 0) & finite  # a token that is not finite is not merged
        bits = (similarity + 0.0).to(tl.int32, bitcast=True)  # -0 becomes +0
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000  # unsigned and monotone
        key = (order << 31) | (0x7FFFFFFF - target.to(tl.int64))
        tl.store(target_key + share * all_tokens + token + r, tl.where(merges, key, -1), mask=inside)


def divided(t: configs.Tiles, images: int, most_dropped: int, most_kept: int) -> tuple[int, int]:
    """Returns how many tiles the dropped tokens of an image make, and how many programs share the targets of a tile."""
    tiles = max(-(-most_dropped // t.assign_r), 1)
    return tiles, max(1, min(MOST_SHARES, -(-most_kept // t.assign_t), ENOUGH_PROGRAMS // (images * tiles)))


def launch(call: Call, norms: Norms, rows: Rows, most_dropped: int, most_kept: int, distance: bool = False) -> Tensor:
    """Adds the launch of s5_assign, by cosine similarity or distance; returns target_key [shares, all tokens] int64.

    most_dropped, most_kept: the most tokens that an image drops and keeps.
    """
    x, t = call.x, call.tiles
    tiles, shares = divided(t, call.images, most_dropped, most_kept)
    target_key = call.new(torch.int64, shares, call.all_tokens)
    args = {
        "x": x,
        "table": norms.table,
        "norm_sq": norms.norm_sq,
        **rows._asdict(),
        "target_key": target_key,
        "stride_xn": x.stride(-2),
        "all_tokens": call.all_tokens,
        "tiles": tiles,
        "shares": shares,
    }
    constants = {
        "DISTANCE": distance,
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_R": t.assign_r,
        "BLOCK_T": t.assign_t,
        "BLOCK_D": min(t.assign_d, max(configs.power_of_2(call.dim), 16)),
    }
    call.add(s5_assign, call.images * tiles * shares, args, constants, t.assign_warps, t.assign_stages)
    return target_key
