"""Ways to call a model: threads, `generate` of the class, text before images, labels, caches that are passed on."""

from __future__ import annotations

import copy
import functools
import pickle
import sys
import threading
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from families import FAMILIES, UNSAID, Family, build, shared, twin
from recompute import expected
from running import BOTH, FIRST, STAGES, TOLERANCE, Said, conversation, conversations, judge, say
from test_generate import go_on

HOW: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "suppress_tokens": UNSAID}
HOW |= {"return_dict_in_generate": True, "output_logits": True}


# Qwen models store offsets of positions on the model, where threads overwrite them, patched or not.
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_threads_share_a_model(name: str) -> None:
    family, model = FAMILIES[name], build(name)
    rows = [
        conversation(family, 3, "image", 5),
        conversation(family, 2, "image1", 3, "image2", 4, seed=1),
        conversation(family, 9, seed=2),
    ]
    apet.patch(model, **BOTH)
    wanted = [say(model, collate(family, [row])).logits for row in rows]
    lengths = [[len(r.ids), *apet.kept(model).lengths[1:]] for r in rows[1:2]]
    wrong: list[Any] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():  # every thread has its own gradient mode
                for _ in range(8):
                    logits = say(model, collate(family, [rows[i]])).logits
                    if not torch.allclose(logits, wanted[i], rtol=0, atol=TOLERANCE):
                        wrong.append((i, float((logits - wanted[i]).abs().max())))
                    if i == 1 and apet.kept(model).lengths != lengths[0]:
                        wrong.append(apet.kept(model).lengths)
        except Exception as error:
            wrong.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


@pytest.mark.parametrize("how", ["class", "partial", "base class"])
def test_generate_of_the_class(family: Family, how: str) -> None:
    """Trainers and pipelines call `generate` of the class, not that of the instance."""
    model = shared(family.name)
    generate = {
        "class": functools.partial(type(model).generate, model),
        "partial": functools.partial(getattr(transformers, family.model).generate, model),
        "base class": functools.partial(transformers.GenerationMixin.generate, model),
    }[how]
    rows = conversations(family)
    with apet.patched(model, **BOTH):
        out = generate(**collate(family, rows), **HOW)
    width = collate(family, rows)["input_ids"].shape[1]
    judge(family, rows, Said(out.sequences[:, width:], torch.stack(out.logits, 1), None), BOTH)


@pytest.mark.parametrize("stage", STAGES)
def test_generate_of_the_class_in_a_second_turn(family: Family, stage: str) -> None:
    """There it counts dropped tokens as new ones: an error if that matters, else the right answer."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    with apet.patched(model, **STAGES[stage]):
        first = model.generate(**collate(family, [row]), **HOW)
        ids = torch.cat([first.sequences, torch.tensor([[61, 62, 63]])], dim=1)
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "past_key_values": first.past_key_values}
        try:
            second = type(model).generate(model, **more, **HOW)
        except ValueError as error:
            if "call model.generate" not in str(error):
                raise
            return
    said = second.sequences[0, len(row.ids) :].tolist()
    want = expected(twin(family.name), family, row, said[:-1], **STAGES[stage]).logits[-3:]
    torch.testing.assert_close(torch.stack(second.logits, 1)[0], want, rtol=0, atol=TOLERANCE)


# ---- text before the images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["grows", "fixed"])
@pytest.mark.parametrize("stage", STAGES)
def test_images_after_a_prefilled_text_prefix(family: Family, stage: str, kind: str) -> None:
    """A system prompt is prefilled once; every question with its picture starts from a copy of that cache."""
    model, options = shared(family.name), STAGES[stage]
    row = conversation(family, 12, "image", 5)
    inputs = collate(family, [row])
    prefix = {name: inputs[name][:, :10] for name in ("input_ids", "attention_mask")}

    def run() -> torch.Tensor:
        cache = transformers.DynamicCache()
        if kind == "fixed":
            cache = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=200)
        cache = model(**prefix, past_key_values=cache, use_cache=True).past_key_values
        out = model.generate(**inputs, past_key_values=copy.deepcopy(cache), **HOW)
        return torch.stack(out.logits, 1), out.sequences

    try:
        whole = say(model, inputs, new=3).logits
        if not torch.allclose(run()[0], whole, atol=TOLERANCE):
            pytest.skip("unpatched, this version answers otherwise than for the whole prompt")
    except (ValueError, RuntimeError, IndexError, TypeError) as error:
        pytest.skip(f"unpatched, this version cannot: {error}")
    with apet.patched(model, **options):
        logits, sequences = run()
    judge(family, [row], Said(sequences[:, len(row.ids) :], logits, None), options)


def test_a_cache_that_another_model_has_filled(family: Family) -> None:
    """Such a cache, filled before patching or rebuilt from tensors, may lack tokens, so it raises an error."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    before = model(**collate(family, [row]), use_cache=True)
    with apet.patched(model, **BOTH):
        with pytest.raises(ValueError, match="were not written by this patched model"):
            go_on(model, torch.tensor([[11]]), before, len(row.ids))
        first = model(**collate(family, [row]), use_cache=True)
        rebuilt = transformers.DynamicCache()
        for i, layer in enumerate(first.past_key_values.layers):
            rebuilt.update(layer.keys, layer.values, i)
        first.past_key_values = rebuilt
        with pytest.raises(ValueError, match="were not written by this patched model"):
            go_on(model, torch.tensor([[11]]), first, len(row.ids))


