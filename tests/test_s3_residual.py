"""s2 and s3: the squared residual of the ridge least squares, and its threshold."""

import pytest
import torch

from apet_kernels import reference
from apet_kernels.reference import U
from tests.data import DTYPES, rows, tokens
from tests.judge import check_residual, reconstruct

INF = float("inf")


def residual(backend, x, basis, **choose):
    return backend.score(x, basis, **choose)[0][0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_by_hand(backend, dtype):
    # S = (2, 0), ridge 1: w = 2 x0 / 5, so x0 / 5 is left of the first channel, and all of the second.
    x = rows([2, 0], [5, 3], [0, -7], dtype=dtype)
    e_sq = residual(backend, x, 1, start=0, ridge=1.0)
    bound = 8 * U * torch.tensor([4.0, 34, 49])
    assert ((e_sq - torch.tensor([0.16, 10, 49])).abs() <= bound).all()


def test_two_basis_tokens_by_hand(backend):
    # (3,0,0) and the farthest from it, (-30,40,0), span the plane: the residual is the third channel.
    x = rows([3, 0, 0], [-30, 40, 0], [1, 2, 5], [-6, 8, 0.5])
    e_sq, p = backend.score(x, 2, start=0, ridge=0.0)
    assert p.tolist() == [[0, 1]]
    torch.testing.assert_close(e_sq[0], torch.tensor([0, 0, 25, 0.25]), rtol=1e-5, atol=0)


def test_ridge_penalty_is_not_part_of_the_residual(backend):
    """e_sq is ||x - S^T w||^2; ||x||^2 - ||y||^2 would be 0.8 here, not 0.16."""
    assert residual(backend, rows([2, 0], [2, 0]), 1, ridge=1.0)[1] == pytest.approx(0.16, abs=8 * U * 4)


def test_rounding_counts_as_zero(backend):
    # ||(1, t)||^2 = 1 + t^2 and the projection on (1, 0) are exact in float32, so e_sq = t^2 exactly.
    x = rows([1, 0], [1, 2**-10], [1, 2**-11])
    e_sq = residual(backend, x, 1, start=0, ridge=0.0)
    assert e_sq.tolist() == [0.0, 16 * U, 0.0], "16u is above 4 M u ||x||^2 with M = 1, and 4u is not"


def test_the_bound_takes_the_basis_asked_for(backend):
    """Tokens off a line by sqrt(12u) of their norm: above the threshold of M = 1, below that of M = 10."""
    make = torch.Generator().manual_seed(0)
    line, noise = torch.randn(64, generator=make), torch.randn(30, 64, generator=make)
    x = (torch.linspace(1, 2, 30)[:, None] * (line / line.norm() + (12 * U) ** 0.5 * noise / 8))[None]
    assert (residual(backend, x, 1)[:-1] > 0).all()
    assert (residual(backend, x, 10) == 0).all()


def test_the_bound_does_not_shrink_with_the_basis_found(backend):
    """Copies of one token end the basis at m = 1. The ridge leaves 12u of them, below the threshold of M = 10."""
    x, ridge = torch.tensor([1.0, 0]).expand(1, 5, 2).contiguous(), (12 * U) ** 0.5
    assert (residual(backend, x, 1, ridge=ridge) > 0).all()
    assert backend.score(x, 10, ridge=ridge)[1][0].tolist() == [0] + [-1] * 9
    assert (residual(backend, x, 10, ridge=ridge) == 0).all()


def test_basis_tokens_have_none(backend):
    x = tokens(1, 60, 48, kind="clustered", seed=1)
    e_sq, p = backend.score(x, 10, ridge=0.0)
    assert (e_sq[0, p[0]] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("kind", ["normal", "clustered", "repeated"])
@pytest.mark.parametrize(("N", "D", "M"), [(50, 64, 10), (33, 7, 5), (80, 129, 20), (20, 1024, 3), (9, 4096, 1)])
def test_bound(backend, dtype, select, kind, N, D, M):
    x = tokens(1, N, D, dtype=dtype, kind=kind, seed=N)
    e_sq, p = backend.score(x, M, select=select)
    p = p[0][p[0] >= 0]
    check_residual(x[0], e_sq[0], p, M, 1e-5)
    if D > M:  # otherwise nothing is left but what the ridge leaves
        assert reconstruct(reference.widen(x[0]), p, 1e-5, 4 * U)[2].max() < 16, "the bound was not stretched much"


@pytest.mark.parametrize("ridge", [0.0, 1e-5, 1.0, 100.0])
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_ridge(backend, ridge, select):
    x = tokens(1, 40, 24, kind="clustered", seed=7)
    e_sq, p = backend.score(x, 8, select=select, ridge=ridge)
    check_residual(x[0], e_sq[0], p[0], 8, ridge)


def test_dependent_basis_tokens_change_nothing(backend):
    """fps picks -a and 2a although a is in the basis. Their rows are 0, and nothing is divided by their pivots of 0."""
    a, b, c = torch.tensor([1.0, 2, 0, 0]), torch.tensor([0, 1.0, 1, 0]), torch.tensor([1.0, 1, 1, 1])
    x = torch.stack([-3 * a, 2 * a, a, -a, b, c, 2 * c])[None]
    e_sq, p = backend.score(x, 7, ridge=0.0)
    assert sorted(p[0].tolist()) == list(range(7))
    assert (e_sq == 0).all()
    e_sq, p = backend.score(x, 3, ridge=0.0, start=0)
    check_residual(x[0], e_sq[0], p[0], 3, 0.0)


@pytest.mark.parametrize("D", [1, 2, 5])
def test_more_basis_tokens_than_channels(backend, D):
    x = tokens(1, 40, D, seed=D)
    for ridge in (0.0, 1e-5):
        e_sq, p = backend.score(x, 12, ridge=ridge)
        check_residual(x[0], e_sq[0], p[0][p[0] >= 0], 12, ridge)
    e_sq, p = backend.score(x, 12, ridge=0.0, select="qr")
    assert (p[0] >= 0).sum() >= D  # rounding may give one more pivot above the threshold
    assert (e_sq == 0).all()


def test_no_basis_leaves_the_norm(backend):
    e_sq, p = backend.score(torch.zeros(1, 4, 3), 2)
    assert p.tolist() == [[-1, -1]]
    assert e_sq.tolist() == [[0, 0, 0, 0]]


def test_non_finite_norm_is_infinite(backend):
    x = tokens(1, 9, 5, seed=3)
    x[0, 4, 1], x[0, 7, 0] = float("nan"), 3e38
    e_sq = residual(backend, x, 2)
    assert (e_sq == INF).nonzero().flatten().tolist() == [4, 7]


def test_the_reference_agrees_with_gram_schmidt_and_with_the_normal_equations():
    """The specification's QR against two other solutions, all in float64."""
    x = tokens(50, 30, kind="clustered", seed=8)
    image = reference.widen(x)
    p = reference.s1_basis(image, 10)
    W = reference.s2_solve(image, p, 1e-5)
    S = image.X[p]
    normal = torch.linalg.solve(S @ S.T + 1e-5 * torch.eye(10, dtype=S.dtype), S @ image.X.T)
    torch.testing.assert_close(W, normal, rtol=1e-9, atol=1e-9)
    e_sq, r, _ = reconstruct(image, p, 1e-5, 4 * U)
    torch.testing.assert_close(((image.X - W.T @ S) ** 2).sum(1), e_sq, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(r - 1e-5 * (W**2).sum(0), e_sq, rtol=1e-9, atol=1e-12)
