"""Launch M + 2: chooses the tokens that stay, exactly K of them, in ascending position.

    kept = the K largest e_sq, ties to the lower position; "inplace": the basis first, then the largest of the others

One program per image. float32 >= 0 sort as integers, so radix selection finds the K-th largest rank: four passes over
the ranks, each a histogram of 8 of their 31 bits, then one pass that compacts. (A sort would take log^2 N passes, a
bisection 31. Two levels of tiles would save passes only where a single program limits the time: at 16384 tokens these
six passes read 0.4 MB, a hundredth of what one step reads.)

    e_sq [N] --once--> rank [N] --4 passes--> cut --1 pass--> kept [K], dropped [N - K], indices [K]

"overwrite" selects twice: kept tokens that are not among the K - m largest are overwritten by the basis.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call, Rows, new_rows
from .device import DROPPED_COUNT, FIELDS, TARGET, image_of, jit

INPLACE = tl.constexpr(0)
OVERWRITE = tl.constexpr(1)
APPEND = tl.constexpr(2)
HIGHEST = tl.constexpr(0x7FFFFFFF)  # above the rank of infinity
LAYOUTS = {"inplace": INPLACE.value, "overwrite": OVERWRITE.value, "append": APPEND.value}


@triton.jit
def cut_at(rank, tokens, wanted, CHUNK: tl.constexpr):
    """Returns the wanted-th largest value of rank[0..tokens), and how many tokens with exactly that value are
    wanted."""
    bins = tl.arange(0, 256)
    c = tl.arange(0, CHUNK)
    prefix = wanted.to(tl.int32) * 0
    remaining = wanted.to(tl.int32)
    for digit in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for c0 in range(0, tokens, CHUNK):
            n_rank = tl.load(rank + c0 + c, mask=c0 + c < tokens, other=0)
            same = (c0 + c < tokens) & ((n_rank.to(tl.int64) >> (32 - 8 * digit)).to(tl.int32) == prefix)
            histogram += tl.histogram((n_rank >> (24 - 8 * digit)) & 0xFF, 256, mask=same)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        bucket = tl.max(tl.where(at_least >= remaining, bins, 0), 0)
        remaining -= tl.sum(tl.where(bins > bucket, histogram, 0), 0)
        prefix = (prefix << 8) | bucket
    return tl.where(wanted > 0, prefix, HIGHEST), tl.where(wanted > 0, remaining, 0)


@jit
def s4_topk(
    e_sq,  # [all_tokens] float32
    basis,  # [images, M] int64, -1 past its end
    table,  # [images, FIELDS] int64, DROPPED_COUNT written
    rank,  # [all_tokens] int32, scratch
    kept,  # [all rows] int32, written
    row_basis,  # [all rows] int32, written
    dropped,  # [all_tokens] int32, written
    indices,  # [all rows] int64, written: kept, then the appended basis
    M: tl.int32,
    layout: tl.int32,
    appended: tl.int64,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    _, token, first_token, tokens, row, keep = image_of(table, s)
    c = tl.arange(0, CHUNK)
    j = tl.arange(0, BLOCK_M)
    p = tl.load(basis + s * M + j, mask=j < M, other=-1)
    basis_size = tl.sum((p >= 0).to(tl.int32), 0)
    rank += token

    for c0 in range(0, tokens, CHUNK):
        inside = c0 + c < tokens
        n_e_sq = tl.load(e_sq + token + c0 + c, mask=inside, other=0.0)
        tl.store(rank + c0 + c, n_e_sq.to(tl.int32, bitcast=True) + 1, mask=inside)
    tl.debug_barrier()  # other threads wrote the ranks that are overwritten here
    if layout == INPLACE:
        tl.store(rank + p, tl.where(j < keep, HIGHEST, 0), mask=p >= 0)
    tl.debug_barrier()

    overwritten = tl.where((layout == OVERWRITE) & (keep < tokens), basis_size.to(tl.int64), 0)
    cut, ties = cut_at(rank, tokens, keep, CHUNK)
    # Kept tokens below this second cut are overwritten.
    unreplaced, unreplaced_ties = cut_at(rank, tokens, tl.maximum(keep - overwritten, 0), CHUNK)
    equal = 0  # counts so far: tokens of the rank of either cut, kept rows, overwritten rows
    unreplaced_equal = 0
    rows = 0
    slots = 0
    for c0 in range(0, tokens, CHUNK):
        position = c0 + c
        inside = position < tokens
        n_rank = tl.load(rank + position, mask=inside, other=0)
        tie = inside & (n_rank == cut)
        stays = inside & ((n_rank > cut) | (tie & (equal + tl.cumsum(tie.to(tl.int32), 0) <= ties)))
        equal += tl.sum(tie.to(tl.int32), 0)
        tie = inside & (n_rank == unreplaced)
        above = (n_rank > unreplaced) | (tie & (unreplaced_equal + tl.cumsum(tie.to(tl.int32), 0) <= unreplaced_ties))
        overwrite = stays & ~above
        unreplaced_equal += tl.sum(tie.to(tl.int32), 0)
        r = rows + tl.cumsum(stays.to(tl.int32), 0) - 1
        slot = slots + tl.cumsum(overwrite.to(tl.int32), 0) - 1
        tl.store(kept + row + r, position.to(tl.int32), mask=stays)
        tl.store(row_basis + row + r, tl.where(overwrite, slot, TARGET), mask=stays)
        tl.store(indices + row + r, first_token + position, mask=stays)
        tl.store(dropped + token + position - r - 1, position.to(tl.int32), mask=inside & ~stays)
        rows += tl.sum(stays.to(tl.int32), 0)
        slots += tl.sum(overwrite.to(tl.int32), 0)
    tl.store(table + s * FIELDS + DROPPED_COUNT, tokens - keep)

    if layout == APPEND:
        # If fewer basis tokens were found than asked for, the first one is repeated; without any it is token 0.
        repeated = tl.max(tl.where(j == 0, p, 0), 0)
        p = tl.where(p >= 0, p, tl.maximum(repeated, 0))
        tl.store(indices + row + keep + j, first_token + p, mask=j < tl.where(tokens > 0, M, 0))


def launch(call: Call, table: Tensor, basis: Tensor, e_sq: Tensor, indices: Tensor, layout: str, appended: int) -> Rows:
    """Adds the launch of s4_topk. It fills indices [all rows] int64, and DROPPED_COUNT of the table."""
    M, tiles = basis.shape[1], call.tiles
    rows = new_rows(call, indices.numel())
    args = {
        "e_sq": e_sq,
        "basis": basis,
        "table": table,
        "rank": call.new(torch.int32, call.all_tokens),
        **rows._asdict(),
        "indices": indices,
        "M": M,
        "layout": LAYOUTS[layout],
        "appended": appended,
    }
    constants = {"BLOCK_M": configs.block_m(M), "CHUNK": tiles.topk_chunk}
    call.add(s4_topk, call.images, args, constants, tiles.topk_warps)
    return rows
