"""One fixed configuration per kernel and device class; `python -m benchmarks.tune` searches for them on a GPU.

Tile sizes may depend on the features D and the element size, but not on the number of images or tokens: another tile
could change the order of a sum, so an image could get other bits in another batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# The most candidates of an image that one launch writes for the next: 2 KB that every program of a step reads.
PARTIALS = 256
# With so few features, M basis tokens may almost span the space, which amplifies rounding errors (docs/algorithm.md):
# sums over D are float64 there. For larger D float64 costs time and is not needed.
NARROW = 128
# Ampere, Ada and consumer Blackwell: mma.sync takes its operands from registers, not from shared memory as Hopper's
# wgmma and Blackwell's tcgen05 do, and adds into the same registers, unlike AMD's mfma.
MMA_SYNC = ("sm_8", "sm_12")
# Data center Blackwell: tcgen05 adds in a memory of its own, from which registers take the sum of each chain.
TCGEN05 = ("sm_10",)


@dataclass(frozen=True)
class Tiles:
    """Constexpr sizes and warps of every kernel. Sizes are powers of 2."""

    sweep_n: int  # tokens of a tile in s1_norms and s1_s3_sweep
    sweep_d: int  # features of a tile at once: sweep_n * sweep_d float32 sums, twice, in registers
    sweep_warps: int
    topk_chunk: int
    topk_warps: int
    assign_r: int  # dropped tokens x targets x features of a tile
    assign_t: int
    assign_d: int
    assign_warps: int
    assign_stages: int  # tiles of input in flight in shared memory
    mean_chunk: int
    mean_unroll: int  # rows in flight
    mean_warps: int


def power_of_2(n: int) -> int:
    """Returns the smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def block_m(M: int) -> int:
    """Returns the size of a block of M values: a power of 2, at least 2."""
    return max(power_of_2(M), 2)


def tiles(device_class: str, D: int, element: int) -> Tiles:
    """Returns the configuration for D features of `element` bytes on a device class (see `device_class`)."""
    if device_class == "interpreter":  # small, so that small tests cross every edge
        return Tiles(32, 64, 4, 64, 4, 16, 16, 64, 4, 1, 64, 4, 4)
    wide = power_of_2(D)
    sweep_d = min(wide, 512)
    if element == 4:
        # No matrix instruction multiplies float32 exactly: products are unrolled into registers, so the tile is small.
        assign = (32, 32, 32, 8, 2)
    elif D * element % 16:
        # Rows are loaded element by element, through registers.
        assign = (64, 64, 32, 8, 3)
    elif device_class.startswith(MMA_SYNC):
        # Products stay in registers there, and two sums of each: a larger tile, or 64 features at once, would spill.
        assign = (64, 128, 32, 8, 4)
    elif device_class.startswith(TCGEN05):
        # Both sums of 128 x 128 products would spill. The instruction's own size is 128 rows.
        assign = (128, 64, 64, 8, 3)
    else:
        # 64 operations per byte from L2, twice as many as with 64 x 64. Three tiles take 96 KB, or on gfx942 all of its
        # 64 KB.
        assign = (128, 128, 64, 8, 3)
    return Tiles(
        sweep_n=8,
        sweep_d=sweep_d,
        sweep_warps=8,  # one for each of the 8 tokens
        topk_chunk=2048,
        topk_warps=8,
        assign_r=assign[0],
        assign_t=assign[1],
        assign_d=assign[2],
        assign_warps=assign[3],
        assign_stages=assign[4],
        mean_chunk=1024,
        mean_unroll=max(1, min(8, 8192 // wide)),
        mean_warps=max(1, min(8, wide * element // 512)),  # one 16-byte word per thread
    )


def device_class(device: torch.device) -> str:
    """Returns which entry of `tiles` a device uses; CPU tensors are run by Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    name = f"sm_{properties.major}{properties.minor}"
    return name + "a" if properties.major >= 9 else name
