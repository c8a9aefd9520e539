"""The default rule, a basis as large as K that is picked in rounds, and medoid steps."""

import pytest
import torch

import apet_kernels
from apet_kernels import reference
from tests import rule
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same, check_merge

NAN, INF = float("nan"), float("inf")
QR = {"select": "qr", "basis": None}


def keeps(backend, x, keep, **options) -> list[int]:
    """Returns the kept positions of the one image x [1, N, D]; also checks that the tokens are means."""
    tokens_, indices = backend.compress(x, keep, **QR, **options)
    assert tokens_.shape == (1, keep, x.shape[2])
    check_merge(x[0], tokens_[0], indices[0], torch.ones(keep, dtype=torch.bool))
    return indices[0].tolist()


def step_by_step(backend, x, keep, steps, **options) -> None:
    """Checks each medoid step, given the backend's own result of the step before."""
    before = keeps(backend, x, keep, **options)
    for step in range(1, steps + 1):
        after = keeps(backend, x, keep, refine=step, **options)
        assert after == sorted(set(after))
        allowed = rule.medoid_step(x[0], before)
        assert set(after) <= set().union(*allowed)
        for places in allowed:
            assert places & set(after), f"step {step} chose none of {sorted(places)}"
        before = after


# ---- the picks


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("N", "D", "keep", "kind", "seed"),
    [
        (70, 45, 17, "normal", 1),
        (90, 100, 20, "normal", 3),
        (150, 130, 64, "normal", 5),
        (150, 130, 33, "clustered", 4),
        (300, 96, 67, "normal", 6),
        (120, 1030, 40, "normal", 8),
        (300, 200, 140, "normal", 1),
    ],
)
def test_picks_are_those_of_a_second_implementation(backend, dtype, N, D, keep, kind, seed):
    x = tokens(1, N, D, dtype=dtype, kind=kind, seed=seed)
    expected, sure = rule.kept(x[0], keep)
    assert sure, "this input was chosen so that no choice is within rounding of another"
    assert keeps(backend, x, keep) == expected


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("basis", [65, 80])
def test_a_basis_larger_than_64_leaves_some_to_the_residual(backend, basis):
    x = tokens(1, 160, 140, seed=11)
    expected, sure = rule.kept(x[0], 80, basis)
    assert sure
    _, indices = backend.compress(x, 80, basis, select="qr")
    assert indices[0].tolist() == expected


@pytest.mark.parametrize("keep", [1, 2, 15, 16])
def test_few_are_picked_one_at_a_time(backend, keep):
    """The result is that of basis=keep, bit for bit."""
    x = tokens(2, 60, 33, seed=2)
    got, expected = backend.compress(x, keep, **QR), backend.compress(x, keep, keep, select="qr")
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_rounds_are_of_the_shares_of_keep(backend):
    """K = 19 in rounds of 4, 5, 5, 5: with orthogonal tokens of falling length, the pool never matters."""
    x = torch.diag(torch.linspace(2, 1, 40))[None]
    assert keeps(backend, x, 19) == list(range(19))


def test_the_pool_is_frozen_for_a_round(backend):
    """Candidates are the 2 b longest tokens at the start; residuals of other tokens do not matter in the round."""
    # K = 20, rounds of 5: the first pool has the 10 longest tokens, and all of them are almost on one axis.
    x = torch.zeros(1, 60, 80)
    x[0, :10, 0] = torch.linspace(10.0, 9.1, 10)
    x[0, torch.arange(10), 1 + torch.arange(10)] = 0.5 + 0.01 * torch.arange(10.0)
    x[0, torch.arange(10, 60), 11 + torch.arange(50)] = torch.linspace(5, 1, 50)
    got = keeps(backend, x, 20)
    expected, sure = rule.kept(x[0], 20)
    assert sure
    assert got == expected
    assert sum(n < 10 for n in got) == 5, "one at a time, only the first of these would be among the 20"


def test_ties_go_to_the_lower_position(backend):
    eye = torch.eye(48)[torch.randperm(48, generator=torch.Generator().manual_seed(3))][None]
    assert keeps(backend, eye, 20) == list(range(20))
    assert keeps(backend, eye, 20, start=33) == [*range(19), 33]


@pytest.mark.parametrize("start", [0, 41, 69])
def test_start_is_the_first_pick(backend, start):
    x = tokens(1, 70, 45, seed=12)
    x[0, start] *= 0.05
    expected, sure = rule.kept(x[0], 24, start=start)
    assert sure
    got = keeps(backend, x, 24, start=start)
    assert start in got
    assert got == expected


