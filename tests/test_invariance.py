"""An image gives the same bits alone, in any batch, in any packing, at any alignment, on any number of threads."""

import pytest
import torch

import apet_kernels
from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same

# N, D, keep, basis: odd sizes, multiples of 64, more tokens or channels than one block of a matrix kernel, one token.
SHAPES = [(70, 45, 20, 6), (192, 128, 64, 10), (300, 7, 33, 12), (53, 1100, 40, 3), (1, 8, 1, 1)]


def everything(backend, x, keep, basis, layout):
    """Returns all outputs of the op for x [B, N, D]."""
    tokens_, indices = backend.compress(x, keep, basis, layout=layout)
    residual, picks = backend.score(x, basis)
    return {"tokens": tokens_, "indices": indices, "residual": residual, "basis": picks}


def layout_for(N, keep, basis):
    return "inplace" if keep <= basis or keep == N else LAYOUTS[N % 3]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "D", "keep", "basis"), SHAPES)
def test_alone_or_in_a_batch(backend, dtype, N, D, keep, basis):
    layout = layout_for(N, keep, basis)
    x = tokens(5, N, D, dtype=dtype, kind="clustered", seed=1)
    together = everything(backend, x, keep, basis, layout)
    for b in range(5):
        for name, alone in everything(backend, x[b : b + 1].clone(), keep, basis, layout).items():
            assert_same(alone, together[name][b : b + 1], f"{name} of image {b}")


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_packed_or_one_by_one(backend, dtype, layout, select):
    """Ragged lengths, also one token and all tokens kept; indices are positions in the packed tensor."""
    lengths, keeps, basis = [31, 1, 64, 7, 130, 12], [9, 1, 64, 5, 40, 11], 4
    x = tokens(sum(lengths), 37, dtype=dtype, kind="clustered", seed=2)
    cu, cu_keep = offsets(lengths), offsets(keeps)
    choose = {"layout": layout, "select": select, "start": 3, "blend": 0.5 if layout == "overwrite" else 1.0}
    got, indices = backend.compress_varlen(x, cu, cu_keep, sum(keeps), max(lengths), max(keeps), basis, **choose)
    extra = basis * (layout == "append")
    assert got.shape == (sum(keeps) + 6 * extra, 37)
    for s in range(6):
        first = int(cu[s])
        image = x[first : first + lengths[s]][None].clone()
        choose["start"] = min(3, lengths[s] - 1)  # past the end of a short image: its last token
        alone, at = backend.compress(image, keeps[s], basis, **choose)
        rows = slice(int(cu_keep[s]) + s * extra, int(cu_keep[s + 1]) + (s + 1) * extra)
        assert_same(got[rows], alone[0], f"tokens of image {s}")
        assert (indices[rows] - first).tolist() == at[0].tolist(), f"indices of image {s}"


# Large enough for several threads: on one image, on several images at once, and on both.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "N", "D", "keep", "basis"), [(1, 401, 99, 130, 10), (5, 190, 130, 64, 10), (3, 700, 65, 90, 5)]
)
@pytest.mark.parametrize("kind", ["clustered", "repeated", "hostile"])
def test_threads(backend, dtype, B, N, D, keep, basis, kind):
    if not backend.name.startswith("cpu"):
        pytest.skip("the reference leaves the order of its float64 sums to the BLAS; GPUs take none of torch's threads")
    x = tokens(B, N, D, dtype=dtype, kind="clustered" if kind == "hostile" else kind, seed=3)
    if kind == "hostile":
        x[0, ::7, 1] = float("nan")
        x[0, 50:80] = 0
        x[-1] = 1
    layout = LAYOUTS[B % 3]
    results = []
    for n in (1, 2, 5):
        torch.set_num_threads(n)  # put back by conftest.py
        results.append(everything(backend, x, keep, basis, layout))
        results[-1]["merged"] = backend.merge(x, results[-1]["indices"][:, :keep].contiguous())
    for other in results[1:]:
        for name in other:
            assert_same(other[name], results[0][name], name)


