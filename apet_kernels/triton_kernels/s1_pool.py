"""First launch of each round: lists the pool of candidates, computes its residual Gram matrix, and picks from it.

    pool  = the 2 b unpicked tokens of largest resid_sq, ascending              b = (t + 1) M // 4 - t M // 4
    gram  = X_pool X_pool^T - Y_pool^T Y_pool
    picks = b steps of its pivoted Cholesky factorisation, fewer if the next is dependent;  L of the round

One program per image, since each step needs the one before. An image of at most FEW basis tokens has a round for each
of them, with a pool of two tokens, of which the one of larger residual is picked. So they are picked one at a time, and
all images of a ragged call share the launches.
"""

import triton.language as tl

from ..options import FEW, POOL, ROUNDS
from . import configs
from .call import Call
from .device import FLT_MAX, U, at, dot_rows, image_of, jit, weighted
from .s1_norms import Norms
from .s1_rounds import State, y_products
from .s4_topk import HIGHEST, cut_at

FEW_PICKS = tl.constexpr(FEW)
POOL_OF = tl.constexpr(POOL)
ROUNDS_OF = tl.constexpr(ROUNDS)


@jit
def s1_pool(
    x,
    table,  # [images, FIELDS] int64
    norm_sq,  # [all_tokens] float32
    dist_sq,  # [all_tokens] float32: 0 for tokens that must not be picked; so set for the picks
    resid_sq,  # [all_tokens] float32
    y,  # [M, all_tokens] float32
    basis,  # [images, M] int64: the picks so far, -1 after them
    progress,  # [images, 2] int32, written: basis tokens of the rounds before, and of this one
    L,  # [images, most, most] float32, written: lower triangle without its diagonal
    inv_diag,  # [images, most] float32, written
    rank,  # [all_tokens] int32, scratch
    pool,  # [images, P] int32, scratch
    gram,  # [images, P, P] float32, scratch
    pool_y,  # [images, most, P] float32, scratch
    weights,  # [all_tokens] float32, if WEIGHTED
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    number: tl.int32,  # of the round
    M: tl.int32,
    limit: tl.int64,  # basis tokens of an image, at most; and its keep
    most: tl.int32,
    P: tl.int32,
    start: tl.int64,
    ridge: tl.float32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,  # P rounded up to a power of 2
    CHUNK: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    base, token, _, tokens, _, keep = image_of(table, s)
    c = tl.arange(0, CHUNK)
    k = tl.arange(0, BLOCK_K)
    rank += token
    pool += s * P
    gram += s * P * P
    pool_y += s * most * P
    own = tl.minimum(limit, keep)
    rounds = tl.where(own > FEW_PICKS, ROUNDS_OF, tl.maximum(own, 1))
    begin = tl.full((), 0, tl.int32)
    if number > 0:
        begin = tl.load(progress + s * 2) + tl.load(progress + s * 2 + 1)
    else:
        for m0 in range(0, M, CHUNK):
            tl.store(basis + s * M + m0 + c, tl.full((CHUNK,), -1, tl.int64), mask=m0 + c < M)
    t = number.to(tl.int64)
    size = tl.where(t < rounds, (t + 1) * own // rounds - t * own // rounds, 0)

    # the pool
    first = tl.full((), -1, tl.int64)
    if (number == 0) & (start >= 0) & (tokens > 0):
        given = tl.minimum(start, tokens - 1)
        first = tl.where(tl.load(norm_sq + token + given) <= FLT_MAX, given, -1)
    open_count = tl.full((), 0, tl.int64)
    for c0 in range(0, tokens, CHUNK):
        inside = c0 + c < tokens
        value = tl.load(resid_sq + token + c0 + c, mask=inside, other=0.0)
        value = weighted(weights + token + c0 + c, value, inside, WEIGHTED)
        may_be_picked = (tl.load(dist_sq + token + c0 + c, mask=inside, other=0.0) > 0) & (value > 0)
        n_rank = tl.where(may_be_picked, value.to(tl.int32, bitcast=True), 0)
        n_rank = tl.where(c0 + c == first, HIGHEST, n_rank)
        open_count += tl.sum((inside & (n_rank > 0)).to(tl.int32), 0)
        tl.store(rank + c0 + c, n_rank, mask=inside)
    tl.debug_barrier()  # other threads read the ranks
    count = tl.minimum(size * POOL_OF, open_count)
    cut, ties = cut_at(rank, tokens, count, CHUNK)
    equal = 0
    taken = 0
    for c0 in range(0, tl.where(count > 0, tokens, 0), CHUNK):
        inside = c0 + c < tokens
        n_rank = tl.load(rank + c0 + c, mask=inside, other=0)
        tie = inside & (n_rank == cut)
        stays = inside & ((n_rank > cut) | (tie & (equal + tl.cumsum(tie.to(tl.int32), 0) <= ties)))
        equal += tl.sum(tie.to(tl.int32), 0)
        tl.store(pool + taken + tl.cumsum(stays.to(tl.int32), 0) - 1, (c0 + c).to(tl.int32), mask=stays)
        taken += tl.sum(stays.to(tl.int32), 0)
    tl.debug_barrier()  # other threads read the pool

    # its residual Gram matrix
    i = tl.arange(0, BLOCK_T)
    width = tl.where(count > 0, D, 0)
    for i0 in range(0, count, BLOCK_T):
        row_in = i0 + i < count
        n = tl.load(pool + i0 + i, mask=row_in, other=0).to(tl.int64)
        rows = at(x, base + n * stride_xn, ALIGN)
        for j0 in range(0, count, BLOCK_T):
            column_in = j0 + i < count
            m = tl.load(pool + j0 + i, mask=column_in, other=0).to(tl.int64)
            columns = at(x, base + m * stride_xn, ALIGN)
            product = dot_rows(rows, columns, row_in, column_in, width, D, BLOCK_D)
            product -= y_products(y + token, n, m, row_in, begin, all_tokens, BLOCK_K)
            place = gram + (i0 + i)[:, None] * P + (j0 + i)[None, :]
            tl.store(place, product, mask=row_in[:, None] & column_in[None, :])
    tl.debug_barrier()  # other threads read the matrix

    # the picks
    p = tl.arange(0, BLOCK_P)
    candidate = tl.load(pool + p, mask=p < count, other=-1).to(tl.int64)
    diag = tl.load(gram + p * P + p, mask=p < count, other=0.0).to(tl.float64)
    allowed = p < count
    weight = tl.full((BLOCK_P,), 1.0, tl.float32)
    weight = weighted(weights + token + candidate, weight, p < count, WEIGHTED).to(tl.float64)
    found = tl.full((), 0, tl.int32)
    going = count > 0
    for q in range(0, size):
        is_first = (q == 0) & (first >= 0)
        value = tl.minimum(diag * weight, FLT_MAX) if WEIGHTED else diag
        value = tl.where(allowed, value, float("-inf"))
        value = tl.where(is_first & (candidate == first), float("inf"), value)
        best = tl.min(tl.where(value == tl.max(value, 0), p, BLOCK_P), 0)
        position = tl.max(tl.where(p == best, candidate, -1), 0)
        best_diag = tl.sum(tl.where(p == best, diag, 0.0), 0)
        going = going & (position >= 0) & (tl.max(allowed.to(tl.int32), 0) > 0)
        p_norm_sq = tl.load(norm_sq + token + position, mask=going, other=0.0)
        pivot = best_diag + ridge
        independent = pivot > p_norm_sq * (4 * U) * tl.maximum(begin, 1)
        going = going & (is_first | (independent & (best_diag > 0)))
        if going:
            column = tl.load(gram + best * P + p, mask=p < count, other=0.0).to(tl.float64)
            for k0 in range(0, q, BLOCK_K):
                earlier = k0 + k < q
                l_p = tl.load(pool_y + (k0 + k) * P + best, mask=earlier, other=0.0)
                total = tl.zeros((BLOCK_P,), tl.float64)
                for j in tl.static_range(BLOCK_K):  # not tl.sum, whose order depends on BLOCK_P, so on the other images
                    used = k0 + j < q
                    l_j = tl.load(pool_y + (k0 + j) * P + best, mask=used, other=0.0).to(tl.float64)
                    total += l_j * tl.load(pool_y + (k0 + j) * P + p, mask=used & (p < count), other=0.0).to(tl.float64)
                column -= total
                tl.store(L + (s * most + q) * most + k0 + k, l_p, mask=earlier)
            inv_diag_q = tl.where(independent, 1.0 / tl.sqrt(tl.where(independent, pivot, 1.0)), 0.0)
            column = column * inv_diag_q
            tl.store(pool_y + q * P + p, column.to(tl.float32), mask=p < count)
            diag -= column * column
            tl.store(inv_diag + s * most + q, inv_diag_q.to(tl.float32))
            tl.store(basis + s * M + begin + q, position)
            tl.store(dist_sq + token + position, 0.0)
            allowed = allowed & (p != best)
            found += 1
        tl.debug_barrier()  # other threads read pool_y
    tl.store(progress + s * 2, begin)
    tl.store(progress + s * 2 + 1, found)


def launch(call: Call, norms: Norms, state: State, number: int, start: int, ridge: float) -> None:
    """Adds the launch of s1_pool for one round."""
    tiles, P, most = call.tiles, POOL * state.most, state.most
    args = {
        "x": call.x,
        "table": norms.table,
        "norm_sq": norms.norm_sq,
        "dist_sq": norms.dist_sq,
        "resid_sq": norms.resid_sq,
        "y": state.y,
        "basis": state.basis,
        "progress": state.progress,
        "L": state.L,
        "inv_diag": state.inv_diag,
        "rank": state.rank,
        "pool": state.pool,
        "gram": state.gram,
        "pool_y": state.pool_y,
        "weights": norms.weights,
        "stride_xn": call.x.stride(-2),
        "all_tokens": call.all_tokens,
        "number": number,
        "M": state.basis.shape[1],
        "limit": state.limit,
        "most": most,
        "P": P,
        "start": start,
        "ridge": ridge,
    }
    constants = {
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_T": min(tiles.assign_t, 32),
        "BLOCK_D": min(tiles.assign_d, max(configs.power_of_2(call.dim), 16)),
        "BLOCK_K": 16,
        "BLOCK_P": configs.block_m(P),
        "CHUNK": tiles.topk_chunk,
        "WEIGHTED": norms.constants["WEIGHTED"],
    }
    # float32 rows that are not whole 16-byte words are copied by elements: the addresses of a second tile would spill.
    call.add(s1_pool, call.images, args, constants, tiles.topk_warps, 1 if call.align == 4 else 2)
