"""Uses of `generate` and of direct forwards: caches, beams, sampling, several turns."""

from __future__ import annotations

import copy
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import Sample, collate
from families import EOS, FAMILIES, IMAGE, TAKES_CACHE_POSITION, UNSAID, Family, build, shared, twin
from recompute import Options, expected, shorten
from running import BOTH, NEW, STAGES, TOLERANCE, Said, conversation, conversations, judge, lengths, say


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("single", [True, False])
def test_static_cache(family: Family, stage: str, single: bool) -> None:
    rows = conversations(family)[: 1 if single else None]
    model = shared(family.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(family, rows), cache_implementation="static")
    results = judge(family, rows, said, STAGES[stage])
    first, deep = (max(getattr(r, name) for r in results) + NEW - 1 for name in ("length", "deep_length"))
    border = STAGES[stage].get("llm_layer", 4)
    assert lengths(said.cache) == [first] * border + [deep] * (4 - border)


def test_static_cache_reused(family: Family) -> None:
    """One StaticCache object, reset between two prompts of different lengths."""
    model = shared(family.name)
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    for parts in ([3, "image", 5], [2, "image1", 3, "image2", 4]):
        row = conversation(family, *parts)
        with apet.patched(model, **BOTH):
            judge(family, [row], say(model, collate(family, [row]), past_key_values=cache), BOTH)
        cache.reset()


@pytest.mark.parametrize("stage", STAGES)
def test_beams(family: Family, stage: str) -> None:
    """The score of each returned sequence is its mean log-probability in the recompute, for every cache and none."""
    rows = [conversation(family, 3, "image", 5), conversation(family, 6, seed=1), conversation(family, 1, "image", 2)]
    model, inputs = shared(family.name), collate(family, rows)
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 1.0}
    found = []
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        with apet.patched(model, **STAGES[stage]):
            out = model.generate(
                **inputs,
                **options,
                max_new_tokens=4,
                do_sample=False,
                return_dict_in_generate=True,
                suppress_tokens=UNSAID,
                **cache,
            )
        found.append(out.sequences)
        for i, (sequence, score) in enumerate(zip(out.sequences, out.sequences_scores, strict=True)):
            tokens = sequence[inputs["input_ids"].shape[1] :].tolist()
            logits = expected(twin(family.name), family, rows[i // 2], tokens[:-1], **STAGES[stage]).logits
            each = logits.double().log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])
            assert abs(each.mean() - score) < TOLERANCE
    assert all(torch.equal(found[0], one) for one in found)


def test_sampling_several(family: Family) -> None:
    rows = [conversation(family, 3, "image", 5), conversation(family, 6, seed=1)]
    model = shared(family.name)
    torch.manual_seed(5)
    with apet.patched(model, **BOTH):
        said = say(model, collate(family, rows), do_sample=True, num_return_sequences=3, temperature=1.5)
    assert len(said.tokens.unique(dim=0)) > 2
    judge(family, [row for row in rows for _ in range(3)], said, BOTH)


def go_on(model: transformers.PreTrainedModel, ids: torch.Tensor, before: Any, given: int, **more: Any) -> Any:
    """Runs a forward of new tokens [B, new] after one that filled a cache with `given` tokens."""
    if TAKES_CACHE_POSITION:  # models with M-RoPE compute positions from this alone
        more["cache_position"] = torch.arange(given, given + ids.shape[1])
    return model(input_ids=ids, past_key_values=before.past_key_values, use_cache=True, **more)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("telling", ["nothing", "mask", "positions"])
