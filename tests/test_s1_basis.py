"""s1: the basis tokens, their order, and where picking stops."""

import pytest
import torch

from tests.data import DTYPES, rows, tokens
from tests.judge import check_basis

NAN, INF = float("nan"), float("inf")


def picks(backend, x, basis, **choose):
    return backend.score(x, basis, **choose)[1][0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_farthest_point_by_hand(backend, dtype):
    # Squared distances: (10,0)-(0,9) 181; then 81 for tokens 0 and 1 alike: a tie, to the lower.
    x = rows([0, 0], [1, 0], [10, 0], [0, 9], [5, 5], dtype=dtype)
    assert picks(backend, x, 5) == [2, 3, 0, 4, 1]
    assert picks(backend, x, 3) == [2, 3, 0]
    assert picks(backend, x, 5, start=4) == [4, 0, 2, 3, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_qr_by_hand(backend, dtype):
    # (-3,0) is far from (4,0) but in its span: fps takes it, qr does not.
    x = rows([4, 0], [-3, 0], [0, 1], dtype=dtype)
    assert picks(backend, x, 3, ridge=0.0) == [0, 1, 2]
    assert picks(backend, x, 3, ridge=0.0, select="qr") == [0, 2, -1]
    # A ridge above rounding keeps 9 ridge / (16 + ridge) of it: not dependent, so it comes last.
    assert picks(backend, x, 3, ridge=1e-3, select="qr") == [0, 2, 1]


def test_qr_counts_what_all_picks_explain(backend):
    # After (9,0,0): residuals 16, 9, 16.81 - so (0, 0, 4.1) comes before (0, 4, 0), and (8,3,0) has nothing left.
    x = rows([9, 0, 0], [0, 4, 0], [8, 3, 0], [0, 0, 4.1])
    assert picks(backend, x, 4, ridge=0.0, select="qr") == [0, 3, 1, -1]


def test_qr_counts_the_ridge_penalty(backend):
    # With ridge 4, (2,0) reconstructs (3,0) to 2.25; the penalty is 2.25 as well: r = 4.5, more than the 4 of (0,2).
    assert picks(backend, rows([2, 0], [3, 0], [0, 2]), 3, ridge=4.0, select="qr", start=0) == [0, 1, 2]


def test_ties_go_to_the_lower_position(backend):
    eye = torch.eye(16)[torch.randperm(16, generator=torch.Generator().manual_seed(3))][None]
    assert picks(backend, eye, 6) == [0, 1, 2, 3, 4, 5]
    assert picks(backend, eye, 6, select="qr") == [0, 1, 2, 3, 4, 5]
    assert picks(backend, eye, 3, start=9) == [9, 0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_with_a_token_that_never_led(backend, dtype):
    """A kernel that updates only the leaders of the last step must also find a lower token that ties with them."""
    # After (100,0), the distances of all tokens near it are smaller, that of (70,40) is 2500. (0,-50), which has had
    # 2500 from the start, ties with it, though eight others were ahead.
    near = [[90, k] for k in range(7)]
    x = rows([0, 0], [0, -50], [100, 0], *near, [70, 40], dtype=dtype)
    assert picks(backend, x, 3, start=0) == [0, 2, 1]
    # The same, but (50,0), the last of the eight leaders, has 2500 as well.
    near = [[70 + k, 0] for k in range(6)]
    x = rows([0, 0], [50, 0], [0, -50], [80, 0], *near, [50, 40], dtype=dtype)
    assert picks(backend, x, 3, start=0) == [0, 3, 2]


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_at_which_no_token_can_be_ruled_out(backend, dtype, select):
    """600 tokens are far away, all near the second pick, which is the farthest: each of them must be updated."""
    x = tokens(1, 700, 40, dtype=dtype, seed=8) / 64
    x[0, 100:, 0] += 100
    x[0, 400, 0] += 4
    basis = 20  # more basis tokens than a tile is updated with at once, and tiles that differ in their number
    p = backend.score(x, basis, select=select, start=0)[1][0]
    check_basis(x[0], p[p >= 0], basis, select, 0, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", [1, 3, 33, 100, 128])
def test_repeated_tokens_stop_early(backend, dtype, D):
    """The distance of a token from its copy is exactly 0, for every length of a vector loop's tail."""
    distinct = tokens(3, D, dtype=dtype, seed=D)
    x = distinct[torch.tensor([0, 1, 0, 2, 2, 1, 0, 1])][None]
    p = picks(backend, x, 6)
    assert sorted(p[:3]) == [0, 1, 3]
    assert p[3:] == [-1, -1, -1]


@pytest.mark.parametrize("select", ["fps", "qr"])
def test_all_equal_and_all_zero(backend, select):
    x = tokens(1, 7, seed=1).expand(9, 7)[None].contiguous()
    assert picks(backend, x, 4, ridge=0.0, select=select) == [0, -1, -1, -1]
    assert picks(backend, x, 4, ridge=0.0, select=select, start=5) == [5, -1, -1, -1]
    zero = torch.zeros(1, 9, 7)
    assert picks(backend, zero, 4, select=select) == [-1] * 4
    assert picks(backend, zero, 4, select=select, start=5) == [5, -1, -1, -1], "an explicit start is taken as it is"


@pytest.mark.parametrize("select", ["fps", "qr"])
def test_fewer_tokens_than_basis(backend, select):
    x = tokens(1, 4, 32, seed=2)
    p = picks(backend, x, 9, select=select)
    assert sorted(p[:4]) == [0, 1, 2, 3]
    assert p[4:] == [-1] * 5


@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_tokens_of_non_finite_norm_are_never_picked(backend, select, bad):
    x = tokens(1, 8, 16, seed=4)
    x[0, 2, 5] = bad
    x[0, 6] = bad
    p = picks(backend, x, 8, select=select, start=2)
    assert sorted(p) == [-1, -1, 0, 1, 3, 4, 5, 7]
    assert p == picks(backend, x, 8, select=select), "an explicit start of non-finite norm is as start=-1"
    good = x[:, [0, 1, 3, 4, 5, 7]]
    assert [[0, 1, 3, 4, 5, 7].index(i) for i in p[:6]] == picks(backend, good, 6, select=select)
    assert picks(backend, torch.full((1, 5, 3), bad), 2, select=select) == [-1, -1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("start", [-1, 0, 41])
@pytest.mark.parametrize("kind", ["normal", "clustered", "repeated"])
def test_every_pick_is_the_best_of_its_step(backend, dtype, select, start, kind):
    x = tokens(1, 70, 45, dtype=dtype, kind=kind, seed=5)
    p = backend.score(x, 12, select=select, start=start)[1][0]
    sure = check_basis(x[0], p[p >= 0], 12, select, start, 1e-5)
    assert sure, "this input was chosen so that no pick is within rounding of another"


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_basis_of_64(backend, select):
    x = tokens(1, 100, 80, seed=6)
    p = backend.score(x, 64, select=select)[1][0]
    assert (p >= 0).all()
    check_basis(x[0], p, 64, select, -1, 1e-5)


def test_qr_of_mixed_magnitudes(backend):
    """A picked token of huge norm is not picked again, although its norm exceeds all residuals."""
    x = torch.tensor([[[1e8, 0, 0], [0, 1, 0], [0, 0, 0.5]]])
    assert backend.score(x, 3, select="qr")[1].tolist() == [[0, 1, 2]]
