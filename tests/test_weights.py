"""`weights`: what the values are multiplied by that tokens are picked and ranked by."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apet_kernels import reference
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same, check_merge

# name -> N, keep and options: each rule and layout, few and many basis tokens
CALLS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "rounds": (90, 40, {"basis": None, "select": "qr"}),
    "many rounds": (160, 70, {"basis": None, "select": "qr", "start": 7}),
    "few": (60, 12, {"basis": None, "select": "qr"}),
    "medoids": (70, 20, {"basis": None, "select": "qr", "refine": 1}),
    "part of the basis": (100, 80, {"basis": 66, "select": "qr"}),
    "fps": (70, 20, {"basis": 6, "select": "fps"}),
    "fps start": (70, 20, {"basis": 6, "select": "fps", "start": 11}),
    "qr overwrite": (64, 20, {"basis": 5, "select": "qr", "layout": "overwrite"}),
    "fps append": (64, 20, {"basis": 5, "select": "fps", "layout": "append"}),
}
EVERY = pytest.mark.parametrize("name", CALLS)


def weights_of(*shape: int, seed: int = 0) -> torch.Tensor:
    """Returns weights from 0.1 to 1, all different."""
    return 0.1 + 0.9 * torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.rest_interpreted
@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_tokens_are_those_of_the_reference(backend, name, dtype):
    """The tokens differ enough that no choice is within rounding of another."""
    N, keep, options = CALLS[name]
    x, weights = tokens(2, N, 96, dtype=dtype, seed=N), weights_of(2, N, seed=keep)
    got, at = backend.compress(x, keep, **options, weights=weights)
    _, expected = reference.compress(x, keep, **options, weights=weights)
    assert at.tolist() == expected.tolist()
    _, without = reference.compress(x, keep, **options)
    assert at.tolist() != without.tolist(), "these weights change the choice"
    if options.get("layout", "inplace") == "inplace":
        for b in range(2):
            check_merge(x[b], got[b], at[b], torch.ones(keep, dtype=torch.bool))


@pytest.mark.rest_interpreted
@EVERY
def test_only_ratios_matter(backend, name):
    N, keep, options = CALLS[name]
    x, weights = tokens(1, N, 40, seed=N), weights_of(1, N)
    for one, other in ((None, torch.ones(1, N)), (weights, 2.0**-20 * weights)):
        expected = backend.compress(x, keep, **options, weights=one)
        for got, wanted in zip(backend.compress(x, keep, **options, weights=other), expected, strict=True):
            assert_same(got, wanted)


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("name", ["rounds", "many rounds", "few", "qr overwrite"])
def test_pivots_are_those_of_scaled_tokens(backend, name):
    """A token times 2^k has residuals times 4^k, and spans the same; without a ridge nothing else changes."""
    N, keep, options = CALLS[name]
    x = tokens(1, N, 96, seed=N)
    power = torch.randint(-2, 3, (1, N), generator=torch.Generator().manual_seed(1)).float()
    _, at = backend.compress(x, keep, **options, ridge=0.0, weights=4**power)
    _, scaled = backend.compress(x * (2**power)[..., None], keep, **options, ridge=0.0)
    assert at.tolist() == scaled.tolist()


@pytest.mark.rest_interpreted
@EVERY
def test_tokens_of_weight_0_come_last(backend, name):
    """Negative weights and NaN are the same; `start` is picked all the same."""
    N, keep, options = CALLS[name]
    if "layout" in options or options.get("refine"):
        return
    x, weights = tokens(1, N, 96, seed=N), torch.zeros(1, N)
    chosen = torch.randperm(N, generator=torch.Generator().manual_seed(2))[:keep].sort().values
    if options.get("start", -1) >= 0 and options["start"] not in chosen:
        chosen = torch.cat([chosen[:-1], torch.tensor([options["start"]])]).sort().values
    weights[0, chosen] = 1.0
    for nothing in (0.0, -3.0, float("nan")):
        given = torch.where(weights > 0, weights, nothing)
        assert backend.compress(x, keep, **options, weights=given)[1][0].tolist() == chosen.tolist()


@pytest.mark.rest_interpreted
def test_distances_beyond_float32_of_tokens_of_weight_0(backend):
    """They are 0 when weighted, as in float64."""
    x = torch.tensor([[[1.5e19, 0], [-1.5e19, 0], [0, 1], [1, 1]]])
    weights = torch.tensor([[1.0, 0, 1, 1]])
    _, at = backend.compress(x, 2, basis=2, select="fps", weights=weights)
    _, expected = reference.compress(x, 2, basis=2, select="fps", weights=weights)
    assert at.tolist() == expected.tolist()
    assert 1 not in at


@pytest.mark.rest_interpreted
def test_infinite_weights_and_tokens_stay_where_they_are(backend):
    options = {"basis": None, "select": "qr"}
    x, weights = tokens(2, 60, 40, seed=5), weights_of(2, 60)
    alone = backend.compress(x[1:], 20, **options, weights=weights[1:])
    weights[0, 3], weights[0, 8] = float("inf"), 0.0
    x[0, 8, 0] = float("nan")
    got, at = backend.compress(x, 20, **options, weights=weights)
    assert 3 in at[0].tolist()
    ten = {"basis": 10, "select": "qr"}
    assert 8 in backend.compress(x, 20, **ten, weights=weights)[1][0].tolist(), "it ranks highest, whatever its weight"
    assert_same(got[1:], alone[0])
    assert at[1].tolist() == alone[1][0].tolist()
    for nothing in (0.0, float("nan")):
        at = backend.compress(x[1:], 20, **options, weights=torch.full((1, 60), nothing))[1][0].tolist()
        assert at == list(range(20)), "all are equal, so the first stay"


def infinite(N: int, *tokens_: int) -> torch.Tensor:
    """Returns weights of 1, and inf for these tokens."""
    weights = torch.ones(1, N)
    weights[0, list(tokens_)] = float("inf")
    return weights


@pytest.mark.rest_interpreted
def test_products_beyond_float32_are_equal(backend):
    """They count as its largest number, so the lower position is first; `start` and tokens that are not finite still
    rank above."""
    x = torch.tensor([[[1.0, 0], [100, 0], [0, 1]]])
    for select in ("qr", "fps"):
        assert backend.compress(x, 1, basis=1, select=select, weights=infinite(3, 0, 1))[1].tolist() == [[0]]
    x = tokens(1, 20, 8, seed=2)
    x[0, 19] = float("nan")
    for select in ("qr", "fps"):
        at = backend.compress(x, 4, basis=1, select=select, weights=infinite(20, *range(10)))[1]
        assert 19 in at[0].tolist()
    x = tokens(1, 100, 48, seed=3)
    for start in (50, 90):
        at = backend.compress(x, 40, start=start, weights=infinite(100, *range(30)))[1]
        assert start in at[0].tolist()


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("name", ["rounds", "many rounds", "few", "fps", "fps start", "qr overwrite"])
@pytest.mark.parametrize("marked", [(3, 30, 31), tuple(range(2, 40, 3))], ids=["three", "many"])
def test_several_infinite_weights_are_the_references(backend, name, marked):
    N, keep, options = CALLS[name]
    x, weights = tokens(1, N, 96, seed=N + 1), weights_of(1, N, seed=keep)
    weights[0, list(marked)] = float("inf")
    expected = reference.compress(x, keep, **options, weights=weights)[1]
    assert backend.compress(x, keep, **options, weights=weights)[1].tolist() == expected.tolist()


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["rounds", "fps", "medoids"])
def test_alone_batched_packed_and_strided(backend, name, dtype):
    N, keep, options = CALLS[name]
    x, weights = tokens(3, N, 37, dtype=dtype, seed=1), weights_of(3, N)
    alone = [backend.compress(x[b : b + 1], keep, **options, weights=weights[b : b + 1]) for b in range(3)]
    wide = torch.full((N, 3), 7.0)
    wide[:] = weights.T
    for given in (weights, wide.T):
        got, at = backend.compress(x, keep, **options, weights=given)
        for b in range(3):
            assert_same(got[b], alone[b][0][0])
            assert at[b].tolist() == alone[b][1][0].tolist()
    cu, cu_keep = offsets([N] * 3), offsets([keep] * 3)
    sizes = (3 * keep, N, keep)
    packed = (x.flatten(0, 1), cu, cu_keep, *sizes)
    got, at = backend.compress_varlen(*packed, **options, weights=weights.flatten())
    for b in range(3):
        part = slice(b * keep, (b + 1) * keep)
        assert_same(got[part], alone[b][0][0])
        assert (at[part] - b * N).tolist() == alone[b][1][0].tolist()
