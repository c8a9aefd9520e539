"""The interpreter in which the Triton kernels are tested computes bfloat16 as torch does."""

import os

import pytest
import torch

from tests.judge import assert_same

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU"),
    pytest.mark.interpreter,
]
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

N = 64
BF16 = torch.bfloat16


def awkward(seed: int = 0) -> torch.Tensor:
    """Returns bfloat16 [N] of every magnitude, both zeros, subnormals, and the largest."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(N, generator=make) * 10 ** (8 * torch.rand(N, generator=make) - 4)
    x[:8] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3.38e38, -3.38e38, 1.0, -1.0])
    return x.bfloat16()


@triton.jit
def cast(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.int32], ids=str)
def test_from_bfloat16(to):
    x = awkward().clamp(-1e4, 1e4)
    out = torch.empty(N, dtype=to)
    cast[(1,)](x, out, N)
    assert_same(out, x.to(to))


def test_to_bfloat16_rounds_to_nearest_even():
    bits = torch.arange(-8, 8) + torch.tensor([0x3F800000, 0x3F808000, 0x3F818000, 0x00008000])[:, None]  # halves, ties
    x = bits.to(torch.int32).view(torch.float32).flatten()
    assert len(x) == N
    out = torch.empty(N, dtype=BF16)
    cast[(1,)](x, out, N)
    assert_same(out, x.bfloat16())
    x = torch.tensor([torch.inf, -torch.inf, 3.4e38, -0.0] * (N // 4))
    cast[(1,)](x, out, N)
    assert_same(out, x.bfloat16())
    cast[(1,)](torch.full((N,), torch.nan), out, N)
    assert out.isnan().all()


@pytest.mark.parametrize("of", [torch.float16, torch.int32], ids=str)
def test_to_bfloat16_from(of):
    x = (torch.arange(N) * 37 - 1000).to(of)
    out = torch.empty(N, dtype=BF16)
    cast[(1,)](x, out, N)
    assert_same(out, x.bfloat16())


@triton.jit
def arithmetic(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(y + i)
    tl.store(out + i, a + b)
    tl.store(out + N + i, a - b)
    tl.store(out + 2 * N + i, a * b)
    tl.store(out + 3 * N + i, tl.where(a < b, a, b))
    tl.store(out + 4 * N + i, tl.where(a >= b, -a, tl.abs(b)))
    tl.store(out + 5 * N + i, tl.maximum(a, b))
    tl.store(out + 6 * N + i, tl.minimum(a, 2.5))
    tl.store(out + 7 * N + i, tl.where(a == b, tl.full((N,), 1.25, a.dtype), tl.zeros((N,), a.dtype)))


def test_arithmetic():
    x, y = awkward(), awkward(1)
    y[N // 2 :] = x[N // 2 :]
    out = torch.empty(8, N, dtype=BF16)
    arithmetic[(1,)](x, y, out, N)
    expected = [
        x + y,
        x - y,
        x * y,
        torch.where(x < y, x, y),
        torch.where(x >= y, -x, y.abs()),
        torch.maximum(x, y),
        x.clamp_max(2.5),
        torch.where(x == y, 1.25, 0.0).bfloat16(),
    ]
    for row, (got, want) in enumerate(zip(out, expected, strict=True)):
        assert_same(got + 0.0, want + 0.0, f"row {row}")  # of two zeros either may be the larger


@triton.jit
def fma(x, y, z, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.fma(tl.load(x + i), tl.load(y + i), tl.load(z + i)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_fma_rounds_once(dtype):
    x, y = (torch.randn(N, dtype=torch.float64).to(dtype) for _ in range(2))
    z = -(x * y)  # only the rounding error of the product remains
    out = torch.empty(N, dtype=dtype)
    fma[(1,)](x, y, z, out, N)
    expected = (x.double() * y.double() + z.double()).to(dtype)
    assert expected.count_nonzero() > N // 2
    assert_same(out, expected)


@triton.jit
def dot(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    product = tl.dot(tl.load(x + at), tl.load(y + at).T, input_precision="ieee")
    tl.store(out + at, product)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, BF16], ids=str)
def test_dot(dtype):
    x, y = (torch.randint(-50, 50, (N, N)).to(dtype) for _ in range(2))  # every sum is exact
    out = torch.empty(N, N)
    dot[(1,)](x, y, out, N)
    assert_same(out, x.float() @ y.float().T)


@triton.jit
def reductions(x, out, which, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    tl.store(out, tl.max(a, 0))
    tl.store(out + 1, tl.min(a, 0))
    tl.store(out + 2, tl.sum(a.to(tl.float32), 0))
    high, at = tl.max(a, 0, return_indices=True)
    tl.store(out + 3, high)
    tl.store(which, at)
    low, at = tl.min(a, 0, return_indices=True)
    tl.store(out + 4, low)
    tl.store(which + 1, at)


def test_reductions():
    x = torch.randint(-100, 100, (N,)).bfloat16()
    x[[9, 20]] = 300.0
    x[[11, 40]] = -300.0
    out, which = torch.empty(5), torch.empty(2, dtype=torch.int32)
    reductions[(1,)](x, out, which, N)
    assert out.tolist() == [300.0, -300.0, float(x.float().sum()), 300.0, -300.0]
    assert which.tolist() == [9, 11]


@triton.jit
def masked(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=-1.5), mask=i <= n)


def test_masks():
    x, out = awkward()[:40], torch.zeros(41, dtype=BF16)
    masked[(1,)](x, out, 40, N)
    assert_same(out, torch.cat([x, torch.tensor([-1.5], dtype=BF16)]))
