"""Unusual prompts and calls: images at both ends, no text, embeddings instead of ids, cropped caches."""

from __future__ import annotations

from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import Part, Sample, collate
from families import CROPS_TO_LENGTH, EOS, TAKES_CACHE_POSITION, UNSAID, Family, build, core, shared, twin
from recompute import expected
from running import BOTH, FIRST, STAGES, TOLERANCE, Said, conversation, judge, say
from test_generate import go_on

PROMPTS: dict[str, list[Part]] = {
    "image first": ["image", 5],
    "image last": [5, "image"],
    "image alone": ["image"],
    "images side by side": [2, "image1", "image2", 3],
    "five images": [1, "image", 1, "image1", 2, "image2", 1, "image1", 1, "image", 2],
}


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts(family: Family, prompt: str) -> None:
    model, options = shared(family.name), BOTH
    rows = [conversation(family, *PROMPTS[prompt]), conversation(family, 4, "image", 1, seed=1)]
    with apet.patched(model, **options):
        batch = say(model, collate(family, rows))
        single = say(model, collate(family, rows[:1]))
    judge(family, rows, batch, options)
    judge(family, rows[:1], single, options)


def test_videos_of_several_samples(family: Family) -> None:
    if not family.video:
        pytest.skip("no videos of its own")
    prompts: list[list[Part]] = [["video", 2, "video", 3], [1, "image1", 2, "video", 1, "image", 3], [6, "video"]]
    rows = [conversation(family, *parts, seed=seed) for seed, parts in enumerate(prompts)]
    model = shared(family.name)
    with apet.patched(model, **BOTH):
        said = say(model, collate(family, rows))
    judge(family, rows, said, BOTH)


@pytest.mark.parametrize("stage", STAGES)
def test_embeddings_instead_of_ids(family: Family, stage: str) -> None:
    """The call has embeddings instead of ids; the model and the patch find the placeholders in these."""
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    if family.ragged:  # without ids the model cannot compute positions, so the call has them
        inputs["position_ids"] = positions(family, row)
        inputs.pop("mm_token_type_ids", None)
    embeds = core(model).get_input_embeddings()(inputs.pop("input_ids"))
    with apet.patched(model, **options):
        out = model(**inputs, inputs_embeds=embeds, use_cache=True)
    want = expected(twin(family.name), family, row, [], **options).logits[0]
    torch.testing.assert_close(out.logits[0, -1], want, rtol=0, atol=TOLERANCE)


def positions(family: Family, row: Sample) -> torch.Tensor:
    """Returns M-RoPE positions [3, 1, L] of a whole prompt."""
    from recompute import Options, shorten

    return shorten(twin(family.name), family, row, Options()).positions[:, None]


@pytest.mark.parametrize("how", ["positional", "inputs", "inference mode", "bool mask", "own cache"])
def test_ways_to_call(family: Family, how: str) -> None:
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    more: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": UNSAID}
    more |= {"return_dict_in_generate": True, "output_logits": True}
    args = ()
    if how == "positional":
        args = (inputs.pop("input_ids"),)
    elif how == "inputs":
        more["inputs"] = inputs.pop("input_ids")
    elif how == "bool mask":
        inputs["attention_mask"] = inputs["attention_mask"].bool()
    elif how == "own cache":
        more["past_key_values"] = transformers.DynamicCache()
    with apet.patched(model, **BOTH), torch.inference_mode(how == "inference mode"):
        out = model.generate(*args, **inputs, **more)
    said = Said(out.sequences[:, len(row.ids) :].clone(), torch.stack(out.logits, 1).clone(), None)
    judge(family, [row], said, BOTH)


