"""The arms of the study on a vision-language model: their rows, those that no op has, and what some of them need."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

import apet_kernels
from apet_kernels import Compressed, reference
from apet_kernels.budgets import LIMIT
from benchmarks.vlm import arms, evaluation, features, guard, packing
from tests.test_vlm_model import packer, some_pictures, untrained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.rest  # a study, and no part of the package


def batch(pictures: int = 2, tokens: int = 256, width: int = 32) -> arms.Batch:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(pictures, tokens, width, generator=g) + torch.randn(pictures, 1, width, generator=g)
    return arms.Batch(x, 0, *torch.rand(2, pictures, tokens, generator=g))


@pytest.mark.parametrize("keep", [16, 32, 128])
@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_returns_as_many_rows_as_it_may(name: str, keep: int) -> None:
    some = batch()
    before = some.x.clone()
    found = arms.ARMS[name](some, keep)
    if isinstance(found, list):
        assert sum(len(own.tokens) for own in found) == 2 * keep
        assert all(len(own.tokens) == len(own.indices) for own in found)
        found = Compressed(*(torch.cat(parts).view(2, keep, -1) for parts in zip(*found, strict=True)))
    rows, kept = found.tokens, found.indices.view(2, keep)
    assert (rows.shape, rows.dtype) == ((2, keep, 32), torch.float32)
    assert rows.isfinite().all()
    assert torch.equal(some.x, before)
    assert not torch.equal(rows[0], rows[1])
    assert ((kept >= 0) & (kept < 256)).all()
    shared = "shared" in name
    assert shared or (kept.diff(dim=-1) > 0).all(), "in the order of the picture, and none twice"


def test_arms_without_a_budget() -> None:
    some = batch(pictures=3)
    assert torch.equal(arms.WHOLE[arms.FULL](some, 256).tokens, some.x)
    assert torch.equal(arms.WHOLE[arms.FULL](some, 256).indices, torch.arange(256).expand(3, 256))
    assert arms.WHOLE[arms.NONE](some, 256).tokens.shape == (3, 0, 32)
    assert torch.equal(arms.WHOLE[arms.OTHER](some, 256).tokens, some.x[[2, 0, 1]])


def test_which_arms_need_what() -> None:
    some = batch(tokens=64)
    for field, named in (("attention", arms.NEED_ATTENTION), ("relevance", arms.BY_QUESTION)):
        without = arms.Batch(**{**vars(some), field: None})
        assert named < set(arms.ARMS)
        for name, arm in arms.ARMS.items():
            if name in named:
                with pytest.raises(ValueError, match=rf"^{field} must be \[2, 64\]"):
                    arm(without, 16)
            else:
                got, want = (torch.cat(list(itertools.chain(*listed(arm(one, 16))))) for one in (without, some))
                assert torch.equal(got, want)


def listed(found: Compressed | list[Compressed]) -> list[tuple[torch.Tensor, ...]]:
    """Returns the tensors of an arm's result, flat."""
    every = [found] if isinstance(found, Compressed) else found
    return [(one.tokens.flatten(), one.indices.flatten().float()) for one in every]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def merged(image: np.ndarray, kept: list[int], least: float) -> np.ndarray:
    """Returns the mean of each kept token and of the dropped ones that resemble it most, and enough."""
    groups = {k: [k] for k in kept}
    for n in set(range(len(image))) - set(kept):
        best = max(kept, key=lambda k: cosine(image[n], image[k]))
        if cosine(image[n], image[best]) >= least:
            groups[best].append(n)
    return np.stack([image[groups[k]].mean(0) for k in kept])


def test_threshold_loses_what_resembles_no_kept_token() -> None:
    some = batch(tokens=64)
    rows = arms.threshold(some, 20).tokens
    _, kept = reference.compress(some.x, 20, None, select="qr", refine=2)
    for b, image in enumerate(some.x.double().numpy()):
        np.testing.assert_allclose(rows[b].numpy(), merged(image, kept[b].tolist(), 0.5), atol=1e-5)
    lost = (rows - arms.ARMS["qr refine 2"](some, 20).tokens).abs().amax(-1) > 0.01  # [B, K]
    assert 0 < lost.sum() < lost.numel()


def weighted_picks(image: np.ndarray, factor: list[float], keep: int, refine: int = 2) -> list[int]:
    """The rule of docs/algorithm.md, "In rounds", with a factor on the value by which tokens are picked, and `refine`
    medoid steps; residuals are those of least squares."""
    N = len(image)

    def value(n: int, taken: list[int]) -> float:
        left = image[n]
        if taken:
            left = left - image[taken].T @ np.linalg.lstsq(image[taken].T, image[n], rcond=None)[0]
        return float(factor[n] * (left @ left))

    taken: list[int] = []
    for t in range(4):
        size = (t + 1) * keep // 4 - t * keep // 4
        at = {n: value(n, taken) for n in range(N) if n not in taken}
        pool = sorted(at, key=lambda n: -at[n])[: 2 * size]
        for _ in range(size):
            taken.append(max((n for n in pool if n not in taken), key=lambda n: value(n, taken)))
    for _ in range(refine):
        nearest = [
            n if n in taken else min(taken, key=lambda k, n=n: np.linalg.norm(image[n] - image[k])) for n in range(N)
        ]
        groups = [[n for n in range(N) if nearest[n] == k] for k in taken]
        taken = [min(g, key=lambda n, g=g: np.linalg.norm(image[n] - image[g].mean(0))) for g in groups]
    return sorted(taken)