# ---- unusual inputs


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_copies(backend, dtype, refine):
    """25 different tokens, four of each. Copies in a pool are dependent and end the round; all 25 are kept."""
    x = tokens(1, 25, 64, dtype=dtype, seed=9).repeat_interleave(4, 1)
    got = keeps(backend, x, 40, ridge=0.0, refine=refine)
    assert len(set(got)) == 40
    if refine == 0:  # each pick is the lowest of its copies, and other copies fill the rest
        assert {n // 4 for n in got} == set(range(25))
        assert set(range(0, 100, 4)) <= set(got)
        assert got == rule.kept(x[0], 40, ridge=0.0)[0]


@pytest.mark.rest_interpreted
def test_a_copy_of_a_pick_whose_sums_are_rounded_alike(backend):
    """63 basis tokens are taken off token 63 and its copy, each a sum that rounds by almost half a unit the same way.
    What is left of the copy is that rounding, so it must not be taken for a new direction."""
    x = torch.zeros(1, 300, 64)
    for q in range(63):
        x[0, q, q] = 2
    x[0, 63, :63] = 2**-4 + 66 * 2**-27
    x[0, 63, 63] = 1.0625
    x[0, 299] = x[0, 63]
    assert keeps(backend, 1024 * x, 256) == list(range(256))


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 1])
@pytest.mark.parametrize("D", [1, 3, 20])
def test_fewer_dimensions_than_picks(backend, D, refine):
    x = tokens(1, 90, D, seed=3)
    got = keeps(backend, x, 40, refine=refine)
    assert got == sorted(set(got))
    assert len(got) == 40


@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("keep", [1, 16, 17, 49, 50])
def test_all_equal_and_all_zero(backend, keep, refine):
    equal = tokens(1, 7, seed=1).expand(50, 7)[None].contiguous()
    assert keeps(backend, equal, keep, ridge=0.0, refine=refine) == list(range(keep))
    assert keeps(backend, torch.zeros(1, 50, 7), keep, refine=refine) == list(range(keep))


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3e38])
def test_tokens_of_non_finite_norm_are_never_picked(backend, bad, refine):
    x = tokens(1, 70, 40, seed=4)
    lost = [0, 7, 50]
    x[0, lost] = bad
    left = [n for n in range(70) if n not in lost]
    got = keeps(backend, x, 30, refine=refine)
    assert [left[n] for n in keeps(backend, x[:, left], 30, refine=refine)] == got
    assert keeps(backend, x, 68, refine=refine)[:1] == [0], "where finite ones are too few, the lowest of these stays"
    assert keeps(backend, torch.full((1, 40, 3), bad), 20, refine=refine) == list(range(20))


@pytest.mark.parametrize("refine", [0, 1, 8])
@pytest.mark.parametrize("N", [1, 2, 17, 40])
def test_all_are_kept(backend, N, refine):
    x = tokens(2, N, 9, seed=N)
    tokens_, indices = backend.compress(x, N, **QR, refine=refine)
    assert_same(tokens_, x)
    assert indices.tolist() == [list(range(N))] * 2


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 3])
@pytest.mark.parametrize("keep", [1, 2, 16, 17, 39])
def test_other_budgets(backend, keep, refine):
    step_by_step(backend, tokens(1, 40, 24, seed=keep), keep, refine)


