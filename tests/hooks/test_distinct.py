"""`distinct=p`: the first stage prefers tokens that differ from the rest of their unit."""

from __future__ import annotations

from typing import Any

import apet
import pytest
import torch
import torch.nn.functional as F
from apet import calls
from apet.hooks.units import VisualTokens, shorten
from conversations import collate
from families import FAMILIES, Family, shared
from running import BOTH, conversation, conversations, say
from torch import Tensor

import apet_kernels

LLAVA = FAMILIES["llava"]
P = 2.0


def weights_of(x: Tensor, lengths: list[int], power: float) -> Tensor:
    """Returns (1 - mean cosine with the unit) ** power of packed units."""
    units = F.normalize(x.double(), dim=-1).split(lengths)
    return torch.cat([(1 - (u @ u.T).mean(1)).clamp(min=0) ** power for u in units])


def test_the_op_gets_one_minus_the_mean_cosines(family: Family) -> None:
    """Those of the rows that are compressed, with the other tokens of their unit, in a padded batch."""
    rows, model = conversations(family), shared(family.name)
    with apet.patched(model, keep=3, distinct=P) as options, calls.Recorder() as recorder:
        say(model, collate(family, rows), new=2)
    (call,) = recorder.calls
    assert options.distinct == P
    expected = weights_of(call.x, call.lengths, P)
    torch.testing.assert_close(call.weights.double(), expected, rtol=0, atol=1e-5)
    again = apet_kernels.compress_packed(call.x, call.lengths, call.keeps, weights=call.weights)
    assert torch.equal(again.indices, call.indices)
    without = apet_kernels.compress_packed(call.x, call.lengths, call.keeps)
    assert not torch.equal(again.indices, without.indices), "the weights change the choice"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_with_relevance_it_is_the_product_of_both(name: str) -> None:
    family, model, found = FAMILIES[name], shared(name), []
    inputs = collate(family, conversations(family))
    for options in ({"relevance": 0.7}, {"distinct": P}, {"relevance": 0.7, "distinct": P}):
        with apet.patched(model, keep=3, **options), calls.Recorder() as recorder:
            say(model, inputs, new=1)
        found.append(recorder.calls[0].weights)
    torch.testing.assert_close(found[2], found[0] * found[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_only_the_first_stage_has_it(name: str) -> None:
    family, model = FAMILIES[name], shared(name)
    with apet.patched(model, **BOTH, distinct=P), calls.Recorder() as recorder:
        say(model, collate(family, [conversation(family, 3, "image", 5)]), new=1)
    first, second = recorder.calls
    assert first.weights is not None
    assert second.weights is None


def test_without_it_there_are_no_weights() -> None:
    model = shared("llava")
    with apet.patched(model, keep=9, distinct=0.0), calls.Recorder() as recorder:
        say(model, collate(LLAVA, [conversation(LLAVA, 3, "image", 5)]), new=1)
    assert recorder.calls[0].weights is None


def test_with_shared_budgets() -> None:
    """The budgets are those without weights, as with `relevance`."""
    model, inputs = shared("llava"), collate(LLAVA, conversations(LLAVA))
    counts = []
    for options in ({}, {"relevance": 0.7}, {"distinct": P}):
        with apet.patched(model, keep=9, share=True, **options), calls.Recorder() as recorder:
            say(model, inputs, new=1)
        counts.append(recorder.calls[0].keeps)
    assert counts[0] == counts[1] == counts[2]


def test_units_that_are_kept_whole_are_left_out() -> None:
    """A unit's weights do not depend on the others."""
    model = shared("llava")
    rows = [conversation(LLAVA, 2, "image1", 3, "image2", 4)]
    with apet.patched(model, keep=[5, 36], distinct=P), calls.Recorder() as recorder:
        say(model, collate(LLAVA, rows), new=1)
    (call,) = recorder.calls
    assert call.lengths == [36]
    torch.testing.assert_close(call.weights.double(), weights_of(call.x, [36], P), rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["inplace", "overwrite"])
def test_with_the_papers_rule(layout: str) -> None:
    """Its picks are weighted, too."""
    model = shared("llava")
    with (
        apet.patched(model, keep=9, basis=4, select="fps", layout=layout, distinct=P),
        calls.Recorder() as recorder,
    ):
        say(model, collate(LLAVA, [conversation(LLAVA, 3, "image", 5)]), new=1)
    assert recorder.calls[0].weights is not None


def test_units_of_equal_tokens() -> None:
    """All weights are about 0, and as many tokens are kept as asked for."""
    x = torch.ones(40, 8)
    options = apet.Options(keep=3, distinct=P)
    found = shorten(x, VisualTokens(torch.arange(40), [16, 24], [0, 1]), 3, options, distinct=P)
    assert found.tokens.lengths == [3, 3]
    assert torch.equal(found.rows, x[:6])


@pytest.mark.parametrize("wrong", [-0.1, float("nan"), float("inf"), "much", True])
def test_bad_values_raise(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"distinct=.* is outside 0\.\.4"):
        apet.patch(shared("llava"), keep=9, distinct=wrong)


def test_it_needs_the_first_stage() -> None:
    with pytest.raises(ValueError, match=r"distinct=2\.0 needs keep: only the first stage uses it"):
        apet.patch(shared("llava"), llm_layer=2, llm_keep=4, distinct=P)


@pytest.mark.parametrize("guard", ["warn", "raise", "keep"])
def test_not_with_a_guard(guard: str) -> None:
    with pytest.raises(ValueError, match=rf"guard='{guard}' cannot be used with distinct=2\.0"):
        apet.patch(shared("llava"), keep=9, distinct=P, guard=guard)
