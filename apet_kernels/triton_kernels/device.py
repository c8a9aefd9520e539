"""Functions that the kernels share: the decorator, the table of images, rows of x, and packed keys."""

import inspect
from collections.abc import Callable

import triton
import triton.language as tl

# Columns of the table of images, [images, FIELDS] int64. s1_norms writes it, later launches read it.
BASE = tl.constexpr(0)  # offset of the image's first token in x, in elements
TOKEN = tl.constexpr(1)  # index of its first token in every per-token array
FIRST_TOKEN = tl.constexpr(2)  # added to positions in the image to give indices
TOKENS = tl.constexpr(3)  # N
ROW = tl.constexpr(4)  # its first row of the result
KEEP = tl.constexpr(5)  # K
ROW_END = tl.constexpr(6)  # first row of the next image: rows from ROW + KEEP (+ M appended) to ROW_END are unfilled
DROPPED_COUNT = tl.constexpr(7)  # tokens that are not kept; written by s4
FIELDS = tl.constexpr(8)

# row_basis of rows that no basis token overwrites.
TARGET = tl.constexpr(-1)  # tokens may be merged into the row
COPIED = tl.constexpr(-2)

FLT_MAX = tl.constexpr(3.4028234663852886e38)
U = tl.constexpr(2.0**-24)  # the unit roundoff of float32
CHAIN = tl.constexpr(128)  # products in a partial sum, which is then added to the total (docs/algorithm.md, "Rounding")


def jit(kernel: Callable) -> triton.JITFunction:
    """Like triton.jit, but specialises only on constexpr arguments and dtypes.

    Triton compiles another binary if an integer is 1 or a pointer is aligned, and another binary may add in another
    order: an image would not have the same result in every batch and at every address.
    """
    arguments = [name for name, p in inspect.signature(kernel).parameters.items() if p.annotation is not tl.constexpr]
    return triton.jit(kernel, do_not_specialize=arguments, do_not_specialize_on_alignment=arguments)


@triton.jit
def field(table, s, name: tl.constexpr):
    return tl.load(table + s * FIELDS + name)


@triton.jit
def image_of(table, s):
    """Loads BASE, TOKEN, FIRST_TOKEN, TOKENS, ROW and KEEP of image s; a load that a kernel does not use is not
    compiled."""
    base = field(table, s, BASE)
    token = field(table, s, TOKEN)
    first_token = field(table, s, FIRST_TOKEN)
    tokens = field(table, s, TOKENS)
    row = field(table, s, ROW)
    keep = field(table, s, KEEP)
    return base, token, first_token, tokens, row, keep


@triton.jit
def pack(value, position):
    """Packs float32 >= 0 and position into int64 keys whose maximum is the largest value, ties to the lower
    position."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0xFFFFFFFF - position.to(tl.int64))


@triton.jit
def unpack_position(key):
    return 0xFFFFFFFF - (key & 0xFFFFFFFF)


@triton.jit
def at(x, offset, ALIGN: tl.constexpr):
    """Returns x + offset, marked as a multiple of ALIGN bytes: `Call` aligns the rows of x and of the result."""
    return tl.multiple_of(x + offset, ALIGN)


@triton.jit
def tile_rows(x, base, stride_xn, tile, tokens, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr):
    """Returns the positions of a tile of an image [BLOCK_N], whether they are tokens, and pointers to their rows of
    x."""
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, n < tokens, at(x, base + n.to(tl.int64) * stride_xn, ALIGN)


@triton.jit
def dot_rows(
    rows,  # [A] pointers to rows of D elements
    columns,  # [B] the same
    row_in,  # [A] bool: False gives products of 0
    column_in,  # [B] bool
    width,  # D, or 0 for no products; not a constant, for which the compiler would unroll the loop and spill registers
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Returns dot products [A, B] float32 of rows with rows, summed over D in one order for every kernel: in chains of
    CHAIN products.

    A chain runs in steps of BLOCK_D in order, one matrix instruction after the other; chains are added in order.
    float32 input is multiplied as IEEE float32, never tf32.
    """
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    chain = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    for d0 in range(0, width, BLOCK_D):
        within = d0 + d < D
        a = tl.load(rows[:, None] + (d0 + d)[None, :], mask=row_in[:, None] & within[None, :], other=0.0)
        b = tl.load(columns[:, None] + (d0 + d)[None, :], mask=column_in[:, None] & within[None, :], other=0.0)
        chain = tl.dot(a, b.T, chain, input_precision="ieee")
        if (d0 + BLOCK_D) % CHAIN.value == 0:
            total += chain
            chain = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    return total + chain


@triton.jit
def weighted(at_weight, value, inside, WEIGHTED: tl.constexpr):
    """Returns values times the weights at these addresses, at most FLT_MAX; without WEIGHTED the values. Infinite
    values, such as distances beyond float32, count as FLT_MAX, negative weights and NaN as 0, infinite weights as
    FLT_MAX."""
    if WEIGHTED:
        weight = tl.load(at_weight, mask=inside, other=0.0)
        weight = tl.where(weight > 0, tl.minimum(weight, FLT_MAX), 0.0)
        value = tl.minimum(tl.minimum(value, FLT_MAX) * weight, FLT_MAX)
    return value