@pytest.mark.parametrize("stage", STAGES)
def test_a_compressed_cache_in_a_model_that_is_not_patched(family: Family, stage: str) -> None:
    """The second turn comes after the end of the with block."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    with apet.patched(model, **STAGES[stage]):
        first = model(**collate(family, [row]), use_cache=True)
    for copied in (first.past_key_values, copy.deepcopy(first.past_key_values), reloaded(first.past_key_values)):
        out = copy.copy(first)
        out.past_key_values = copied
        with pytest.raises(ValueError, match="a model that is not patched"):
            go_on(model, torch.tensor([[11]]), out, len(row.ids))


@pytest.mark.parametrize("then", [FIRST, {**BOTH, "llm_layer": 3}], ids=["first", "another layer"])
def test_a_cache_of_another_llm_layer(family: Family, then: dict[str, Any]) -> None:
    """The model is patched with other options between two turns."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    with apet.patched(model, **BOTH):
        first = model(**collate(family, [row]), use_cache=True)
    with apet.patched(model, **then), pytest.raises(ValueError, match="compressed at llm_layer=2"):
        go_on(model, torch.tensor([[11]]), first, len(row.ids))


@pytest.mark.parametrize("positions", ["keep", "renumber"])
def test_a_cache_with_other_positions(positions: str) -> None:
    """The model is patched with other positions between two turns: the keys of the late layers have the first ones."""
    family, other = FAMILIES["llava"], {"keep": "renumber", "renumber": "keep"}[positions]
    model, row = shared("llava"), conversation(family, 3, "image", 5)
    with apet.patched(model, **BOTH, positions=positions):
        first = model(**collate(family, [row]), use_cache=True)
    with (
        apet.patched(model, **BOTH, positions=other),
        pytest.raises(ValueError, match=f"compressed with positions='{positions}' and llm_layer"),
    ):
        go_on(model, torch.tensor([[11]]), first, len(row.ids))


def reloaded(cache: transformers.Cache) -> transformers.Cache:
    return pickle.loads(pickle.dumps(cache))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("how", ["reorder", "select", "repeat", "reorder, fixed"])
def test_rows_of_a_cache_change(family: Family, stage: str, how: str) -> None:
    """Rows with different padding are reordered, selected or repeated, and their masks and positions with them. A cache
    of fixed size can only be reordered."""
    model, options = shared(family.name), STAGES[stage]
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, "image2", 4, seed=1)]
    inputs = collate(family, rows)
    mask = inputs["attention_mask"]
    if not family.ragged:  # a ragged one counts padding, also unpatched
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    given = {}
    if how.endswith("fixed"):
        given["past_key_values"] = transformers.StaticCache(config=model.config.get_text_config(), max_cache_len=400)
    with apet.patched(model, **options):
        out = model(**inputs, **given, use_cache=True)
        cache = out.past_key_values
        if how.startswith("reorder"):
            cache.reorder_cache(torch.tensor([1, 0]))
            rows, mask = rows[::-1], mask.flip(0)
        elif how == "select":
            cache.batch_select_indices(torch.tensor([1]))
            rows, mask = rows[1:], mask[1:]
        else:
            cache.batch_repeat_interleave(2)
            rows, mask = [row for row in rows for _ in range(2)], mask.repeat_interleave(2, 0)
        if family.ragged:  # the model stores offsets of positions for the rows of its last call
            getattr(model, "model", model).rope_deltas = None
        told = torch.tensor([[following(family, row)] for row in rows])
        more = {"position_ids": told.expand(3, -1, -1) if family.ragged else told}
        more["attention_mask"] = torch.nn.functional.pad(mask, (0, 1), value=1)
        then = go_on(model, torch.full((len(rows), 1), 11), out, mask.shape[1], **more)
    for b, row in enumerate(rows):
        want = expected(twin(family.name), family, row, [11], **options).logits[1]
        torch.testing.assert_close(then.logits[b, -1], want, rtol=0, atol=TOLERANCE)