def test_the_shapes_above_do_use_threads():
    if "cpu" not in apet_kernels.available_backends():
        pytest.skip("the CPU library is not built")
    torch.set_num_threads(2)
    plans = [apet_kernels.plan(torch.empty(B, N, 99, device="meta"), 64) for B, N in ((1, 401), (5, 190))]
    assert [(p.details["images_in_flight"], p.details["threads_per_image"]) for p in plans] == [(1, 2), (2, 1)]


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 16, 37, 130])
def test_strides_and_alignment(backend, dtype, D):
    x = tokens(2, 40, D, dtype=dtype, kind="clustered", seed=4)
    expected = everything(backend, x, 12, 5, "inplace")
    expected["merged"] = backend.merge(x, expected["indices"])
    views = {}
    for shift in (1, 3, 5):  # rows may start at any element
        room = torch.full((2, 40, D + 8), float("nan"), dtype=dtype)
        views[f"padded rows, {shift} in"] = room[:, :, shift : shift + D]
    views["tokens first"] = torch.full((40, 2, D), float("nan"), dtype=dtype).transpose(0, 1)
    views["every third token, behind a class token"] = torch.full((2, 122, D), float("nan"), dtype=dtype)[:, 1:120:3]
    # The last dimension is not contiguous, as in features of a convolution that are flattened and transposed.
    views["channels first"] = torch.full((2, D, 40), float("nan"), dtype=dtype).transpose(1, 2)
    views["every second channel"] = torch.full((2, 40, 2 * D), float("nan"), dtype=dtype)[:, :, ::2]
    for name, view in views.items():
        view.copy_(x)
        got = everything(backend, view, 12, 5, "inplace")
        got["merged"] = backend.merge(view, got["indices"])
        for key in expected:
            assert_same(got[key], expected[key], f"{key} of {name}")


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_rows_of_a_packed_tensor(backend, dtype):
    room = tokens(60, 50, dtype=dtype, seed=5)
    cu, cu_keep = torch.tensor([0, 25, 60], dtype=torch.int32), torch.tensor([0, 8, 20], dtype=torch.int32)
    for view in (room[:, 7:40], room[:, 1:50:3], tokens(33, 60, dtype=dtype, seed=7).T):
        got = backend.compress_varlen(view, cu, cu_keep, 20, 35, 12, 4)
        expected = backend.compress_varlen(view.contiguous(), cu, cu_keep, 20, 35, 12, 4)
        assert_same(got[0], expected[0])
        assert_same(got[1], expected[1])


def test_broadcast_channels(backend):
    """A stride of 0 within a token."""
    x = tokens(2, 30, 1, seed=6).expand(2, 30, 12)
    for got, expected in zip(backend.compress(x, 9, 3), backend.compress(x.contiguous(), 9, 3), strict=True):
        assert_same(got, expected)


def test_broadcast_images(backend):
    """A stride of 0 over the batch, as `expand` makes."""
    x = tokens(1, 30, 12, seed=6)
    got, indices = backend.compress(x.expand(4, 30, 12), 9, 3)
    alone, at = backend.compress(x, 9, 3)
    for b in range(4):
        assert_same(got[b], alone[0])
        assert_same(indices[b], at[0])


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_again_and_again(backend, dtype):
    """Calls of other shapes run in between, which leave other values in a workspace."""
    # Interpreted kernels get few basis tokens, because each is a launch of every program.
    basis = 3 if backend.interpreted else 8
    x = tokens(2, 96, 64, dtype=dtype, kind="clustered", seed=7)
    first = everything(backend, x, 24, basis, "overwrite")
    for n in range(1 if backend.interpreted else 20):
        backend.compress(tokens(1, 50 + 9 * n, 48, dtype=dtype, seed=n), 11, 7)
        for name, value in everything(backend, x, 24, basis, "overwrite").items():
            assert_same(value, first[name], name)