def test_distinct_picks_by_the_residual_times_the_factor() -> None:
    some = batch(tokens=64)
    plain = arms.ARMS["qr refine 2"](some, 20).tokens
    for power, refine in ((1, 2), (2, 0)):
        rows = arms.distinct(some, 20, power, refine).tokens
        alone = arms.distinct(some, 20, power, refine, merge=False).tokens
        for b, image in enumerate(some.x.double().numpy()):
            factor = [(1 - np.mean([cosine(a, b) for b in image])) ** power for a in image]
            picks = weighted_picks(image, factor, 20, refine)
            np.testing.assert_allclose(rows[b].numpy(), merged(image, picks, -1), atol=1e-5)
            assert torch.equal(alone[b], some.x[b, picks])
        assert not torch.equal(rows, plain)
    assert torch.equal(arms.ARMS["qr refine 2 distinct"](some, 20).tokens, arms.distinct(some, 20, 1, 2).tokens)
    assert torch.equal(arms.ARMS["qr refine 0 distinct 2"](some, 20).tokens, rows)


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_relevance_is_a_factor_from_1_down(weight: float) -> None:
    some = batch(tokens=64)
    rows = arms.relevant(some, 20, weight).tokens
    for b, image in enumerate(some.x.double().numpy()):
        low, high = some.relevance[b].min().item(), some.relevance[b].max().item()
        factor = [1 - weight * (high - r) / (high - low) for r in some.relevance[b].tolist()]
        np.testing.assert_allclose(rows[b].numpy(), merged(image, weighted_picks(image, factor, 20), -1), atol=1e-5)
    assert torch.equal(arms.relevant(some, 20, 0.0).tokens, arms.ARMS["qr refine 2"](some, 20).tokens)


def test_pictures_share_tokens_by_what_the_tokens_before_cannot_rebuild() -> None:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(3, 64, 32, generator=g)
    x[1] = x[1, :1]  # one token rebuilds all
    x[2] *= 0.8
    left = []
    for image in x.double().numpy():
        basis, rest = np.zeros((0, 32)), image.copy()
        for _ in range(24):
            left.append((rest**2).sum(1).max())
            pick = (rest**2).sum(1).argmax()
            basis = np.linalg.qr(np.vstack([basis, image[pick : pick + 1]]).T)[0].T
            rest = image - image @ basis.T @ basis
    least, values = 2, np.array(left).reshape(3, 24)
    values[:, :least] = np.inf
    taken = np.argsort(-values, axis=None, kind="stable")[: 3 * 8] // 24
    want = np.bincount(taken, minlength=3).tolist()
    got = apet_kernels.share(x.flatten(0, 1), [64] * 3, [8] * 3)
    assert got == want
    assert sum(got) == 24
    assert got[1] == least < got[2] < got[0]
    found = arms.ARMS["qr refine 2 shared"](arms.Batch(x), 8)
    assert [len(own.tokens) for own in found] == got
    assert torch.equal(found[0].tokens, arms.ARMS["qr refine 2"](arms.Batch(x[:1]), got[0]).tokens[0])


def test_guarded_pictures_keep_what_they_need() -> None:
    """The rows of each are those of the default rule with as many tokens as the guard's signal asks for."""
    g = torch.Generator().manual_seed(6)
    x = torch.randn(3, 64, 32, generator=g)
    x[1] = x[1, :1] + 0.01 * x[1]  # one token nearly rebuilds all
    counts = arms.needed(x, 8)
    assert 8 == counts[1] < min(counts[0], counts[2])
    next_pivot = guard.signals(x, (counts[0] - 1, counts[0]))["next pivot"][0]
    assert next_pivot[0] > LIMIT >= next_pivot[1]
    for image, own, count in zip(x, arms.MORE[arms.GUARDED](arms.Batch(x), 8), counts, strict=True):
        assert torch.equal(own.tokens, arms.ARMS[arms.DEFAULT](arms.Batch(image[None]), count).tokens[0])


def test_distinct_takes_copies_of_one_token() -> None:
    assert torch.equal(arms.distinct(arms.Batch(torch.ones(1, 32, 8)), 20).tokens, torch.ones(1, 20, 8))


# ---- relevance: every question has its own tokens


def test_relevance_is_the_mean_cosine_with_the_words_of_the_question(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    split = some_pictures(2)
    x, asked = features.to_torch(split.states)[:, 1:], [picture.questions[0] for picture in split.pictures]
    got = packing.relevance(untrained, packer, x, asked)
    table = untrained.get_input_embeddings().weight.detach().double().numpy()
    with torch.inference_mode():
        visual = untrained.model.multi_modal_projector(x).double().numpy()
    for b, one in enumerate(asked):
        ids = packer.encode(one.text)
        want = [np.mean([cosine(token, table[i]) for i in ids]) for token in visual[b, :20]]
        np.testing.assert_allclose(got[b, :20].numpy(), want, atol=1e-5)


def test_a_question_is_answered_from_its_own_tokens(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    split = some_pictures(3)
    seen = evaluation.look(untrained, split)
    said = evaluation.answers(untrained, packer, seen, "cdpruner", 16)
    kept = set()
    for i, picture in enumerate(split.pictures):
        asked = evaluation.chosen(picture.questions)
        assert len(said[i]) == len(asked)
        x = seen.tokens[i : i + 1]
        for one, got in zip(asked, said[i], strict=True):
            some = arms.Batch(x, relevance=packing.relevance(untrained, packer, x, [one]))
            rows = arms.ARMS["cdpruner"](some, 16).tokens
            assert packing.answer(untrained, packer, rows, [[one]]) == [[got]]
            kept.add(tuple(rows[0, :, 0].tolist()))
    assert len(kept) > len(split.pictures)  # not one set for each picture