# ---- medoid steps


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "clustered", "repeated"])
@pytest.mark.parametrize("keep", [12, 30])
def test_medoid_steps_are_those_of_a_second_implementation(backend, dtype, kind, keep):
    step_by_step(backend, tokens(1, 130, 50, dtype=dtype, kind=kind, seed=7), keep, 3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_medoids_by_hand(backend, dtype):
    """Two groups on a line: the end of each, which is picked, is replaced by the token in the middle."""
    x = torch.zeros(1, 9, 2, dtype=dtype)
    x[0, :5, 0] = torch.tensor([10, 11, 12, 13, 15])
    x[0, 5:, 1] = torch.tensor([1, 2, 3, 8])
    assert keeps(backend, x, 2) == [4, 8]
    assert keeps(backend, x, 2, refine=1) == [2, 7]
    assert keeps(backend, x, 2, refine=2) == [2, 7]


def test_the_lower_of_two_members(backend):
    """Both count as equally far from their mean, whatever the rounded distances are."""
    x = torch.zeros(1, 40, 64)
    x[0, torch.arange(20), torch.arange(20)] = torch.linspace(9, 8, 20)
    x[0, 20:] = x[0, :20] * 1.01 + 0.01 * torch.randn(20, 64, generator=torch.Generator().manual_seed(1))
    assert keeps(backend, x, 20, refine=1) == list(range(20))


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("select", ["fps", "qr"])
def test_medoids_of_another_basis(backend, select):
    """A basis of at most 64 tokens with keep = basis, picked by either rule."""
    x = tokens(1, 80, 30, seed=5)
    before = backend.compress(x, 20, 20, select=select)[1][0].tolist()
    after = backend.compress(x, 20, 20, select=select, refine=1)[1][0].tolist()
    for places in rule.medoid_step(x[0], before):
        assert places & set(after)


# ---- the default


@pytest.mark.parametrize("name", apet_kernels.available_backends())
def test_the_default_rule(name):
    """`compress` picks a basis of all kept tokens in rounds, without medoid steps; `score` has the paper's basis."""
    x = tokens(2, 90, 24, seed=7)
    usual = apet_kernels.compress(x, 40, backend=name)
    for got, wanted in zip(usual, apet_kernels.compress(x, 40, None, select="qr", refine=0, backend=name), strict=True):
        assert_same(got, wanted)
    packed = apet_kernels.compress_packed(x.flatten(0, 1), [90, 90], [40, 40], backend=name)
    assert_same(packed.tokens, usual.tokens.flatten(0, 1))
    for got, wanted in zip(apet_kernels.score(x, backend=name), reference.score(x, 10, select="fps"), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


# ---- guarantees


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_alone_batched_packed_and_strided(backend, dtype, refine):
    lengths, counts = [70, 1, 40, 90, 33], [30, 1, 16, 70, 17]
    images = [tokens(1, n, 37, dtype=dtype, seed=n) for n in lengths]
    alone = [backend.compress(x, k, **QR, refine=refine) for x, k in zip(images, counts, strict=True)]
    cu, cu_keep = offsets(lengths), offsets(counts)
    packed = torch.cat(images, 1)[0]
    got, at = backend.compress_varlen(packed, cu, cu_keep, sum(counts), max(lengths), max(counts), **QR, refine=refine)
    for s, (tokens_, indices) in enumerate(alone):
        inside = slice(int(cu_keep[s]), int(cu_keep[s + 1]))
        assert_same(got[inside], tokens_[0], f"packed image {s}")
        assert (at[inside] - cu[s]).tolist() == indices[0].tolist()
    batch = torch.cat([images[0], tokens(2, 70, 37, dtype=dtype, seed=1), images[0]])
    wide = torch.zeros(4, 70, 41, dtype=dtype)
    wide[..., 3:40] = batch
    for x in (batch, wide[..., 3:40]):
        tokens_, indices = backend.compress(x, 30, **QR, refine=refine)
        for b in (0, 3):
            assert_same(tokens_[b], alone[0][0][0])
            assert indices[b].tolist() == alone[0][1][0].tolist()


@pytest.mark.rest_interpreted
def test_more_basis_tokens_than_packed_images_keep(backend):
    """Each image has as many as it keeps, however many that are together."""
    cu, cu_keep = offsets([50, 30]), offsets([20, 12])
    x = tokens(80, 20, seed=9)
    for basis in (65, 10**6):
        got = backend.compress_varlen(x, cu, cu_keep, 32, 50, 20, basis, select="qr")
        for one, wanted in zip(got, backend.compress_varlen(x, cu, cu_keep, 32, 50, 20, **QR), strict=True):
            assert_same(one, wanted)


@pytest.mark.rest_interpreted
@pytest.mark.parametrize("refine", [0, 2])
def test_merge_gives_the_same_tokens(backend, refine):
    x = tokens(2, 90, 45, dtype=torch.bfloat16, seed=6)
    tokens_, indices = backend.compress(x, 40, **QR, refine=refine)
    assert_same(tokens_, backend.merge(x, indices))


@pytest.mark.rest_interpreted
def test_wrong_offsets_stay_in_bounds(backend):
    x = tokens(40, 9, seed=2)
    for cu, cu_keep in [([0, 50, 20], [0, 30, 9]), ([-5, 60, 99], [-9, 99, 99]), ([30, 20, 10], [9, 5, 1])]:
        offsets = [torch.tensor(n, dtype=torch.int32) for n in (cu, cu_keep)]
        _, indices = backend.compress_varlen(x, *offsets, 30, 40, 30, **QR, refine=1)
        assert ((indices >= 0) & (indices < 40)).all()