@pytest.mark.parametrize("stage", STAGES)
def test_tuples(family: Family, stage: str) -> None:
    """With `return_dict=False` the cache is in a tuple, and can be used as usual."""
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    cache = transformers.DynamicCache()
    with apet.patched(model, **options):
        first = model(**collate(family, [row]), past_key_values=cache, use_cache=True, return_dict=False)
        assert isinstance(first, tuple)
        before = transformers.modeling_outputs.CausalLMOutputWithPast(past_key_values=cache)
        then = go_on(model, torch.tensor([[11]]), before, len(row.ids))
    want = expected(twin(family.name), family, row, [11], **options).logits
    torch.testing.assert_close(first[0][0, -1], want[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(then.logits[0, -1], want[1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_hidden_states(family: Family, stage: str) -> None:
    """They have the length of the sequence in each layer."""
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    with apet.patched(model, **options):
        out = model(**collate(family, [row]), use_cache=True, output_hidden_states=True)
    result = expected(twin(family.name), family, row, [], **options)
    border = options.get("llm_layer", 4)
    lengths = [hidden.shape[1] for hidden in out.hidden_states]
    assert lengths[:border] == [result.length] * border
    assert lengths[border + 1 :] == [result.deep_length] * (4 - border)
    torch.testing.assert_close(out.logits[0, -1], result.logits[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_cropped_cache(family: Family, stage: str) -> None:
    """The last tokens are removed, as in speculative decoding, and other tokens follow."""
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    L = len(row.ids)
    with apet.patched(model, **options):
        out = model(**collate(family, [row]), use_cache=True)
        out = go_on(model, torch.tensor([[11, 22, 33]]), out, L)
        out.past_key_values.crop(L + 1 if CROPS_TO_LENGTH else -2)
        out = go_on(model, torch.tensor([[44, 55]]), out, L + 1)
    want = expected(twin(family.name), family, row, [11, 44, 55], **options).logits
    torch.testing.assert_close(out.logits[0], want[2:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_turns_of_a_batch(family: Family, stage: str) -> None:
    """Questions of different lengths follow a cache, with padding in the middle; then comes a third turn."""
    if family.ragged and TAKES_CACHE_POSITION and stage == "second":
        pytest.skip("the early layers' positions are the model's own, and it counts padding after images")
    model, options = shared(family.name), STAGES[stage]
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, "image2", 4, seed=1)]
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    inputs = collate(family, rows)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    said: list[list[int]] = [[], []]
    with apet.patched(model, **options):
        out = model.generate(**inputs, **how)
        for turn, questions in enumerate(([[61, 62, 63], [64]], [[71], [72, 73, 74, 75]])):
            width = max(map(len, questions))
            asked = torch.tensor([[0] * (width - len(q)) + q for q in questions])
            mask = torch.cat([mask, torch.ones(2, 3, dtype=torch.long), (asked > 0).long()], dim=1)
            for b, question in enumerate(questions):
                said[b] += out.sequences[b, -3:].tolist() + question
            ids = torch.cat([out.sequences, asked], dim=1)
            out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=out.past_key_values, **how)
            for b, row in enumerate(rows):
                tokens = said[b] + out.sequences[b, -3:].tolist()
                want = expected(twin(family.name), family, row, tokens[:-1], **options).logits[-3:]
                got = torch.stack(out.logits, 1)[b]
                torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE, msg=lambda m, t=turn: f"turn {t}: {m}")


@pytest.mark.parametrize("stage", STAGES)
def test_second_turn_in_a_static_cache(family: Family, stage: str) -> None:
    model, options, row = shared(family.name), STAGES[stage], conversation(family, 3, "image", 5)
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID}
    how |= {"return_dict_in_generate": True, "output_logits": True, "past_key_values": cache}
    with apet.patched(model, **options):
        first = model.generate(**collate(family, [row]), **how)
        ids = torch.cat([first.sequences, torch.tensor([[61, 62]])], dim=1)
        second = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
    said = second.sequences[0, len(row.ids) :].tolist()
    want = expected(twin(family.name), family, row, said[:-1], **options).logits[-3:]
    torch.testing.assert_close(torch.stack(second.logits, 1)[0], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", STAGES)
def test_padded_turn_of_generate_in_a_static_cache(family: Family, stage: str) -> None:
    """generate() turns the mask into one with the size of the cache, in which padding cannot be told."""
    model, rows = (
        shared(family.name),
        [conversation(family, 3, "image", 5), conversation(family, 2, "image", 4, seed=1)],
    )
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    how: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID, "past_key_values": cache}
    inputs = collate(family, rows)
    with apet.patched(model, **STAGES[stage]):
        ids = torch.cat([model.generate(**inputs, **how), torch.tensor([[61, 62], [0, 63]])], dim=1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], dim=1)
        mask[1, -2] = 0
        with pytest.raises(ValueError, match="padding after a compressed prompt"):
            model.generate(input_ids=ids, attention_mask=mask, **how)


@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("leave", [10, -3], ids=["into the image", "to the text before it"])
@pytest.mark.parametrize("stage", ["first", "both"])
def test_cache_cropped_into_an_image(family: Family, stage: str, leave: int, static: bool) -> None:
    """Counted as given, a crop into the images leaves another number of tokens, or none, of those that are held."""
    if static and CROPS_TO_LENGTH:
        pytest.skip("a cache of fixed size cannot be cropped in this version")
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    leave %= len(row.ids)
    more: dict[str, Any] = {"use_cache": True}
    if static:
        config = model.config.get_text_config()
        more["past_key_values"] = transformers.StaticCache(config=config, max_cache_len=400)
    with apet.patched(model, **STAGES[stage]):
        cache = model(**collate(family, [row]), **more).past_key_values
        held = int(cache.get_seq_length())
        with pytest.raises(ValueError, match="cropped"):
            cache.crop(len(row.ids) - leave if CROPS_TO_LENGTH else -leave)
        assert int(cache.get_seq_length()) == held


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
def test_tokens_after_a_prompt_counted_by_the_cache(family: Family, masked: bool) -> None:
    """The cache holds fewer tokens than were given, so a loop that counts by it gives placeholders again."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    ids = torch.tensor([[*row.ids, 61, 62, 63]])
    with apet.patched(model, **FIRST):
        out = model(**collate(family, [row]), use_cache=True)
        past = int(out.past_key_values.get_seq_length())
        more: dict[str, Any] = {"past_key_values": out.past_key_values, "use_cache": True}
        more |= {"attention_mask": torch.ones_like(ids)} if masked else {}
        with pytest.raises(ValueError, match="given"):
            model(input_ids=ids[:, past:], **more)


@pytest.mark.parametrize("stage", STAGES)
def test_padded_turn_in_a_static_cache(family: Family, stage: str) -> None:
    """It raises ApetError, since a mask of fixed size cannot describe padding after the prompt."""
    model = shared(family.name)
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image", 1, seed=1)]
    inputs = collate(family, rows)
    cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    with apet.patched(model, **STAGES[stage]):
        out = model(**inputs, past_key_values=cache, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.tensor([[1, 1], [0, 1]])], dim=1)
        with pytest.raises(ValueError, match="padding"):
            go_on(model, torch.tensor([[11, 12], [0, 13]]), out, len(mask[0]) - 2, attention_mask=mask)


def test_assistant_that_is_patched_too(family: Family) -> None:
    """Some versions of `generate` pass all images to the drafter again in every round, with its cache, which raises an
    error. In the others the answer is right."""
    model, draft = shared(family.name), build(family.name, seed=1)
    row = conversation(family, 3, "image", 5)
    apet.patch(draft, **FIRST)
    with apet.patched(model, **BOTH):
        try:
            said = say(model, collate(family, [row]), new=12, assistant_model=draft, eos_token_id=EOS)
        except ValueError as error:
            if "images cannot follow a cache" not in str(error):
                raise
        else:
            judge(family, [row], said, BOTH)


def test_moved_after_patching(family: Family) -> None:
    """`model.to(...)` may follow `patch`."""
    model, row = build(family.name), conversation(family, 3, "image", 5)
    apet.patch(model, **FIRST)
    model.to(torch.bfloat16)
    said = say(model, collate(family, [row], dtype=torch.bfloat16))
    judge(family, [row], said, FIRST, torch.bfloat16, tolerance=0.1)


def test_placeholders_that_do_not_fit(family: Family) -> None:
    """With one placeholder too few, the error is that of an unpatched model, and the next call is right."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    short = Sample([*row.ids[:5], *row.ids[6:]], row.visuals)
    with pytest.raises((ValueError, RuntimeError, IndexError)) as without:
        model(**collate(family, [short]))
    with apet.patched(model, **BOTH):
        with pytest.raises((ValueError, RuntimeError, IndexError)) as during:
            model(**collate(family, [short]))
        judge(family, [row], say(model, collate(family, [row])), BOTH)
    assert str(during.value) == str(without.value) or "placeholder" in str(during.value)


def test_hidden_placeholders_raise(family: Family) -> None:
    """A mask that hides some tokens of an image raises an error."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    inputs["attention_mask"][0, :8] = 0
    if family.ragged:
        inputs["position_ids"] = positions(family, row)
    with apet.patched(model, **BOTH), pytest.raises(ValueError, match="attention_mask"):
        model(**inputs)
