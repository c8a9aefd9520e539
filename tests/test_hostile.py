"""No input crashes, hangs or reads out of bounds, and a bad token changes only the rows that it is part of."""

import pytest
import torch

import apet_kernels
from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, tokens
from tests.judge import assert_same, check

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("value", [0.0, 2.0, NAN, INF])
def test_one_token(backend, dtype, layout, select, value):
    x = torch.full((2, 1, 5), value, dtype=dtype)
    got, indices = backend.compress(x, 1, 3, layout=layout, select=select)
    R = 4 if layout == "append" else 1
    assert indices.tolist() == [[0] * R] * 2
    assert_same(got, x.expand(2, R, 5).contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 2, 3, 17, 31, 127])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_number_of_channels(backend, dtype, D, layout):
    check(backend, tokens(2, 37, D, dtype=dtype, seed=D), 11, 4, layout=layout)


@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 15, 16, 17, 33])
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_any_number_of_tokens(backend, N, select):
    for keep in sorted({1, (N + 1) // 2, N - 1 or 1, N}):
        for layout in ("inplace", "append"):
            check(backend, tokens(1, N, 9, kind="clustered", seed=N), keep, 8, layout=layout, select=select)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_all_equal(backend, dtype, layout, select):
    x = tokens(1, 19, dtype=dtype, seed=1).expand(2, 25, 19).contiguous()
    got, indices = check(backend, x, 12, 5, layout=layout, select=select, ridge=0.0)
    assert indices[0, :12].tolist() == list(range(12))
    torch.testing.assert_close(got, x[:, : got.shape[1]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_zeros(backend, dtype, layout, select):
    x = torch.zeros(1, 25, 19, dtype=dtype)
    got, indices = check(backend, x, 12, 5, layout=layout, select=select)
    assert not got.any()
    assert indices[0, :12].tolist() == list(range(12))
    x[0, 7, 3] = 1
    check(backend, x, 12, 5, layout=layout, select=select)
    check(backend, x, 12, 5, layout=layout, select=select, start=2)


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_non_finite_stays_where_it_is(backend, dtype, layout, bad):
    """Other images keep their bits. In its own image a bad token is kept unchanged and does not change other rows."""
    x = tokens(4, 50, 23, dtype=dtype, kind="clustered", seed=2)
    clean, clean_at = backend.compress(x, 20, 6, layout=layout)
    x[1, 11, 5] = bad
    x[1, 30] = bad
    x[3] = bad
    got, indices = check(backend, x, 20, 6, layout=layout)
    for b in (0, 2):
        assert_same(got[b], clean[b], f"image {b}")
        assert_same(indices[b], clean_at[b], f"image {b}")
    assert {11, 30} <= set(indices[1, :20].tolist())
    assert got[1].isfinite().all(-1).sum() == got.shape[1] - 2
    assert indices[3].tolist() == [*range(20), *[0] * (got.shape[1] - 20)]
    without = x[1][[n for n in range(50) if n not in (11, 30)]][None]
    shorter, _ = backend.compress(without, 18, 6, layout=layout)
    finite = got[1][got[1].isfinite().all(-1)]
    assert_same(finite, shorter[0], "the image without its bad tokens")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_bad_tokens_than_are_kept(backend, layout):
    x = tokens(1, 30, 7, seed=3)
    x[0, 5:25, 2] = NAN
    got, indices = backend.compress(x, 8, 3, layout=layout)
    p = backend.score(x, 3)[1][0].tolist()
    if layout == "inplace":
        assert indices.tolist() == [sorted([*p, 5, 6, 7, 8, 9])]
        assert got.isnan().any(-1).sum() == 5
    else:
        assert indices[0, :8].tolist() == list(range(5, 13))
        assert got.isnan().any(-1).sum() == (5 if layout == "overwrite" else 8)
        assert_same(got[0, -3:], x[0, p], "the basis, finite")


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [300.0, 3000.0])
def test_squares_past_float16(backend, layout, scale):
    """Squares, distances and sums would overflow float16, so none may be computed in it."""
    x = (scale * tokens(2, 80, 64, seed=4)).clamp(-60000, 60000).half()
    check(backend, x, 24, 6, layout=layout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_far_from_one(backend, dtype, scale):
    """Squares of 1e-24 and 1e30 are within float32: the result scales with the input, except for the ridge."""
    x = tokens(1, 60, 32, kind="clustered", seed=5).to(dtype)
    scale = 2.0 ** round(torch.tensor(scale).log2().item())
    got, indices = backend.compress(x, 20, 6, ridge=0.0)
    other, at = backend.compress(x * scale, 20, 6, ridge=0.0)
    assert_same(at, indices)
    assert_same(other, got * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_squares_past_float32(backend, dtype, layout):
    """A finite token whose squared norm overflows float32 is treated as one that is not finite."""
    x = tokens(1, 40, 16, dtype=dtype, seed=6)
    x[0, 9] = 1e20
    x[0, 21, 3] = -3e38
    got, indices = check(backend, x, 12, 4, layout=layout)
    at = indices[0, :12].tolist()
    for n in (9, 21):
        assert_same(got[0, at.index(n)], x[0, n])


@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-45, 1e-30, 1e-20, 4e18, 1.5e19, 1e38])
def test_at_the_edges_of_float32(backend, scale, layout, select):
    """If squares or distances round to 0 or infinity, any choice is right, but counts and bounds must hold."""
    x = tokens(2, 33, 5, seed=7) * scale
    got, indices = backend.compress(x, 10, 4, layout=layout, select=select)
    kept = indices[:, :10]
    assert (kept.diff(dim=1) > 0).all()
    assert (indices >= 0).all()
    assert (indices < 33).all()
    again = backend.compress(x, 10, 4, layout=layout, select=select)
    assert_same(again[0], got)
    assert_same(again[1], indices)


def test_a_small_token_beside_a_huge_one(backend):
    x = tokens(1, 20, 6, seed=8)
    x[0, 3] *= 1e18
    check(backend, x, 8, 3)


def test_empty_batch(backend):
    got, indices = backend.compress(torch.empty(0, 9, 4), 3, 2, layout="append")
    assert got.shape == (0, 5, 4)
    assert indices.shape == (0, 5)
    residual, p = backend.score(torch.empty(0, 9, 4), 2)
    assert residual.shape == (0, 9)
    assert p.shape == (0, 2)
    assert backend.merge(torch.empty(0, 9, 4), torch.empty(0, 3, dtype=torch.int64)).shape == (0, 3, 4)


def varlen(backend, x, cu, cu_keep, total, layout="inplace", basis=3):
    cu, cu_keep = torch.tensor(cu, dtype=torch.int32), torch.tensor(cu_keep, dtype=torch.int32)
    return backend.compress_varlen(x, cu, cu_keep, total, len(x), max(total, 1), basis, layout=layout)


def test_no_images(backend):
    got, indices = varlen(backend, tokens(5, 4), [0], [0], 0)
    assert got.shape == (0, 4)
    assert indices.shape == (0,)


def test_rows_without_images_are_zero(backend):
    got, indices = varlen(backend, tokens(5, 4), [0], [0], 3)
    assert not got.any()
    assert indices.tolist() == [0, 0, 0]


@pytest.mark.parametrize("T", [0, 5])
def test_nothing_kept_of_anything(backend, T):
    got, indices = varlen(backend, tokens(5, 4)[:T], [0, T], [0, 0], 0)
    assert got.shape == (0, 4)
    assert indices.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_processor_that_flushes_subnormals(backend, dtype):
    """Two bfloat16 of which the upper is 0 form a subnormal float, and many processors flush these to 0."""
    x = tokens(1, 64, 64, seed=3)
    x[..., 1::2] = 0
    x, kept = x.to(dtype), torch.arange(16)[None]
    expected = backend.merge(x, kept)
    torch.set_flush_denormal(True)
    try:
        assert_same(backend.merge(x, kept), expected)
    finally:
        torch.set_flush_denormal(False)


def test_threads_that_flush_subnormals():
    """Only the calling thread does; the chunks that it takes must have the same bits as those of others."""
    x = tokens(4, 1024, 64, seed=4)
    x[..., 5] = 1e-40
    with apet_kernels.use_backend("cpu"):
        expected = apet_kernels.compress(x, 64)
        assert (expected.tokens[..., 5] > 0).all()
        torch.set_flush_denormal(True)
        try:
            found = [apet_kernels.compress(x, 64) for _ in range(5)]
            assert float(torch.tensor(1e-40) * torch.ones(1)) == 0  # the caller's setting is as it was
        finally:
            torch.set_flush_denormal(False)
    for one in found:
        assert_same(one.tokens, expected.tokens)
        assert_same(one.indices, expected.indices)


@pytest.mark.parametrize("threads", [1, 2])
def test_every_image_where_the_caller_flushes_subnormals(threads):
    """The squares of these tokens are subnormal: the first image of a thread must not lose them either."""
    x = (tokens(1, 64, 64, seed=5) * 1e-22).expand(4, -1, -1)
    options = {"basis": 3, "select": "fps", "start": 0, "ridge": 0.0}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with apet_kernels.use_backend("cpu"):
            expected = apet_kernels.compress(x, 16, **options)
            torch.set_flush_denormal(True)
            found = apet_kernels.compress(x, 16, **options)
    finally:
        torch.set_flush_denormal(False)
        torch.set_num_threads(before)
    assert_same(found.indices, expected.indices)
    for indices in found.indices:
        assert_same(indices, expected.indices[0])


def test_an_image_that_keeps_nothing(backend):
    """Its tokens are lost; with append, its basis rows are still returned."""
    x = tokens(20, 6, seed=9)
    got, indices = varlen(backend, x, [0, 8, 20], [0, 0, 5], 5)
    alone, at = backend.compress(x[None, 8:].clone(), 5, 3)
    assert_same(got, alone[0])
    assert_same(indices, at[0] + 8)
    got, indices = varlen(backend, x, [0, 8, 20], [0, 0, 5], 5, "append")
    assert_same(got[:3], x[backend.score(x[None, :8].clone(), 3)[1][0]])
    assert indices.shape == (11,)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_image(backend, layout):
    x = tokens(20, 6, seed=10)
    extra = 3 * (layout == "append")
    got, indices = varlen(backend, x, [0, 0, 20, 20], [0, 0, 5, 5], 5, layout)
    alone, at = backend.compress(x[None], 5, 3, layout=layout)
    assert_same(got[extra : extra + 5 + extra], alone[0])
    assert_same(indices[extra : extra + 5 + extra], at[0])
    assert not got[:extra].any()
    assert not indices[:extra].any()
    assert not got[5 + 2 * extra :].any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_packed_image_that_keeps_no_more_than_its_basis(backend, dtype):
    """With overwrite and k <= m the first k basis tokens take all k slots; the op cannot reject this as `compress`."""
    x = tokens(40, 6, dtype=dtype, seed=11)
    got, indices = varlen(backend, x, [0, 15, 40], [0, 2, 12], 12, "overwrite", basis=5)
    p = backend.score(x[None, :15].clone(), 5)[1][0]
    assert_same(got[:2], x[p[:2]])
    residual = backend.score(x[None, :15].clone(), 5)[0][0]
    assert indices[:2].tolist() == sorted(residual.topk(2).indices.tolist())
    assert_same(got[2:], backend.compress(x[None, 15:].clone(), 10, 5, layout="overwrite")[0][0])


GARBAGE = [
    [0, 20, 10, 50],
    [-5, -1, 3, 2**31 - 1],
    [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1],
    [50, 40, 30, 0],
    [7, 7, 7, 7],
    [100, 200, 300, 400],
    [2**31 - 1, -(2**31), 2**31 - 1, 0],
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cu", GARBAGE)
@pytest.mark.parametrize("cu_keep", [[0, 4, 9, 12], *GARBAGE])
def test_garbage_offsets(backend, layout, cu, cu_keep):
    """Device tensors cannot be checked: accesses stay in bounds, indices are valid, rows that no image fills are 0."""
    x = tokens(50, 6, seed=12)
    got, indices = varlen(backend, x, cu, cu_keep, 12, layout)
    R = 12 + 9 * (layout == "append")
    assert got.shape == (R, 6)
    assert indices.shape == (R,)
    assert (indices >= 0).all()
    assert (indices < 50).all()
    assert got.isfinite().all()
    assert (got.abs() <= x.abs().max()).all()


@pytest.mark.parametrize("bounds", [(10, 12), (50, 2), (1, 1)])
def test_bounds_that_are_too_small(backend, bounds):
    """If max_seqlen or max_keep is too small, the result is unspecified, but accesses stay in bounds."""
    x = tokens(50, 6, seed=13)
    cu, cu_keep = torch.tensor([0, 30, 50], dtype=torch.int32), torch.tensor([0, 6, 12], dtype=torch.int32)
    got, indices = backend.compress_varlen(x, cu, cu_keep, 12, *bounds, 3)
    assert got.shape == (12, 6)
    assert got.isfinite().all()
    assert (indices >= 0).all()
    assert (indices < 50).all()


def test_rows_that_no_image_fills(backend):
    x = tokens(20, 6, seed=14)
    got, indices = varlen(backend, x, [0, 4, 20], [0, 6, 9], 12)  # six kept of four tokens, and three rows too many
    assert not got[4:6].any()
    assert not got[9:].any()
    assert indices[4:6].tolist() == [0, 0]
    assert indices[9:].tolist() == [0, 0, 0]
