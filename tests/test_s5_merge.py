"""s5: the target of a dropped token, and the means."""

import pytest
import torch

import apet_kernels
from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, rows, tokens
from tests.judge import assert_same, check_merge

NAN, INF = float("nan"), float("inf")


def merge(backend, x, indices, targets=None):
    flags = None if targets is None else torch.tensor([targets])
    return backend.merge(x, torch.tensor([indices]), targets=flags)[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(backend, dtype):
    # (9,1) and (4,1) have a smaller angle with (2,0), though their dot product with the longer (0,8) may be larger.
    x = rows([2, 0], [9, 1], [0, 8], [4, 1], [1, 2], dtype=dtype)
    expected = rows([5, 2 / 3], [0.5, 5], dtype=dtype)[0]
    torch.testing.assert_close(merge(backend, x, [0, 2]), expected)


def test_cosine_not_dot_product(backend):
    x = rows([1, 0], [100, 100], [3, 1])  # cosines of (3,1): 0.949 and 0.894; dot products 3 and 400
    assert merge(backend, x, [0, 1]).tolist() == [[2, 0.5], [100, 100]]


def test_most_negative_is_not_chosen(backend):
    """A similarity of -0.2 is larger than -1."""
    x = rows([-1, 0], [-0.2, 0.98], [1, 0])
    assert_same(merge(backend, x, [0, 1])[0], x[0, 0])
    torch.testing.assert_close(merge(backend, x, [0, 1])[1], torch.tensor([0.4, 0.49]))


def test_zero_vectors(backend):
    x = rows([0, 0], [1, 0], [-1, 0], [2, 0])
    got = merge(backend, x, [0, 1])
    assert got.tolist() == [[-0.5, 0], [1.5, 0]], "a zero target has similarity 0: less than 1, more than -1"
    assert merge(backend, x, [2, 1]).tolist() == [[-0.5, 0], [1.5, 0]], "a zero token goes to the first target"


def test_ties_go_to_the_earlier_row(backend):
    x = rows([1, 2, 3], [2, 4, 6], [1, 2, 3], [3, 1, 0], [0, 1, 3], [2, 3, 3], [1, 2, 3])
    for order in ([0, 1, 2, 3], [2, 1, 3, 0]):
        got = merge(backend, x, order)
        assert got[0].tolist() == [1, 2, 3]
        assert_same(got[1:], x[0, order[1:]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 5, 16, 31, 64, 100, 257])
def test_copies_of_a_target_tie_exactly(backend, dtype, D):
    """Copies of a target many columns apart get equal bits of similarity, at every place in a tile."""
    x = tokens(1, 140, D, dtype=dtype, seed=D)
    x[0, [3, 40, 77, 90]] = x[0, 70].clone()
    got = merge(backend, x, list(range(100)))
    check_merge(x[0], got, torch.arange(100), torch.ones(100, dtype=torch.bool))
    assert_same(got[[40, 70, 77, 90]], x[0, [40, 70, 77, 90]], "later copies")


def test_targets(backend):
    x = rows([1, 0], [0, 1], [2, 0.5], [1, 3])
    assert merge(backend, x, [0, 1], [False, True]).tolist() == [[1, 0], [1, 1.5]]
    assert merge(backend, x, [0, 1], [False, False]).tolist() == [[1, 0], [0, 1]], "no target: dropped tokens are lost"
    x = rows([1, 0], [0, 1], [2, 0.5], [1, 3], [0, 1.5])
    assert merge(backend, x, [0, 0, 1], [False, True, False]).tolist() == [[1, 0], [1, 1.25], [0, 1]]


def test_repeated_rows(backend):
    """Each gives a row, and tokens are merged into the earliest."""
    x = rows([1, 0], [0, 1], [3, 1])
    assert merge(backend, x, [1, 0, 0]).tolist() == [[0, 1], [2, 0.5], [1, 0]]


@pytest.mark.rest_interpreted
def test_more_repeated_rows_than_are_read_at_once(backend):
    pairs = 50 if backend.interpreted else 650  # on interpreted kernels each row is a program
    x = tokens(1, 2 * pairs, 5, seed=1)
    got = merge(backend, x, [3, 7] * pairs)
    assert_same(got[:2], merge(backend, x, [3, 7]))
    assert_same(got[2:], x[0, [3, 7]].repeat(pairs - 1, 1))


def test_order_of_rows_is_free(backend):
    x = tokens(1, 50, 24, seed=1)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))[:20]
    got = backend.merge(x, order[None])[0]
    ascending, back = order.sort()
    assert_same(got[back], backend.merge(x, ascending[None])[0])


