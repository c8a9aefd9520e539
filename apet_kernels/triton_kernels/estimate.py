"""The estimated time of the Triton kernels, by the figures of csrc/cuda/figures.cuh, as csrc/cuda/plan.cu estimates the
CUDA kernels. docs/gpu.md ("CUDA or Triton") explains the formulas. Nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from . import configs, s5_assign

PASSES = 10  # over the ranks in s4_topk: two cuts of four, and one before and one after them


@dataclass(frozen=True)
class Estimate:
    """Microseconds of a call of `compress` on images of N tokens with D features that keep K, with M basis tokens."""

    norms_us: float
    sweeps_us: float
    merge_us: float  # s4 and s5

    @property
    def us(self) -> float:
        return self.norms_us + self.sweeps_us + self.merge_us


def assign_work(tiles: configs.Tiles, B: int, N: int, K: int) -> tuple[int, int, int]:
    """Returns the programs of s5_assign, how many share the targets of a tile, and the tiles of targets of each."""
    parts, shares = s5_assign.divided(tiles, B, N - K, K)
    return B * parts * shares, shares, math.ceil(math.ceil(K / tiles.assign_t) / shares)


def estimate(
    figures: dict[str, float], sms: int, tiles: configs.Tiles, N: int, D: int, K: int, M: int, element: int, B: int = 1
) -> Estimate:
    """Returns the estimate for B such images.

    Args:
        figures: microseconds, and bytes and operations of a multiprocessor per microsecond, by the names in
            `ops.FIGURES`.
        sms: multiprocessors.
        tiles: the configuration of the kernels.
        element: bytes of an element of x.
    """
    f, row = figures, D * element
    start = f["launch_us"] + f["fill_us"]
    sweep = B * N * D / (sms * f["elements_per_sm"])
    from_memory = 1 / (sms * f["memory_share"])  # us per byte
    from_l2 = 1 / (sms * f["l2_share"])

    def again(size: float) -> float:
        """Returns the time to read an array again: from L2, and from memory as far as it exceeds L2."""
        return max(size * from_l2, max(0.0, size - f["l2_bytes"]) * from_memory)

    norms = start + max(B * N * row * from_memory, sweep)
    # A step computes the distance too, in as many instructions as the dot product.
    algebra = math.ceil(B * N / (sms * 256)) * M * M * f["term_us"]
    sweeps = M * (start + max(again(B * N * row), 2 * sweep)) + algebra
    # A pass of s4 waits for L2 once per chunk, half as long as for memory.
    topk = start + PASSES * math.ceil(N / tiles.topk_chunk) * f["fill_us"] / 2
    programs, shares, each = assign_work(tiles, B, N, K)  # a multiprocessor has one program at a time
    rate = f["flops_per_sm_32"] if element == 4 else f["triton_flops_per_sm_16"]

    def wave(busy: int) -> float:
        """Returns the time of one program on each of `busy` multiprocessors."""
        size = (tiles.assign_r + tiles.assign_t) * row
        product = 2 * tiles.assign_r * tiles.assign_t * D / rate
        return each * max(product, size / f["l2_per_sm"], size * busy * from_l2) if busy else 0

    assign = start + programs // sms * wave(sms) + wave(programs % sms)
    # Every row of the result scans the keys of all dropped tokens, 8 bytes each.
    mean = start + B * K * (N - K) * 8 * shares * from_l2 + again(B * N * row)
    return Estimate(norms, sweeps, topk + assign + mean)
