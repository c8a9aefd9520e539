"""The three layouts end to end, compared with float64, and their corner counts."""

import pytest
import torch

from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, rows, tokens
from tests.judge import assert_same, check


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("kind", ["normal", "clustered", "repeated"])
def test_compared_with_float64(backend, dtype, layout, select, kind):
    check(backend, tokens(2, 90, 40, dtype=dtype, kind=kind, seed=1), 30, layout=layout, select=select)


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("B", "N", "D", "keep", "basis"),
    # Interpreted kernels get the first and the last, which are the quickest.
    [(5, 17, 3, 16, 1), (1, 576, 128, 64, 10), (3, 100, 1024, 33, 5), (1, 300, 16, 65, 64), (2, 90, 61, 89, 20)],
)
def test_shapes(backend, dtype, B, N, D, keep, basis):
    """Each shape has one layout, since all combinations would test nothing more."""
    layout = LAYOUTS[(N + keep) % 3]
    check(backend, tokens(B, N, D, dtype=dtype, kind="clustered", seed=N), keep, basis, layout=layout)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("basis", [1, 9, 20])
def test_keeping_all_is_the_input_bit_for_bit(backend, dtype, layout, basis):
    """keep = N comes before every other rule, even if `overwrite` would need keep > basis."""
    x = tokens(2, 9, 13, dtype=dtype, seed=2)
    x[1, 4, 7] = float("nan")
    x[1, 5, 0] = -0.0
    got, indices = backend.compress(x, 9, basis, layout=layout)
    assert_same(got[:, :9], x)
    assert indices[:, :9].tolist() == [list(range(9))] * 2
    if layout == "append":
        p = backend.score(x, basis)[1]
        p = torch.where(p < 0, p[:, :1], p)
        assert indices[:, 9:].equal(p)
        assert_same(got[:, 9:], x.gather(1, p[:, :, None].expand(-1, -1, 13)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_fewer_basis_tokens_than_asked_for(backend, layout):
    """Three distinct tokens, basis=5: m = 3."""
    x = tokens(3, 20, seed=3)[torch.tensor([0, 1, 2, 1, 0, 1, 2, 2, 0, 0])][None]
    assert (backend.score(x, 5)[1] >= 0).sum() == 3
    got, indices = check(backend, x, 6, 5, layout=layout)
    p = [i for i in backend.score(x, 5)[1][0].tolist() if i >= 0]
    if layout == "inplace":  # all residuals are 0: the lowest positions join the basis, copies are merged into each
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5]]
        torch.testing.assert_close(got[0, :3], x[0, :3], rtol=1e-6, atol=0)
        assert_same(got[0, 3:], x[0, 3:6])
    if layout == "overwrite":
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5]]
        assert_same(got[0, 3:], x[0, p])
    if layout == "append":
        assert indices.tolist() == [[0, 1, 2, 3, 4, 5, *p, p[0], p[0]]]


def test_append_without_a_basis(backend):
    """With zeros alone no token is picked, so token 0 fills the basis rows."""
    got, indices = backend.compress(torch.zeros(1, 6, 4), 2, 3, layout="append")
    assert indices.tolist() == [[0, 1, 0, 0, 0]]
    assert not got.any()
    assert backend.compress(torch.zeros(1, 6, 4), 4, 3, layout="overwrite")[1].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blend", [0.0, 0.25, 0.5, 1.0])
def test_blend(backend, dtype, blend):
    x = tokens(2, 40, 21, dtype=dtype, kind="clustered", seed=4)
    got, _ = check(backend, x, 14, 6, layout="overwrite", blend=blend)
    if blend in (0.0, 1.0):
        return
    whole, _ = backend.compress(x, 14, 6, layout="overwrite")
    assert ((got != whole).any(-1)).sum(1).tolist() == [6, 6], "only the slots that the basis takes depend on blend"


def test_overwrite_by_hand(backend):
    # Basis of 1: token 4, (0,0,9). Residuals rank 0, 1, 3, 2 and then 5, 4. Three are kept: 0, 1, 3.
    x = rows([7, 0, 0], [0, 6, 0], [3, 3, 0], [0, -5, 0], [0, 0, 9], [0, 0, 4])
    got, indices = backend.compress(x, 3, 1, layout="overwrite")
    assert indices.tolist() == [[0, 1, 3]]
    # Token 3 is lost to the basis. (3,3,0) ties between 0 and 1; (0,0,9) and (0,0,4) have cosine 0 with both.
    torch.testing.assert_close(got[0], torch.tensor([[10 / 4, 3 / 4, 13 / 4], [0, 6, 0], [0, 0, 9]]))
    mixed, _ = backend.compress(x, 3, 1, layout="overwrite", blend=0.25)
    assert mixed[0, 2].tolist() == [0, -3.75, 2.25]


def test_inplace_by_hand(backend):
    x = rows([7, 0, 0], [0, 6, 0], [3, 3, 0], [0, -5, 0], [0, 0, 9], [0, 0, 4])
    got, indices = backend.compress(x, 3, 1)
    assert indices.tolist() == [[0, 1, 4]]
    torch.testing.assert_close(got[0], torch.tensor([[10 / 3, -2 / 3, 0], [0, 6, 0], [0, 0, 6.5]]))


def test_append_by_hand(backend):
    x = rows([7, 0, 0], [0, 6, 0], [3, 3, 0], [0, -5, 0], [0, 0, 9], [0, 0, 4])
    got, indices = backend.compress(x, 2, 1, layout="append")
    assert indices.tolist() == [[0, 1, 4]]
    torch.testing.assert_close(got[0], torch.tensor([[10 / 5, -2 / 5, 13 / 5], [0, 6, 0], [0, 0, 9]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_input_is_not_written(backend, layout):
    x = tokens(2, 30, 8, seed=5)
    before = x.clone()
    got, _ = backend.compress(x, 30, 4, layout=layout)
    got.zero_()
    backend.compress(x, 10, 4, layout=layout)
    assert_same(x, before)