def test_own_loop(family: Family, stage: str, telling: str) -> None:
    """A decode loop that passes nothing, the mask, or the positions of the whole prompt to the model."""
    model, options = shared(family.name), STAGES[stage]
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, "image2", 4, seed=1)]
    if telling == "nothing":  # without a mask the model cannot detect padding
        rows = rows[1:]
    inputs = collate(family, rows)
    if telling == "nothing":
        del inputs["attention_mask"]
    following = None
    if telling == "positions":
        following = torch.tensor([[next_position(family, row)] for row in rows])
        if not family.ragged:
            inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    mask = inputs.get("attention_mask")

    def loop() -> Said:
        tokens, logits, told = [], [], mask
        out = model(**inputs, use_cache=True)
        for step in range(NEW):
            said = out.logits[:, -1]
            logits.append(said)
            tokens.append(said.index_fill(1, torch.tensor(UNSAID), -torch.inf).argmax(-1))
            more = {}
            if told is not None:
                more["attention_mask"] = told = torch.cat([told, told.new_ones(len(told), 1)], dim=1)
            if following is not None:
                at = following + step
                more["position_ids"] = at.expand(3, -1, -1) if family.ragged else at
            out = go_on(model, tokens[-1][:, None], out, inputs["input_ids"].shape[1] + step, **more)
        return Said(torch.stack(tokens, 1), torch.stack(logits, 1), None)

    try:
        with apet.patched(model, **options):
            said = loop()
    except RuntimeError:
        with pytest.raises(RuntimeError) as raised:  # some versions make as many positions as the mask has columns
            loop()
        pytest.skip(f"unpatched, this version cannot: {raised.value}")
    judge(family, rows, said, options, generated=False)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["cached", "uncached", "loop"])
