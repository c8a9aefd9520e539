"""A medoid step, after s5_assign by distance: finds the token of each cluster that is nearest to the cluster's mean.

    cluster_mean = (x_r + sum of the tokens nearest to r) / (1 + their count)       as s5_mean adds them
    medoid[r]    = arg min of ||x_n - cluster_mean||^2 in the cluster, ties to the lower position

One program per kept row. In a cluster of two both tokens are equally far from the mean, so the lower one is taken.
s4_topk then lists the medoids in ascending position.
"""

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call, Rows
from .device import DROPPED_COUNT, at, field, image_of, jit
from .s5_mean import list_members


@jit
def s4_medoids(
    x,
    table,  # [images, FIELDS] int64
    kept,  # [all rows] int32
    dropped,  # [all_tokens] int32
    cluster_key,  # [shares, all_tokens] int64: distance and cluster, a kept row, of every dropped token
    merged,  # [all_tokens] int32, scratch: positions of dropped tokens, grouped by row within a chunk
    medoids,  # [images, max_keep] int64, written; -1 after an image's last
    stride_xn: tl.int64,
    all_tokens: tl.int64,
    max_keep: tl.int32,
    shares: tl.int32,
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_D: tl.constexpr,  # D rounded up to a power of 2
    CHUNK: tl.constexpr,
):
    s = (tl.program_id(0) // max_keep).to(tl.int64)
    r = tl.program_id(0) % max_keep
    base, token, _, _, row, keep = image_of(table, s)
    dropped_count = field(table, s, DROPPED_COUNT)
    d = tl.arange(0, BLOCK_D)
    medoid = tl.full((), -1, tl.int64)
    if r < keep:
        medoid = tl.load(kept + row + r).to(tl.int64)
        own = tl.load(at(x, base + medoid * stride_xn, ALIGN) + d, mask=d < D, other=0.0).to(tl.float32)
        total = own
        members = tl.full((), 0, tl.int32)
        lowest = medoid
        for c0 in range(0, dropped_count, CHUNK):
            here, place = list_members(
                cluster_key, dropped, merged, token, c0, dropped_count, r, shares, all_tokens, CHUNK
            )
            for g in range(0, here):
                n = tl.load(place + g).to(tl.int64)
                lowest = tl.minimum(lowest, n)
                added = tl.load(at(x, base + n * stride_xn, ALIGN) + d, mask=d < D, other=0.0)
                total = total + added.to(tl.float32)
            members += here
        if members == 1:
            medoid = lowest
        if members > 1:
            mean = tl.div_rn(total, tl.zeros_like(total) + (1 + members).to(tl.float32))
            least = tl.sum((own - mean) * (own - mean), 0)
            tl.debug_barrier()  # all threads have read `merged`, which is written again
            for c0 in range(0, dropped_count, CHUNK):
                here, place = list_members(
                    cluster_key, dropped, merged, token, c0, dropped_count, r, shares, all_tokens, CHUNK
                )
                for g in range(0, here):
                    n = tl.load(place + g).to(tl.int64)
                    v = tl.load(at(x, base + n * stride_xn, ALIGN) + d, mask=d < D, other=0.0).to(tl.float32)
                    mean_dist_sq = tl.sum((v - mean) * (v - mean), 0)
                    nearer = (mean_dist_sq < least) | ((mean_dist_sq == least) & (n < medoid))
                    least = tl.where(nearer, mean_dist_sq, least)
                    medoid = tl.where(nearer, n, medoid)
    tl.store(medoids + s * max_keep + r, medoid)


def launch(call: Call, table: Tensor, rows: Rows, cluster_key: Tensor, max_keep: int) -> Tensor:
    """Adds the launch of s4_medoids; returns the medoids [images, max_keep] int64, in the order of the rows they
    replace."""
    x, t = call.x, call.tiles
    medoids = call.new(torch.int64, call.images, max_keep)
    args = {
        "x": x,
        "table": table,
        "kept": rows.kept,
        "dropped": rows.dropped,
        "cluster_key": cluster_key,
        "merged": call.new(torch.int32, call.all_tokens),
        "medoids": medoids,
        "stride_xn": x.stride(-2),
        "all_tokens": call.all_tokens,
        "max_keep": max_keep,
        "shares": cluster_key.shape[0],
    }
    constants = {
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_D": configs.power_of_2(call.dim),
        "CHUNK": t.mean_chunk,
    }
    # In a single warp the keys of a chunk, 1024 of 8 bytes, spill.
    call.add(s4_medoids, call.images * max_keep, args, constants, max(2, t.mean_warps))
    return medoids