def test_indices_are_clamped(backend):
    x = tokens(1, 9, 5, seed=2)
    assert_same(merge(backend, x, [-7, 3, 99]), merge(backend, x, [0, 3, 8]))
    assert_same(merge(backend, x, [-(2**62), 2**62]), merge(backend, x, [0, 8]))


def test_nothing_dropped(backend):
    x = tokens(2, 6, 5, seed=3)
    assert_same(backend.merge(x, torch.arange(6).expand(2, 6).contiguous()), x)


def test_non_finite_tokens_stay_out(backend):
    x = rows([1, 0], [NAN, 1], [0, INF], [2, 1], [1, 5], [0, 3])
    got = merge(backend, x, [0, 1, 5])
    assert_same(got[1], x[0, 1])
    assert got[0].tolist() == [1.5, 0.5], "(0, inf) is lost, (2, 1) comes here"
    assert got[2].tolist() == [0.5, 4]
    assert_same(merge(backend, x, [1, 2]), x[0, 1:3])


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_of_the_kept_indices_is_compress(backend, dtype, layout):
    x = tokens(3, 60, 33, dtype=dtype, kind="clustered", seed=4)
    got, indices = backend.compress(x, 20, 6, layout=layout)
    if layout == "inplace":
        assert_same(backend.merge(x, indices), got)
    if layout == "append":
        assert_same(backend.merge(x, indices[:, :20].contiguous()), got[:, :20])
    if layout == "overwrite":
        p = backend.score(x, 6)[1]
        slots = (got[:, :, None] == x.gather(1, p[:, :, None].expand(-1, -1, 33))[:, None]).all(-1).any(-1)  # [B, K]
        assert slots.sum(1).tolist() == [6, 6, 6]
        assert_same(backend.merge(x, indices, targets=~slots)[~slots], got[~slots])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "clustered"])
@pytest.mark.parametrize(
    ("N", "K", "D"), [(20, 1, 8), (130, 65, 40), (200, 30, 300), (97, 96, 17), (500, 7, 64), (64, 17, 1)]
)
def test_means(backend, dtype, kind, N, K, D):
    x = tokens(1, N, D, dtype=dtype, kind=kind, seed=K)
    indices = torch.randperm(N, generator=torch.Generator().manual_seed(5))[:K]
    checked = check_merge(x[0], backend.merge(x, indices[None])[0], indices, torch.ones(K, dtype=torch.bool))
    assert checked >= 0.7 * K or D == 1, "too few rows have a clear arg-max to say anything"


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_worse_than_twice_plain_torch(backend, dtype):
    """The error is at most twice that of plain torch with the same rows, targets and dtype, or half a unit."""
    x = tokens(1, 300, 48, dtype=dtype, kind="clustered", seed=6)
    rows_, X = torch.arange(0, 300, 20), x[0].double()
    dropped = torch.ones(300, dtype=torch.bool).index_fill(0, rows_, False)
    target = (X[dropped] @ torch.nn.functional.normalize(X[rows_]).T).argmax(1)
    count = 1 + torch.bincount(target, minlength=len(rows_))[:, None]
    exact = X[rows_].index_add(0, target, X[dropped]) / count
    plain = x[0, rows_].index_add(0, target, x[0, dropped]) / count.to(dtype)
    got = backend.merge(x, rows_[None])[0].double()
    floor = torch.finfo(dtype).eps / 2 * exact.abs().max()
    assert (got - exact).abs().max() <= 2 * (plain.double() - exact).abs().max() + floor


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_wider_than_the_dtype(backend, dtype):
    """2999 tokens of 60 sum to 180000, past float16, and past what bfloat16 can count."""
    x = torch.full((1, 3000, 2), 60.0, dtype=dtype)
    x[0, 0, 1] = 30
    expected = torch.tensor([60, (30 + 2999 * 60) / 3000]).to(dtype)
    torch.testing.assert_close(merge(backend, x, [0])[0], expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_written_right(backend, dtype):
    """A token with every value whose square float32 can sum, averaged with its copy, does not change."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    values = values[values.isfinite() & (values.abs() < 1e15)]
    x = values.expand(1, 2, -1).contiguous()
    assert torch.equal(backend.merge(x, torch.tensor([[0]]))[0, 0], values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_output_holds_packed_targets_until_the_means(dtype):
    """Per target, the CPU workspace grows by the part of its packed form that exceeds its row; half if widened."""
    if "cpu" not in apet_kernels.available_backends():
        pytest.skip("the CPU library is not built")
    D = 4096
    few, many = (apet_kernels.plan(torch.empty(1, 2048, D, dtype=dtype), K, 10).workspace_bytes for K in (256, 1024))
    assert many - few <= (1024 - 256) * (D * (4 - dtype.itemsize) + 64)
