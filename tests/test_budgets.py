"""`share`, `needed` and `distinct`: budgets and weights that depend on what images contain."""

from __future__ import annotations

import re

import pytest
import torch

import apet_kernels
from apet_kernels import budgets
from apet_kernels.budgets import Pivots
from benchmarks.lib import selection
from tests.data import DTYPES, tokens
from tests.op_calls import error_of


def exact(x: torch.Tensor, lengths: list[int], keep: list[int]) -> list[int]:
    """A second implementation, in float64, that factorises the Gram matrix of each whole image."""
    least = [max(1, k // 4) for k in keep]
    found = []
    for s, image in enumerate(x.double().split(lengths)):
        values = selection.pivots((image @ image.T)[None], len(image)).resid_sq[0].tolist()
        found += [(float("inf") if n < least[s] else value, -s) for n, value in enumerate(values)]
    taken = [-s for _, s in sorted(found, reverse=True)[: sum(keep)]]
    return [taken.count(s) for s in range(len(keep))]


def images(lengths: list[int], dtype: torch.dtype) -> torch.Tensor:
    """Images that differ in scale, in how many directions they have, and in their noise."""
    g = torch.Generator().manual_seed(len(lengths))
    made = []
    for s, n in enumerate(lengths):
        rank = 2 + 5 * s % 23
        image = torch.randn(n, rank, generator=g) @ torch.randn(rank, 48, generator=g) / rank**0.5
        made.append((1 + s) ** 0.5 * (image + 0.1 * torch.randn(n, 48, generator=g)))
    return torch.cat(made).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "keep"),
    [
        ([40, 40], [10, 10]),
        ([90, 30, 90, 12], [20, 8, 3, 5]),
        ([64] * 9, [7] * 9),
        ([300, 300], [100, 2]),
        ([5, 200], [5, 60]),
        ([30, 1], [9, 1]),
    ],
)
def test_shares_are_those_of_a_second_implementation(dtype, lengths, keep):
    x = images(lengths, dtype)
    got = apet_kernels.share(x, lengths, keep)
    assert got == exact(x, lengths, keep)
    assert sum(got) == sum(keep)
    assert all(max(1, k // 4) <= got_ <= n for got_, k, n in zip(got, keep, lengths, strict=True))
    assert (got != keep) == (min(lengths) > 9), "images of so few tokens keep what they had"


def test_what_it_cannot_divide_stays():
    x = tokens(60, 16, seed=1)
    assert apet_kernels.share(x, [60], [17]) == [17]
    assert apet_kernels.share(x, [20, 40], [1, 1]) == [1, 1]
    assert apet_kernels.share(x, [20, 40], [20, 40]) == [20, 40]
    assert apet_kernels.share(x[:0], [], []) == []


def test_images_without_information_keep_the_least():
    """Zeros, copies of one token, and tokens of infinite norm give their share to the image that has more to tell."""
    rich = tokens(100, 64, seed=2)
    for poor in (torch.zeros(50, 64), torch.ones(50, 64), torch.full((50, 64), float("inf"))):
        assert apet_kernels.share(torch.cat([poor, rich]), [50, 100], [20, 20]) == [5, 35]
    assert apet_kernels.share(torch.zeros(90, 64), [50, 40], [20, 20]) == [35, 5], "ties go to the first image"


def test_order_and_copies_of_images():
    a, b = tokens(70, 32, seed=3), 2 * tokens(50, 32, seed=4)
    one = apet_kernels.share(torch.cat([a, b]), [70, 50], [15, 15])
    assert one[1] > one[0]
    assert apet_kernels.share(torch.cat([b, a]), [50, 70], [15, 15]) == one[::-1]
    first, second = apet_kernels.share(torch.cat([a, a]), [70, 70], [15, 15])
    assert 0 <= first - second <= 1


def test_it_stops_when_more_picks_change_nothing(monkeypatch):
    """Among images alike it needs little more than the picks that it returns."""
    picked = []
    real = Pivots._pick
    monkeypatch.setattr(Pivots, "_pick", lambda self: (picked.append(len(self.numbers)), real(self)))
    x = tokens(6 * 300, 64, seed=5)
    got = apet_kernels.share(x, [300] * 6, [30] * 6)
    assert sum(picked) <= 6 * (max(got) + 16)
    assert max(got) < 64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limit", [0.001, 0.05, 0.2, 9])
def test_needed_is_that_of_a_second_implementation(dtype, limit):
    lengths, keep = [90, 300, 64, 12, 90, 1], [3, 5, 40, 1, 20, 1]
    x = images(lengths, dtype)
    expected = []
    for image, least in zip(x.double().split(lengths), keep, strict=True):
        values = selection.pivots((image @ image.T)[None], len(image)).resid_sq[0]
        expected.append(max(least, int((values > limit * image.square().sum(-1).mean()).sum())))
    got = apet_kernels.needed(x, lengths, keep, limit)
    assert got == expected
    assert (got != keep) == (limit < 1)
    for image, k, alone in zip(x.split(lengths), keep, got, strict=True):
        assert apet_kernels.needed(image, [len(image)], [k], limit) == [alone]


def test_needed_where_there_is_nothing_to_tell():
    """Zeros, copies of one token, and tokens of infinite norm need no more than they keep; orthogonal ones all."""
    for poor in (torch.zeros(50, 64), torch.ones(50, 64), torch.full((50, 64), float("inf"))):
        assert apet_kernels.needed(poor, [50], [7]) == [7]
    assert apet_kernels.needed(torch.eye(50), [50], [7]) == [50]
    assert apet_kernels.needed(torch.eye(50), [50], [7], limit=1) == [7], "no residual is above the mean square"
    assert apet_kernels.needed(torch.eye(50)[:0], [], []) == []


@pytest.mark.parametrize("limit", [0, -1.0, float("nan"), float("inf"), "0.2", None])
def test_a_limit_that_is_none(limit):
    with pytest.raises(ValueError, match=re.escape(f"limit={limit!r} is not a number above 0")):
        apet_kernels.needed(torch.eye(9), [9], [3], limit)


def test_wrong_arguments():
    x = tokens(20, 8, seed=6)
    for args, words in (
        ((x[None], [20], [3]), "x has 3 dimensions"),
        ((x.double(), [20], [3]), "Double"),
        ((x, [9, 9], [3, 3]), "add up to 18, but x has 20 tokens"),
        ((x, [9, 11], [3]), "2 lengths but 1 keeps"),
        ((x, [9, 11], [10, 3]), "keep=10 is outside 1..9, the tokens of image 0"),
        ((x, [9, 11], [3.5, 3]), "keep=3.5 of image 0 is not a whole number"),
        ((x, torch.tensor([9.0, 11.0]), [3, 3]), "length=9.0 of image 0 is not a whole number"),
    ):
        assert words in error_of(apet_kernels.share, args, {})
        assert words in error_of(apet_kernels.needed, args, {})


def weights(x: torch.Tensor, lengths: list[int], keep: list[int]) -> list[float]:
    """`distinct`, with the arguments of the others."""
    return apet_kernels.distinct(x, lengths).tolist()


@pytest.mark.parametrize("function", [apet_kernels.share, apet_kernels.needed, weights])
def test_torchs_settings_do_not_matter(function):
    """Neither torch.autocast and the precision of products, which round them to 16 bits, nor the default dtype."""
    lengths, keep = [40, 60, 40], [9, 8, 7]
    x = 200 * (12 + images(lengths, torch.float32))  # a direction that all share
    expected = function(x, lengths, keep)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert function(x, lengths, keep) == expected
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            assert function(x, lengths, keep) == expected
        finally:
            torch.set_default_dtype(before)
    precision = torch.get_float32_matmul_precision()
    for rounded in ("medium", "high"):
        torch.set_float32_matmul_precision(rounded)
        try:
            assert function(x, lengths, keep) == expected
        finally:
            torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("function", [apet_kernels.share, apet_kernels.needed])
@pytest.mark.parametrize("D", [16, 128])
def test_devices_without_float64(function, D, monkeypatch):
    """There, the budgets are the same for tokens without near ties."""
    lengths, keep = [40, 60, 40], [9, 8, 7]
    x = torch.randn(sum(lengths), D, generator=torch.Generator().manual_seed(0))
    expected = function(x, lengths, keep)
    expected_weights = apet_kernels.distinct(x, lengths)
    monkeypatch.setattr(budgets, "has_float64", lambda device: False)
    assert function(x, lengths, keep) == expected
    torch.testing.assert_close(apet_kernels.distinct(x, lengths), expected_weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("power", [0, 0.5, 1, 2.0])
def test_distinct_is_that_of_a_second_implementation(dtype, power):
    lengths = [90, 300, 12, 1]
    x = images(lengths, dtype) + 2 * torch.ones(48, dtype=dtype)  # a direction that all share
    expected = [
        (1 - torch.nn.functional.cosine_similarity(image[:, None], image[None], dim=-1).mean(1)).clamp(min=0) ** power
        for image in x.double().split(lengths)
    ]
    got = apet_kernels.distinct(x, lengths, power)
    assert got.dtype == torch.float32
    assert got.shape == (sum(lengths),)
    torch.testing.assert_close(got.double(), torch.cat(expected).clamp(min=1e-5), rtol=1e-6, atol=1e-7)
    assert (got[:-1].std() > 0) == (power > 0), "weights differ"
    for image, own in zip(x.split(lengths), got.split(lengths), strict=True):
        assert torch.equal(apet_kernels.distinct(image, [len(image)], power), own), "no bit depends on other images"


def test_distinct_prefers_what_occurs_once():
    """Where 60 noisy tokens of one kind are larger than 4 of another one, the weights let the small kind be kept."""
    g = torch.Generator().manual_seed(0)
    x = torch.cat([30 * torch.eye(64)[:1] + torch.randn(60, 64, generator=g), 0.7 * torch.randn(4, 64, generator=g)])
    weights = apet_kernels.distinct(x, [64])
    assert weights[60:].min() > weights[:60].max()
    assert (apet_kernels.compress(x[None], 8, weights=weights[None]).indices >= 60).sum() == 4
    assert (apet_kernels.compress(x[None], 8).indices >= 60).sum() == 0


def test_distinct_of_lengths_without_meaning():
    """The length of a token does not matter; tokens without a direction count neither for others nor themselves."""
    x = images([40], torch.float32)
    expected = apet_kernels.distinct(x, [40])
    scaled = x * torch.logspace(-30, 30, 40)[:, None]
    torch.testing.assert_close(apet_kernels.distinct(scaled, [40]), expected, rtol=1e-5, atol=1e-6)
    for odd in (0.0, float("inf"), float("nan")):
        both = torch.cat([torch.full((3, 48), odd), x])
        got = apet_kernels.distinct(both, [43])
        assert torch.equal(got[:3], torch.ones(3))
        torch.testing.assert_close(got[3:], expected, rtol=1e-6, atol=1e-7)
    assert apet_kernels.distinct(torch.full((5, 8), float("inf")), [5]).tolist() == [1.0] * 5
    assert apet_kernels.distinct(x[:0], []).shape == (0,)


@pytest.mark.parametrize("power", [-1, 4.5, float("nan"), float("inf"), "2", None, True])
def test_a_power_that_is_none(power):
    with pytest.raises(ValueError, match=re.escape(f"power={power!r} is outside 0..4")):
        apet_kernels.distinct(torch.eye(9), [9], power)


def test_wrong_arguments_of_distinct():
    x = tokens(20, 8, seed=6)
    for args, words in (
        ((x[None], [20]), "x has 3 dimensions"),
        ((x.double(), [20]), "Double"),
        ((x, [9, 9]), "add up to 18, but x has 20 tokens"),
        ((x, [9, 10.5]), "length=10.5 of image 1 is not a whole number"),
    ):
        assert words in error_of(apet_kernels.distinct, args, {})
