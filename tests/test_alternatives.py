"""The other methods of benchmarks/lib/alternatives.py against plain loops written from their papers."""

import itertools

import numpy as np
import pytest
import torch

import apet_kernels
from benchmarks.lib import alternatives, selection
from benchmarks.lib.alternatives import MERGING, METHODS, NEED_ATTENTION, NEED_RELEVANCE

B, N, D = 3, 49, 16


def made(seed: int = 0, n: int = N) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, n, D, generator=g) + 2 * torch.randn(B, 1, D, generator=g)
    return x, torch.rand(B, n, generator=g)


def run(name: str, x: torch.Tensor, keep: int, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a method with weight [B, N] as the attention, and as the relevance if it needs one."""
    more = {"relevance": weight} if name in NEED_RELEVANCE else {}
    return METHODS[name](x, keep, attention=weight, **more)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("keep", [1, 2, 7, 24, 48, N])
@pytest.mark.parametrize("name", METHODS)
def test_counts_order_dtype_and_no_position_twice(name, keep):
    x, attention = made()
    tokens, indices = run(name, x.bfloat16(), keep, attention)
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
    together = run(name, x, 12, attention)[1]
    alone = [run(name, x[b : b + 1], 12, attention[b : b + 1])[1] for b in range(B)]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("name", sorted(set(METHODS) - set(MERGING)))
def test_what_merges_nothing_returns_its_rows_as_they_were(name):
    x, attention = made(2)
    tokens, indices = run(name, x, 9, attention)
    assert torch.equal(tokens, x.gather(1, indices[..., None].expand(-1, -1, D)))


@pytest.mark.parametrize("name", METHODS)
def test_copies_of_one_token_are_no_trouble(name):
    x = torch.ones(2, 16, 4)
    tokens, indices = run(name, x, 5, torch.ones(2, 16))
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


def greedy_by(value, keep: int, among: int) -> list[int]:
    """Takes the token n of largest value(taken, n) in every step, the lower one if equal."""
    taken: list[int] = []
    while len(taken) < keep:
        taken.append(max((n for n in range(among) if n not in taken), key=lambda n: value(taken, n)))
    return taken


def coverage(similarity: np.ndarray, taken: list[int]) -> float:
    """Returns the sum of what covers each token best, at least 0."""
    return sum(max([0.0, *(float(row[t]) for t in taken)]) for row in similarity)


def cosines(image: np.ndarray) -> np.ndarray:
    return np.array([[cosine(a, b) for b in image] for a in image])


def test_scope_takes_the_largest_gain_of_coverage_times_attention():
    x, attention = made(8)
    for b, got in enumerate(alternatives.scope(x, 11, attention=attention)[1].tolist()):
        similarity, weight = cosines(x[b].double().numpy()), attention[b].double().numpy()

        def value(taken: list[int], n: int, similarity=similarity, weight=weight) -> float:
            return weight[n] * (coverage(similarity, [*taken, n]) - coverage(similarity, taken))

        assert got == sorted(greedy_by(value, 11, N))


def test_greedy_coverage_is_within_its_guarantee_of_the_best():
    """Nemhauser, Wolsey and Fisher 1978: at least 1 - 1/e of the best subset; all subsets are tried."""
    x, _ = made(9, n=9)
    for b, got in enumerate(alternatives.scope(x, 3, attention=torch.ones(B, 9))[1].tolist()):
        similarity = cosines(x[b].double().numpy())
        best = max(coverage(similarity, list(some)) for some in itertools.combinations(range(9), 3))
        assert best >= coverage(similarity, got) >= (1 - 1 / np.e) * best


def test_cen_prune_weighs_centred_distances_by_distinctiveness():
    x, _ = made(10)
    for image, got in zip(x.double().numpy(), alternatives.cen_prune(x, 11)[1].tolist(), strict=True):
        distance = 1 - cosines(image - image.mean(0))
        raw = [-np.mean([cosine(a, b) for j, b in enumerate(image) if j != i]) for i, a in enumerate(image)]
        weight = [(r - min(raw)) / (max(raw) - min(raw)) for r in raw]

        def value(taken: list[int], n: int, distance=distance, weight=weight) -> float:
            near = taken if taken else [j for j in range(N) if j != n]
            return weight[n] * min(distance[n, j] for j in near)

        assert got == sorted(greedy_by(value, 11, N))


def test_cdpruner_takes_the_largest_determinant_in_every_step():
    x, relevance = made(11)
    for b, got in enumerate(alternatives.cdpruner(x, 11, relevance=relevance)[1].tolist()):
        scaled = relevance[b].double().numpy()
        scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
        kernel = scaled[:, None] * cosines(x[b].double().numpy()) * scaled

        def value(taken: list[int], n: int, kernel=kernel) -> float:
            return float(np.linalg.det(kernel[np.ix_([*taken, n], [*taken, n])]))

        assert got == sorted(greedy_by(value, 11, N))


def test_cdpruner_ranks_by_relevance_where_tokens_are_orthogonal():
    x, relevance = torch.eye(12)[None] * 3, torch.rand(1, 12, generator=torch.Generator().manual_seed(0))
    got = alternatives.cdpruner(x, 5, relevance=relevance)[1]
    assert torch.equal(got, relevance.topk(5).indices.sort().values)
    assert alternatives.cdpruner(x, 5, relevance=torch.ones(1, 12))[1].tolist() == [[0, 1, 2, 3, 4]]


def test_spare_takes_the_token_that_least_squares_reconstructs_worst():
    x, _ = made(12)
    for image, got in zip(x.double().numpy(), alternatives.spare(x, 11)[1].tolist(), strict=True):

        def value(taken: list[int], n: int, image=image) -> float:
            left = image[n]
            if taken:
                left = left - image[taken].T @ np.linalg.lstsq(image[taken].T, image[n], rcond=None)[0]
            return float(left @ left)

        assert got == sorted(greedy_by(value, 11, N))


@pytest.mark.parametrize("keep", [5, 14, 40])
def test_spare_keeps_what_the_op_picks_one_at_a_time(keep):
    x = torch.randn(2, 60, 64, generator=torch.Generator().manual_seed(13))
    kept = alternatives.spare(x, keep)[1]
    tokens, want = apet_kernels.compress(x, keep, keep, select="qr")
    assert torch.equal(kept, want)
    torch.testing.assert_close(apet_kernels.merge(x, kept), tokens)


def test_pivots_go_on_in_order_when_all_is_explained():
    """Tokens in a plane: two picks explain the rest, copies of them among it."""
    plane = torch.tensor([[0.0, 1], [3, 0], [3, 0], [1, 1], [2, 2]], dtype=torch.float64)
    assert selection.pivots((plane @ plane.T)[None], 5).picks.tolist() == [[1, 4, 0, 2, 3]]


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_lrcp_keeps_what_is_farthest_from_the_principal_subspace(rank):
    x, _ = made(14)
    keep = 9
    tokens, indices = alternatives.lrcp(x, keep, rank=rank)
    for b in range(B):
        image = x[b].double().numpy()
        U, S, Vt = np.linalg.svd(image - image.mean(0))
        left = (U[:, rank : len(S)] * S[rank:]) @ Vt[rank : len(S)]  # the rest of the singular value decomposition
        kept = sorted(np.argsort(-(left**2).sum(1))[:keep].tolist())
        assert indices[b].tolist() == kept
        groups = {k: [k] for k in kept}
        for n in set(range(N)) - set(kept):
            groups[max(kept, key=lambda k: cosine(image[n], image[k]))].append(n)
        np.testing.assert_allclose(tokens[b].numpy(), [image[groups[k]].mean(0) for k in kept], atol=1e-5)


def test_lrcp_needs_a_subspace():
    with pytest.raises(ValueError, match="rank=0 must be at least 1"):
        alternatives.lrcp(made()[0], 5, rank=0)


def test_merging_into_like_tokens_only_loses_the_others():
    x, _ = made(15)
    kept = alternatives.random(x, 12)[1]
    torch.testing.assert_close(selection.merge(x, kept), apet_kernels.merge(x, kept))
    assert torch.equal(selection.merge(x, kept, least=1.1), x.gather(1, kept[..., None].expand(-1, -1, D)))
    least = 0.85
    tokens, lost = selection.merge(x, kept, least=least), 0
    for b in range(B):
        image, rows = x[b].double().numpy(), kept[b].tolist()
        groups = {k: [k] for k in rows}
        for n in set(range(N)) - set(rows):
            best = max(rows, key=lambda k: cosine(image[n], image[k]))
            if cosine(image[n], image[best]) >= least:
                groups[best].append(n)
            else:
                lost += 1
        np.testing.assert_allclose(tokens[b].numpy(), [image[groups[k]].mean(0) for k in rows], atol=1e-5)
    assert 0 < lost < B * (N - 12)


@pytest.mark.parametrize("name", METHODS)
def test_bad_input_is_named(name):
    x, attention = made()
    with pytest.raises(ValueError, match=r"keep=50 is outside 1\.\.49"):
        run(name, x, 50, attention)
    with pytest.raises(ValueError, match=r"x must be \[B, N, D\], got \[49, 16\]"):
        run(name, x[0], 5, attention[0])


@pytest.mark.parametrize("name", NEED_ATTENTION)
def test_missing_attention_is_named(name):
    x, attention = made()
    with pytest.raises(ValueError, match=r"attention must be \[3, 49\].*got None"):
        METHODS[name](x, 5)
    with pytest.raises(ValueError, match=r"got \[3, 40\]"):
        METHODS[name](x, 5, attention=attention[:, :40])


@pytest.mark.parametrize("name", NEED_RELEVANCE)
def test_missing_relevance_is_named(name):
    x, relevance = made()
    with pytest.raises(ValueError, match=r"relevance must be \[3, 49\].*got None"):
        METHODS[name](x, 5, attention=relevance)
    with pytest.raises(ValueError, match=r"got \[3, 40\]"):
        METHODS[name](x, 5, relevance=relevance[:, :40])