def test_a_video_that_reaches_past_the_text_after_it(stage: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In newer versions the text's positions follow the video's first position, and frames are counted by time, so the
    last position is not the largest. generate() continues after the last, and a call without positions after the
    largest."""
    family, options = FAMILIES["qwen2_5_vl"], STAGES[stage]
    model = shared(family.name)
    for each in (model, twin(family.name)):
        monkeypatch.setattr(each.config.vision_config, "tokens_per_second", 9)
    row = conversation(family, 3, "video", 2, "image", 3)
    inputs = collate(family, [row])
    with apet.patched(model, **options):
        if how == "loop":
            first = model(**inputs, use_cache=True)
            then = go_on(model, torch.tensor([[11]]), first, len(row.ids))
            said = Said(torch.tensor([[11, 0]]), torch.stack([first.logits[:, -1], then.logits[:, -1]], 1), None)
        else:
            said = say(model, inputs, use_cache=how == "cached")
    judge(family, [row], said, options, generated=how != "loop")


def next_position(family: Family, row: Sample) -> int:
    """Returns the position of the first new token in an unpatched model."""
    with torch.no_grad():
        return shorten(twin(family.name), family, row, Options()).following


@pytest.mark.parametrize("stage", STAGES)
def test_several_new_tokens_at_once(family: Family, stage: str) -> None:
    """Four tokens in one forward follow a cached prompt, as in speculative decoding and later turns."""
    model, options = shared(family.name), STAGES[stage]
    row, tail = conversation(family, 3, "image", 5), [11, 22, 33, 44]
    with apet.patched(model, **options):
        first = model(**collate(family, [row]), use_cache=True)
        then = go_on(model, torch.tensor([tail]), first, len(row.ids))
    want = expected(twin(family.name), family, row, tail, **options).logits
    torch.testing.assert_close(first.logits[0, -1], want[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(then.logits[0], want[1:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_generated_placeholder_is_a_token(family: Family, stage: str) -> None:
    """The model may generate the image token; without pixels it is a usual token."""
    model, options = shared(family.name), STAGES[stage]
    row, tail = conversation(family, 3, "image", 5), [11, IMAGE, 33]
    with apet.patched(model, **options):
        out = model(**collate(family, [row]), use_cache=True)
        said = [out.logits[0, -1]]
        for i, token in enumerate(tail):
            out = go_on(model, torch.tensor([[token]]), out, len(row.ids) + i)
            said.append(out.logits[0, -1])
    want = expected(twin(family.name), family, row, tail, **options).logits
    torch.testing.assert_close(torch.stack(said), want, rtol=0, atol=TOLERANCE)


def test_copied_cache(family: Family) -> None:
    """The cache of a prompt is copied, for two continuations."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    with apet.patched(model, **BOTH):
        first = model(**collate(family, [row]), use_cache=True)
        branches = [first, copy.copy(first)]
        branches[1].past_key_values = copy.deepcopy(first.past_key_values)
        outs = [
            go_on(model, torch.tensor([[token]]), branch, len(row.ids))
            for token, branch in zip((11, 22), branches, strict=True)
        ]
    for token, out in zip((11, 22), outs, strict=True):
        want = expected(twin(family.name), family, row, [token], **BOTH).logits[1]
        torch.testing.assert_close(out.logits[0, -1], want, rtol=0, atol=TOLERANCE)


def test_two_prompts_in_turns(family: Family) -> None:
    """Two caches of one model are used alternately, since the state belongs to the cache."""
    model = shared(family.name)
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, "image2", 4, seed=1)]
    said: list[list[torch.Tensor]] = [[], []]
    with apet.patched(model, **BOTH):
        outs = [model(**collate(family, [row]), use_cache=True) for row in rows]
        for step, token in enumerate((11, 22)):
            for i, out in enumerate(outs):
                said[i].append(out.logits[0, -1])
                outs[i] = go_on(model, torch.tensor([[token]]), out, len(rows[i].ids) + step)
    for row, logits in zip(rows, said, strict=True):
        want = expected(twin(family.name), family, row, [11], **BOTH).logits
        torch.testing.assert_close(torch.stack(logits), want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_second_turn(family: Family, stage: str) -> None:
    """The cache of a first answer is reused for a second question; all ids are passed again, as in chat loops."""
    model, options = shared(family.name), STAGES[stage]
    row, question = conversation(family, 3, "image", 5), [61, 62, 63]
    how = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID}
    how |= {"return_dict_in_generate": True, "output_logits": True}

    def right(**options: Any) -> bool:
        first = model.generate(**collate(family, [row]), **how)
        ids = torch.cat([first.sequences, torch.tensor([question])], dim=1)
        mask = torch.ones_like(ids)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=first.past_key_values, **how)
        said = second.sequences[0, len(row.ids) :].tolist()
        want = expected(twin(family.name), family, row, said[:-1], **options).logits[-3:]
        return torch.allclose(torch.stack(second.logits, 1)[0], want, rtol=0, atol=TOLERANCE)

    with apet.patched(model, **options):
        patched = right(**options)
    if not patched and not right():
        pytest.skip("unpatched, this version answers otherwise than for the whole prompt")
    assert patched


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_assisted_decoding(family: Family, stage: str, draft: str) -> None:
    """With a drafter the tokens are the same, and their logits those of the recompute."""
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    more = {"prompt_lookup_num_tokens": 3} if draft == "lookup" else {"assistant_model": build(family.name, seed=1)}
    more["eos_token_id"] = EOS  # transformers 4 needs one
    with apet.patched(model, **options):
        plain = say(model, collate(family, [row]), new=8)
        said = say(model, collate(family, [row]), new=8, **more)
    assert torch.equal(plain.tokens, said.tokens)
    judge(family, [row], said, options)


@pytest.mark.parametrize("stage", STAGES)
def test_chunked_prefill(family: Family, stage: str) -> None:
    """It is rejected with images, whose units it would split, and right without."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    text = collate(family, [conversation(family, 9)])
    with apet.patched(model, **STAGES[stage]), pytest.raises(ValueError, match=r"prefill_chunk_size"):
        say(model, collate(family, [row]), prefill_chunk_size=8)
    try:
        before = say(model, text, prefill_chunk_size=4)
    except (ValueError, IndexError, RuntimeError) as error:
        pytest.skip(f"unpatched, this version cannot: {error}")
    with apet.patched(model, **STAGES[stage]):
        during = say(model, text, prefill_chunk_size=4)
    assert torch.equal(during.logits, before.logits)
