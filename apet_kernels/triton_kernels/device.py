"""What every kernel shares: the decorator, the table of images, and packed keys."""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

# One row of the table `images` [S, 8] int64, written by s1_norms and read by every later launch.
BASE = tl.constexpr(0)  # offset in x of the image's first token, in elements
TOKEN = tl.constexpr(1)  # its number among all tokens, which is where its part of every per-token array starts
FIRST = tl.constexpr(2)  # what is added to positions in the image to make the indices returned
COUNT = tl.constexpr(3)  # n, its tokens
ROW = tl.constexpr(4)  # its first row of the result
KEEP = tl.constexpr(5)  # K, its kept rows
END = tl.constexpr(6)  # the first row that the next image owns: rows from ROW + KEEP (+ M appended) to END are blank
DROPPED = tl.constexpr(7)  # its tokens that are not kept; written by s4_topk or s5_rows
FIELDS = tl.constexpr(8)

FLT_MAX = tl.constexpr(3.4028234663852886e38)
U = tl.constexpr(2.0**-24)  # the unit roundoff of float32


def jit(kernel: Callable) -> triton.JITFunction:
    """triton.jit that specialises on constexpr arguments and dtypes alone.

    Triton compiles another binary where an integer is 1 or a pointer is aligned, and another binary may add in another
    order: an image would not have the same result in every batch and at every address.
    """
    arguments = [name for name, p in inspect.signature(kernel).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)


@triton.jit
def field(images, s, name: tl.constexpr):
    return tl.load(images + s * FIELDS + name)


@triton.jit
def pack(value, position):
    """float32 >= 0 and position -> int64 keys whose maximum is the largest value, ties to the lower position."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))


@triton.jit
def unpack_position(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def at(x, offset, ALIGN: tl.constexpr):
    """x + offset, and the promise that launch.py keeps: rows of x and of the result start at multiples of ALIGN."""
    return tl.multiple_of(x + offset, ALIGN)
