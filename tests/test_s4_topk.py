"""s4: exactly K tokens, the largest residuals, ties to the lower position."""

import pytest
import torch

from apet_kernels import reference
from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, tokens


def unit_vectors(N: int) -> torch.Tensor:
    """Returns [1, N, N] unit vectors: the basis is 0, 1, ... and every other residual is 1."""
    return torch.eye(N)[None]


def test_ties_inplace(backend):
    assert backend.compress(unit_vectors(16), 5, 2)[1].tolist() == [[0, 1, 2, 3, 4]]
    assert backend.compress(unit_vectors(16), 5, 2, start=9)[1].tolist() == [[0, 1, 2, 3, 9]]


def test_ties_overwrite(backend):
    """The basis has residual 0, so 2 .. 6 are kept; the two of lowest rank are the last, and the basis takes them."""
    x = unit_vectors(16)
    got, indices = backend.compress(x, 5, 2, layout="overwrite")
    assert indices.tolist() == [[2, 3, 4, 5, 6]]
    assert got[0, 3:].equal(x[0, :2])


def test_ties_append(backend):
    assert backend.compress(unit_vectors(16), 5, 2, layout="append")[1].tolist() == [[2, 3, 4, 5, 6, 0, 1]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_order_is_by_residual_not_by_position(backend, dtype):
    x = torch.diag(torch.tensor([3.0, 9, 1, 8, 2, 7, 4, 6, 5])).to(dtype)[None]  # basis of 2: tokens 1 and 3
    assert backend.score(x, 2)[1].tolist() == [[1, 3]]
    assert backend.compress(x, 5, 2)[1].tolist() == [[1, 3, 5, 7, 8]]
    assert backend.compress(x, 5, 2, layout="append")[1].tolist() == [[0, 5, 6, 7, 8, 1, 3]]
    got, indices = backend.compress(x, 4, 2, layout="overwrite")
    assert indices.tolist() == [[5, 6, 7, 8]]  # ranked 5, 7, 8, 6: the lowest two are 6 and 8
    assert got[0, 1].equal(x[0, 1])
    assert got[0, 3].equal(x[0, 3])


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["clustered", "repeated"])
def test_topk_of_score_reproduces_compress(backend, layout, select, kind):
    """The kept tokens are K, ascending, without repetition, and those that the residuals imply."""
    x = tokens(1, 41, 19, kind=kind, seed=11)
    residual, picks = backend.score(x, 6, select=select)
    p = picks[0][picks[0] >= 0]
    order = sorted(range(41), key=lambda n: (-float(residual[0, n]), n))
    for keep in (7, 8, 20, 40, 41) if layout == "overwrite" else (1, 5, 6, 7, 20, 40, 41):
        indices = backend.compress(x, keep, 6, layout=layout, select=select)[1][0].tolist()
        kept = indices[:keep]
        assert len(indices) == keep + 6 * (layout == "append")
        if layout == "inplace":
            expected = (p.tolist() + [n for n in order if n not in p.tolist()])[:keep]
        else:
            expected = order[:keep]
        assert kept == sorted(expected)


@pytest.mark.rest_interpreted
def test_keep_no_more_than_the_basis(backend):
    """inplace: the first K picks, in ascending position."""
    x = tokens(1, 30, 16, seed=12)
    p = backend.score(x, 8)[1][0].tolist()
    for keep in range(1, 9):
        assert backend.compress(x, keep, 8)[1][0].tolist() == sorted(p[:keep])


def test_non_finite_ranks_highest(backend):
    x = tokens(1, 20, 8, seed=13)
    x[0, 3, 1], x[0, 11, 2], x[0, 17, 0] = float("inf"), float("nan"), 2e38
    p = backend.score(x, 4)[1][0].tolist()
    assert backend.compress(x, 6, 4)[1][0].tolist() == sorted([*p, 3, 11]), "the basis, then the first of equals"
    assert set(backend.compress(x, 5, 4, layout="append")[1][0, :5].tolist()) > {3, 11, 17}
    assert backend.compress(x, 2, 4, layout="append")[1][0, :2].tolist() == [3, 11]


def test_float32_ranks():
    """Two residuals that are equal in float32 are a tie, also in the reference."""
    e_sq = torch.tensor([1.0, 1.0 + 2.0**-30, 0.5, 1.0 - 2.0**-30], dtype=torch.float64)
    kept, overwritten = reference.s4_topk(e_sq, torch.empty(0, dtype=torch.int64), 2, "append")
    assert kept.tolist() == [0, 1]
    assert not overwritten.any()


@pytest.mark.rest_interpreted
def test_many_tokens(backend):
    """More tokens than any block of a selection network or histogram."""
    make = torch.Generator().manual_seed(14)
    # On interpreted kernels each row of the result is a program of s5.
    tokens, keeps = (2100, (20,)) if backend.interpreted else (9001, (1, 2, 255, 4096, 9000))
    x = torch.zeros(1, tokens, 3)
    x[0, :, 0] = 1
    x[0, :, 1] = torch.randint(1, 40, (tokens,), generator=make) / 64  # many ties
    residual, picks = backend.score(x, 1, start=0)
    for keep in keeps:
        indices = backend.compress(x, keep, 1, start=0, layout="append")[1][0, :keep]
        expected = residual[0].sort(descending=True, stable=True).indices[:keep].sort().values
        assert indices.equal(expected)
    assert picks.tolist() == [[0]]
