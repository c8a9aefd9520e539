"""The other methods of benchmarks/lib/alternatives.py against plain loops written from their papers."""

import numpy as np
import pytest
import torch

from benchmarks.lib import alternatives
from benchmarks.lib.alternatives import METHODS, NEED_ATTENTION

B, N, D = 3, 49, 16


def made(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, n, D, generator=g) + 2 * torch.randn(B, 1, D, generator=g)
    return x, torch.rand(B, n, generator=g)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("keep", [1, 2, 7, 24, 48, N])
@pytest.mark.parametrize("name", METHODS)
def test_counts_order_dtype_and_no_position_twice(name, keep):
    x, attention = made()
    tokens, indices = METHODS[name](x.bfloat16(), keep, attention=attention)
    assert (tokens.shape, tokens.dtype) == ((B, keep, D), torch.bfloat16)
    assert (indices.shape, indices.dtype) == ((B, keep), torch.int64)
    assert (indices.diff(dim=1) > 0).all()
    assert indices.min() >= 0
    assert indices.max() < N
    if keep == N:
        assert torch.equal(tokens, x.bfloat16())


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"random"}))
def test_an_image_alone_gives_the_same_rows(name):
    x, attention = made(1)
    together = METHODS[name](x, 12, attention=attention)[1]
    alone = [METHODS[name](x[b : b + 1], 12, attention=attention[b : b + 1])[1] for b in range(B)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"tome", "visionzip"}))
def test_what_merges_nothing_returns_its_rows_as_they_were(name):
    x, attention = made(2)
    tokens, indices = METHODS[name](x, 9, attention=attention)
    assert torch.equal(tokens, x.gather(1, indices[..., None].expand(-1, -1, D)))


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_one_token_are_no_trouble(name):
    x = torch.ones(2, 16, 4)
    tokens, indices = METHODS[name](x, 5, attention=torch.ones(2, 16))
    assert torch.equal(tokens, torch.ones(2, 5, 4))
    assert all(len(set(row.tolist())) == 5 for row in indices)


def test_random_depends_on_its_seed_alone():
    x, _ = made()
    first, again, other = (alternatives.random(x, 10, seed=s)[1] for s in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    draws = torch.cat([alternatives.random(x, 10, seed=s)[1].flatten() for s in range(300)])
    share = draws.bincount(minlength=N) / (300 * B)
    assert (share - 10 / N).abs().max() < 0.07  # 5 standard deviations


def test_uniform_is_a_grid():
    x, _ = made(n=64)
    assert alternatives.uniform(x, 16)[1][0].tolist() == [8 * r + c for r in (1, 3, 5, 7) for c in (1, 3, 5, 7)]
    assert alternatives.uniform(x[:, :60], 4)[1][0].tolist() == [7, 22, 37, 52]  # no square: along the sequence


def test_norm_and_fastv_take_the_largest():
    x, attention = made(3)
    for got, score in (
        (alternatives.norm(x, 6)[1], x.norm(dim=-1)),
        (alternatives.fastv(x, 6, attention=attention)[1], attention),
    ):
        assert got.tolist() == [sorted(sorted(range(N), key=lambda n: -row[n])[:6]) for row in score.tolist()]


def greedy(first: int, distance: np.ndarray, keep: int) -> list[int]:
    """Max-min selection that compares everything in every step."""
    taken = [first]
    while len(taken) < keep:
        left = [n for n in range(len(distance)) if n not in taken]
        taken.append(max(left, key=lambda n: min(distance[n, t] for t in taken)))
    return sorted(taken)


def test_divprune_is_the_greedy_max_min_of_cosine_distance():
    x, _ = made(4)
    for image, got in zip(x.double().numpy(), alternatives.divprune(x, 11)[1].tolist(), strict=True):
        distance = np.array([[1 - cosine(a, b) for b in image] for a in image])
        alone = [min(np.delete(row, n)) for n, row in enumerate(distance)]
        assert got == greedy(int(np.argmax(alone)), distance, 11)


def test_fps_is_the_greedy_max_min_of_euclidean_distance():
    x, _ = made(5)
    for image, got in zip(x.double().numpy(), alternatives.fps(x, 11)[1].tolist(), strict=True):
        distance = np.linalg.norm(image[:, None] - image[None], axis=-1)
        assert got == greedy(int(np.argmax(np.linalg.norm(image, axis=-1))), distance, 11)


def tome_naively(image: np.ndarray, keep: int) -> tuple[np.ndarray, list[int], list[int]]:
    """ToMe with groups as lists of positions, one pair at a time."""
    groups = {n: [n] for n in range(len(image))}
    each = -(-(len(image) - keep) // alternatives.TOME_STEPS)
    while len(groups) > keep:
        order = sorted(groups)
        mean = {n: image[groups[n]].mean(0) for n in order}
        best = {a: max(order[1::2], key=lambda b: cosine(mean[a], mean[b])) for a in order[0::2]}
        strongest = sorted(best, key=lambda a: -cosine(mean[a], mean[best[a]]))
        for a in strongest[: min(each, len(order) - keep, len(order) // 2)]:
            groups[best[a]] += groups.pop(a)
    return (
        np.stack([image[groups[n]].mean(0) for n in sorted(groups)]),
        sorted(groups),
        [len(groups[n]) for n in sorted(groups)],
    )


@pytest.mark.parametrize("keep", [1, 5, 30])
def test_tome_equals_a_naive_loop_over_groups(keep):
    x, _ = made(6)
    tokens, indices, sizes = alternatives.tome_groups(x, keep)
    assert (sizes.sum(1) == N).all()
    for b in range(B):
        want, where, count = tome_naively(x[b].double().numpy(), keep)
        assert indices[b].tolist() == where
        assert sizes[b].tolist() == count
        np.testing.assert_allclose(tokens[b].numpy(), want, atol=1e-5)


def test_visionzip_keeps_the_dominant_and_averages_the_rest_into_the_contextual():
    x, attention = made(7)
    keep, contextual = 13, 2  # round(13 * 10 / 64)
    tokens, indices = alternatives.visionzip(x, keep, attention=attention)
    for b in range(B):
        image, order = x[b].double().numpy(), attention[b].argsort(descending=True).tolist()
        dominant, rest = sorted(order[: keep - contextual]), sorted(order[keep - contextual :])
        targets = [rest[len(rest) // 4], rest[3 * len(rest) // 4]]
        assert indices[b].tolist() == sorted(dominant + targets)
        groups = {t: [t] for t in targets}
        for n in rest:
            if n not in targets:
                groups[max(targets, key=lambda t: cosine(image[n], image[t]))].append(n)
        want = [image[groups.get(n, [n])].mean(0) for n in indices[b].tolist()]
        np.testing.assert_allclose(tokens[b].numpy(), want, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_named(name):
    x, attention = made()
    with pytest.raises(ValueError, match=r"keep=50 is outside 1\.\.49"):
        METHODS[name](x, 50, attention=attention)
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\], got \[49, 16\]"):
        METHODS[name](x[0], 5, attention=attention[0])


@pytest.mark.parametrize("name", NEED_ATTENTION)
def test_missing_attention_is_named(name):
    x, attention = made()
    with pytest.raises(ValueError, match=r"attention must be \[3, 49\].*got None"):
        METHODS[name](x, 5)
    with pytest.raises(ValueError, match=r"got \[3, 40\]"):
        METHODS[name](x, 5, attention=attention[:, :40])
