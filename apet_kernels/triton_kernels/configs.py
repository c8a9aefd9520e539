"""One fixed configuration per kernel and device class; `python -m benchmarks.tune` finds them again on a GPU.

No tile may depend on the number of images or tokens: it could change the order of a sum, and with it the bits that an
image gets in another batch. The channels D and the element size may.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Partial results of the arg-max that one launch leaves for the next: 2 KB that every program of a step reads.
PARTIALS = 256
# With so few channels, M basis tokens may almost span the space, and rounding is stretched (docs/algorithm.md): sums
# over D are float64 there, which is not worth its price where D is larger.
NARROW = 128
# Ampere, Ada and consumer Blackwell: mma.sync takes its operands from registers, not from shared memory as Hopper's
# wgmma and Blackwell's tcgen05 do, and adds into the same registers, unlike AMD's mfma.
MMA_SYNC = ("sm_8", "sm_12")


@dataclass(frozen=True)
class Tiles:
    """Constexpr sizes and warps of every kernel. Sizes are powers of 2."""

    step_n: int  # tokens of a tile in s1_norms and s1_s3_step
    step_d: int  # channels it holds at once: step_n * step_d float32 sums, twice, in registers
    step_warps: int
    topk_chunk: int
    topk_warps: int
    assign_r: int  # dropped tokens x targets x channels of a tile
    assign_t: int
    assign_d: int
    assign_warps: int
    assign_stages: int  # tiles of input in flight in shared memory
    mean_chunk: int
    mean_group: int  # rows in flight
    mean_warps: int


def power_of_2(n: int) -> int:
    """The least power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def tiles(device_class: str, D: int, element: int) -> Tiles:
    """The configuration for D channels of `element` bytes on one of the classes that `device_class` returns."""
    if device_class == "interpreter":  # small, so that small tests cross every edge
        return Tiles(32, 64, 4, 64, 4, 16, 16, 64, 4, 1, 64, 4, 4)
    wide = power_of_2(D)
    step_d = min(wide, 512)
    if element == 4:
        # No matrix instruction multiplies float32 exactly: products are unrolled into registers, so the tile is small.
        assign = (32, 32, 32, 8, 2)
    elif D * element % 16:
        # Rows are loaded element by element, through registers.
        assign = (64, 64, 32, 8, 3)
    elif device_class.startswith(MMA_SYNC):
        # Products stay in registers there: with 64 channels at once, eight warps spill.
        assign = (128, 128, 32, 8, 4)
    else:
        # 64 operations per byte from L2, twice those of a tile of 64 x 64; three tiles fill 96 KB, or
        # on gfx942 the 64 KB there are.
        assign = (128, 128, 64, 8, 3)
    return Tiles(
        step_n=8,
        step_d=step_d,
        step_warps=8,  # a warp each
        topk_chunk=2048,
        topk_warps=8,
        assign_r=assign[0],
        assign_t=assign[1],
        assign_d=assign[2],
        assign_warps=assign[3],
        assign_stages=assign[4],
        mean_chunk=1024,
        mean_group=max(1, min(8, 8192 // wide)),
        mean_warps=max(1, min(8, wide * element // 512)),  # one 16-byte word per thread
    )


def device_class(device: torch.device) -> str:
    """Which entry of the tables a device takes; CPU tensors are run by Triton's interpreter."""
    if device.type == "cpu":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    name = f"sm_{properties.major}{properties.minor}"
    return name + "a" if properties.major >= 9 else name
