"""`relevance=w`: the first stage prefers tokens that resemble the text of their prompt."""

from __future__ import annotations

import apet
import pytest
import torch
import torch.nn.functional as F
from apet import calls
from apet.hooks import generation, relevance
from apet.hooks.state import RunningCall
from conversations import Sample, collate
from families import EOS, FAMILIES, IMAGE, UNSAID, VIDEO, Family, reader, shared, twin
from recompute import units
from running import conversation, conversations, say
from torch import Tensor

import apet_kernels

LLAVA = FAMILIES["llava"]
W = 0.7


@torch.no_grad()
def weights_of(family: Family, row: Sample) -> list[list[Tensor]]:
    """Returns the weights of each unit of each visual of a prompt, from the decoder's input without hooks: there the
    features of images stand at their placeholders."""
    model, given = twin(family.name), []
    with reader(model).register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True
    ):
        say(model, collate(family, [row]), new=1)
    unit = F.normalize(given[0][0].double(), dim=-1)  # [L, D]
    ids = torch.tensor(row.ids)
    mean = unit[(ids != IMAGE) & (ids != VIDEO)].mean(0)
    places = {kind: (ids == token).nonzero().view(-1) for kind, token in (("image", IMAGE), ("video", VIDEO))}
    found, used = [], {"image": 0, "video": 0}
    for one in row.visuals:
        here = places[one.kind][used[one.kind] : used[one.kind] + one.count]
        used[one.kind] += one.count
        cosines = [unit[here[tokens]] @ mean for tokens in units(model, family, one)]
        found.append([1 - W * (1 - (c - c.min()) / (c.max() - c.min())) for c in cosines])
    return found


def test_the_op_gets_the_cosines_with_the_prompt(family: Family) -> None:
    """Those of every image of a padded batch, each with its own prompt, wherever it is compressed."""
    rows, model = conversations(family), shared(family.name)
    with apet.patched(model, keep=3, relevance=W), calls.Recorder() as recorder:
        say(model, collate(family, rows), new=2)
    (call,) = recorder.calls
    alone = [weights_of(family, row) for row in rows]
    expected = [
        unit
        for kind in ("image", "video")
        for row, of_row in zip(rows, alone, strict=True)
        for one, of_visual in zip(row.visuals, of_row, strict=True)
        for unit in of_visual
        if one.kind == kind
    ]
    assert call.lengths == [len(unit) for unit in expected]
    torch.testing.assert_close(call.weights.double(), torch.cat(expected), rtol=0, atol=1e-5)
    again = apet_kernels.compress_packed(call.x, call.lengths, call.keeps, weights=call.weights)
    assert torch.equal(again.indices, call.indices)
    without = apet_kernels.compress_packed(call.x, call.lengths, call.keeps)
    assert not torch.equal(again.indices, without.indices), "the prompt changes the choice"


def test_the_answer_does_not_choose(family: Family) -> None:
    """Tokens with labels, and what generate() has generated without a cache, are no part of the prompt."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs, how = collate(family, [row]), {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID}
    with apet.patched(model, keep=3, relevance=W), calls.Recorder() as recorder:
        whole = model.generate(**inputs, **how)
        (chosen,) = recorder.calls
        again = model.generate(**inputs, **how, use_cache=False)
        assert torch.equal(again, whole)
        answered = collate(family, [conversation(family, 3, "image", 5)])
        guess = torch.tensor([[77, 78, 79, 80]])
        labels = torch.cat([torch.full_like(inputs["input_ids"], -100), guess], 1)
        answered["input_ids"] = torch.cat([inputs["input_ids"], guess], 1)
        answered["attention_mask"] = torch.ones_like(answered["input_ids"])
        if "mm_token_type_ids" in answered:
            answered["mm_token_type_ids"] = F.pad(answered["mm_token_type_ids"], (0, 4))
        model(**answered, labels=labels)
    assert len(recorder.calls) >= 2
    for call in recorder.calls[1:]:
        torch.testing.assert_close(call.weights, chosen.weights, rtol=0, atol=1e-5)


def test_guesses_do_not_choose() -> None:
    """Looking tokens up in the prompt gives the answer that comes without it."""
    model = shared("qwen2_5_vl")
    family = FAMILIES["qwen2_5_vl"]
    row = conversation(family, 9, "image", 5)
    row.ids[:9] = [31, 32, 33, 31, 32, 33, 31, 32, 33]
    row.ids[-3:] = [31, 32, 33]
    inputs, how = collate(family, [row]), {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": UNSAID}
    how["eos_token_id"] = EOS  # transformers 4 looks up nothing without it
    with apet.patched(model, keep=3, relevance=W), calls.Recorder() as recorder:
        whole = model.generate(**inputs, **how)
        looked_up = model.generate(**inputs, **how, prompt_lookup_num_tokens=3)
    assert torch.equal(looked_up, whole)
    first, second = recorder.calls
    torch.testing.assert_close(second.weights, first.weights, rtol=0, atol=1e-5)


def test_not_with_a_guard() -> None:
    with pytest.raises(ValueError, match=r"guard='raise' cannot be used with relevance=0\.5"):
        apet.patch(shared("llava"), keep=9, relevance=0.5, guard="raise")


def test_without_it_the_prompt_does_not_matter() -> None:
    model = shared("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    with apet.patched(model, keep=9, relevance=0.0), calls.Recorder() as recorder:
        say(model, inputs, new=1)
    assert recorder.calls[0].weights is None


def test_a_prompt_without_text_prefers_nothing() -> None:
    model = shared("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, "image")])
    with apet.patched(model, keep=9, relevance=W), calls.Recorder() as recorder:
        model(**inputs)
    assert torch.equal(recorder.calls[0].weights, torch.ones(len(recorder.calls[0].x)))


@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("nan"), "much", True])
def test_bad_values_raise(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"relevance=.* is outside 0\.\.1"):
        apet.patch(shared("llava"), keep=9, relevance=wrong)


def test_it_needs_the_first_stage() -> None:
    with pytest.raises(ValueError, match=r"relevance=0\.5 needs keep: only the first stage uses it"):
        apet.patch(shared("llava"), llm_layer=2, llm_keep=4, relevance=0.5)


def test_a_prompt_whose_beginning_is_in_the_cache() -> None:
    """generate() may be given the new tokens alone, with the mask of all: all of them are the prompt."""
    for ids in (torch.ones(1, 18, dtype=torch.long), torch.ones(1, 8, dtype=torch.long)):
        given = {"input_ids": ids, "attention_mask": torch.ones(1, 18, dtype=torch.long)}
        asked = generation.columns(RunningCall(lambda: None, "generate", given))
        assert asked == 18
        call = RunningCall(lambda: None, "core", {}, asked=asked)
        assert relevance.question(call, torch.zeros(1, 8), 10).all()
        assert relevance.question(call, torch.zeros(1, 11), 10).sum() == 8  # the others are guesses


def test_ids_by_position() -> None:
    """generate(ids, ...) is generate(input_ids=ids, ...)."""
    model, inputs = shared("llava"), collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    how = {"max_new_tokens": 2, "do_sample": False, "suppress_tokens": UNSAID}
    with apet.patched(model, keep=3, relevance=W), calls.Recorder() as recorder:
        named = model.generate(**inputs, **how)
        ids = inputs.pop("input_ids")
        assert torch.equal(model.generate(ids, **inputs, **how), named)
    one, other = recorder.calls
    assert torch.equal(one.weights, other.weights)