def following(family: Family, row: Any) -> int:
    from test_generate import next_position

    return next_position(family, row)


# ---- scoring --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stage", STAGES)
def test_scored_answers(family: Family, stage: str, side: str) -> None:
    """The loss of answers is the mean negative log-likelihood of their tokens in the recompute."""
    model, options = shared(family.name), STAGES[stage]
    answers = [[21, 22, 23], [31, 32, 33]]
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, "image2", 4, seed=1)]
    each = []
    for row, answer in zip(rows, answers, strict=True):
        logits = expected(twin(family.name), family, row, answer[:-1], **options).logits
        each.append(-logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None]))
        row.ids.extend(answer)
    inputs = collate(family, rows, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, row in enumerate(rows):
        end = labels.shape[1] if side == "left" else len(row.ids)
        labels[b, end - 3 : end] = torch.tensor(row.ids[-3:])
    kept_labels = labels.clone()
    with apet.patched(model, **options):
        out = model(**inputs, labels=labels, use_cache=False)
        aligned = apet.kept(model).align(out.logits)
    assert torch.equal(labels, kept_labels)
    assert abs(float(out.loss) - float(torch.cat(each).mean())) < TOLERANCE
    assert aligned.shape[:2] == labels.shape
    for b, (row, want) in enumerate(zip(rows, each, strict=True)):
        end = labels.shape[1] if side == "left" else len(row.ids)
        usual = aligned[b, end - 4 : end - 1].double().log_softmax(-1)
        got = -usual.gather(1, torch.tensor(row.ids[-3:])[:, None])
        torch.testing.assert_close(got, want, rtol=0, atol=TOLERANCE)


def test_labels_of_dropped_tokens(family: Family) -> None:
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    with apet.patched(model, **FIRST):
        with pytest.raises(ValueError, match="labels score the token in row 0"):
            model(**inputs, labels=inputs["input_ids"])
        with pytest.raises(ValueError, match="labels cannot be used with gradients"), torch.enable_grad():
            model(**inputs, labels=inputs["input_ids"])
        judge(family, [row], say(model, inputs), FIRST)


def test_align_of_another_length() -> None:
    family, model = FAMILIES["llava"], shared("llava")
    row = conversation(family, 3, "image", 5)
    with apet.patched(model, **FIRST):
        logits = model(**collate(family, [row])).logits
        kept = apet.kept(model)
        with pytest.raises(ValueError, match="the last stage has left a sequence of 17 tokens"):
            kept.align(logits[:, 1:])
    aligned = kept.align(logits)
    there = aligned.isfinite().all(-1)[0]
    assert int(there.sum()) == 17 == logits.shape[1]
    assert torch.equal(aligned[0][there], logits[0])


def test_a_logits_processor_that_calls_the_model(family: Family) -> None:
    """It has a cache of its own, without the image."""
    model, inputs = shared(family.name), collate(family, [conversation(family, 3, "image", 5)])
    with apet.patched(model, **FIRST), pytest.raises(ValueError, match=r"Not supported are .* guidance_scale"):
        model.generate(**inputs, **HOW, guidance_scale=1.5)


def test_the_loss_of_routers(family: Family) -> None:
    """It reads the mask as given."""
    model, inputs = shared(family.name), collate(family, [conversation(family, 3, "image", 5)])
    with apet.patched(model, **FIRST), pytest.raises(ValueError, match="output_router_logits=True computes a loss"):
        model(**inputs, output_router_logits=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_that_a_class_leaves_out_by_the_mask(side: str) -> None:
    """The last columns of a mask with padding on the right are not those of the tokens that remain."""
    family, model = FAMILIES["llava"], build("llava")

    class Filters(type(model)):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            shift_attention_mask = kwargs
            return super().forward(*args, **shift_attention_mask)

    model.__class__ = Filters
    apet.patch(model, **FIRST, check=False)
    inputs = collate(family, [conversation(family, 3, "image", 5), conversation(family, 4, seed=1)], side=side)
    labels = torch.where(inputs["input_ids"] == inputs["input_ids"][0, -1], inputs["input_ids"], -100)
    with torch.no_grad():
        if side == "left":
            assert torch.isfinite(model(**inputs, labels=labels).loss)
        else:
            with pytest.raises(ValueError, match=r"leaves out labels by the mask as given .*: pad on the left"):
                model(**inputs, labels=labels)
