"""Launch M + 2: which tokens stay, exactly K of them, in ascending position.

    kept = the K largest e2, ties to the lower position; "inplace": the basis first, then the largest of the others

One program per image. float32 >= 0 sort as integers, so the K-th largest key is found by radix selection: four passes
over the keys, each a histogram of 8 of their 31 bits, then one pass that compacts. (A sort would take log^2 n passes;
a bisection 31; two levels of tiles would save passes only where a single program is the bottleneck, and at 16384 tokens
these six passes read 0.4 MB, a hundredth of what one step reads.)

    e2 [n] --once--> rank [n] --4 passes--> threshold --1 pass--> kept [K], dropped [n - K], indices [K]

"overwrite" selects twice: the kept that do not rank among the best K - m are the slots that the basis takes over.
"""

import triton
import triton.language as tl

from .device import COUNT, DROPPED, FIELDS, FIRST, KEEP, ROW, TOKEN, field, jit

INPLACE = tl.constexpr(0)
OVERWRITE = tl.constexpr(1)
APPEND = tl.constexpr(2)
HIGHEST = tl.constexpr(0x7FFFFFFF)  # above the rank of infinity


@triton.jit
def _threshold(rank, count, wanted, CHUNK: tl.constexpr):
    """The wanted-th largest of rank[0..count], and how many of those equal to it are wanted."""
    bins = tl.arange(0, 256)
    c = tl.arange(0, CHUNK)
    prefix = wanted.to(tl.int32) * 0
    left = wanted.to(tl.int32)
    for digit in tl.static_range(4):
        histogram = tl.zeros((256,), tl.int32)
        for c0 in range(0, count, CHUNK):
            key = tl.load(rank + c0 + c, mask=c0 + c < count, other=0)
            same = (c0 + c < count) & ((key.to(tl.int64) >> (32 - 8 * digit)).to(tl.int32) == prefix)
            histogram += tl.histogram((key >> (24 - 8 * digit)) & 0xFF, 256, mask=same)
        at_least = tl.cumsum(histogram, 0, reverse=True)
        bucket = tl.max(tl.where(at_least >= left, bins, 0), 0)
        left -= tl.sum(tl.where(bins > bucket, histogram, 0), 0)
        prefix = (prefix << 8) | bucket
    return tl.where(wanted > 0, prefix, HIGHEST), tl.where(wanted > 0, left, 0)


@jit
def s4_topk(
    e2,  # [tokens] float32
    basis,  # [S, M] int64, -1 past its end
    images,  # [S, FIELDS] int64
    rank,  # [tokens] int32, scratch
    kept,  # [rows] int32, written: position in the image of every kept row
    source,  # [rows] int32, written: -1, or the basis token that overwrites the row
    dropped,  # [tokens] int32, written: positions of the dropped, then nothing
    indices,  # [rows] int64, written: kept, then the appended basis
    M: tl.int32,
    layout: tl.int32,
    appended: tl.int64,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    token = field(images, s, TOKEN)
    first = field(images, s, FIRST)
    count = field(images, s, COUNT)
    row = field(images, s, ROW)
    keep = field(images, s, KEEP)
    c = tl.arange(0, CHUNK)
    j = tl.arange(0, BLOCK_M)
    p = tl.load(basis + s * M + j, mask=j < M, other=-1)
    found = tl.sum((p >= 0).to(tl.int32), 0)
    rank += token

    for c0 in range(0, count, CHUNK):
        inside = c0 + c < count
        error = tl.load(e2 + token + c0 + c, mask=inside, other=0.0)
        tl.store(rank + c0 + c, error.to(tl.int32, bitcast=True) + 1, mask=inside)
    tl.debug_barrier()  # other threads wrote the ranks that are replaced here
    if layout == INPLACE:
        tl.store(rank + p, tl.where(j < keep, HIGHEST, 0), mask=p >= 0)
    tl.debug_barrier()

    replaced = tl.where((layout == OVERWRITE) & (keep < count), found.to(tl.int64), 0)
    lowest, ties = _threshold(rank, count, keep, CHUNK)
    safe, safe_ties = _threshold(rank, count, tl.maximum(keep - replaced, 0), CHUNK)
    equal = 0  # ties seen so far, of either threshold
    safe_equal = 0
    rows = 0
    slots = 0
    for c0 in range(0, count, CHUNK):
        position = c0 + c
        inside = position < count
        key = tl.load(rank + position, mask=inside, other=0)
        tie = inside & (key == lowest)
        stays = inside & ((key > lowest) | (tie & (equal + tl.cumsum(tie.to(tl.int32), 0) <= ties)))
        equal += tl.sum(tie.to(tl.int32), 0)
        tie = inside & (key == safe)
        lost = stays & (key <= safe) & ~(tie & (safe_equal + tl.cumsum(tie.to(tl.int32), 0) <= safe_ties))
        safe_equal += tl.sum(tie.to(tl.int32), 0)
        r = rows + tl.cumsum(stays.to(tl.int32), 0) - 1
        slot = slots + tl.cumsum(lost.to(tl.int32), 0) - 1
        tl.store(kept + row + r, position.to(tl.int32), mask=stays)
        tl.store(source + row + r, tl.where(lost, slot, -1), mask=stays)
        tl.store(indices + row + r, first + position, mask=stays)
        tl.store(dropped + token + position - r - 1, position.to(tl.int32), mask=inside & ~stays)
        rows += tl.sum(stays.to(tl.int32), 0)
        slots += tl.sum(lost.to(tl.int32), 0)
    tl.store(images + s * FIELDS + DROPPED, count - keep)

    if layout == APPEND:
        repeated = tl.max(tl.where(j == 0, p, 0), 0)  # of a shorter basis: its first token, or token 0
        p = tl.where(p >= 0, p, tl.maximum(repeated, 0))
        tl.store(indices + row + keep + j, first + p, mask=j < tl.where(count > 0, M, 0))
