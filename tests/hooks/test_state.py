"""The state of the patch: it is on one instance, is copied with it, and is removed without a trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import Visual, collate
from families import FAMILIES, IMAGE, VIDEO, Family, build, shared, twin
from recompute import expected, units
from running import BOTH, FIRST, SECOND, STAGES, conversation, conversations, judge, say
from torch import nn


def fingerprint(model: nn.Module) -> dict[str, object]:
    """Returns everything that a patch could leave behind on a model: attributes, hooks, classes, methods."""
    seen: dict[str, object] = {}
    for name, module in model.named_modules():
        seen[name] = (type(module), sorted(vars(module)), *(len(getattr(module, hooks)) for hooks in HOOKS))
    return seen


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")


def test_unpatch_leaves_nothing(family: Family) -> None:
    model, inputs = build(family.name), collate(family, conversations(family))
    say(model, inputs)
    before, said = fingerprint(model), say(model, inputs)
    apet.patch(model, **BOTH)
    say(model, inputs)
    apet.unpatch(model)
    assert fingerprint(model) == before
    after = say(model, inputs)
    assert torch.equal(said.logits, after.logits)
    apet.unpatch(model)  # a model that is not patched: nothing to do


def test_nothing_global_changes(family: Family) -> None:
    """The classes of transformers do not change."""
    model = build(family.name)
    classes = {type(module) for module in model.modules()}
    before = {cls: dict(vars(cls)) for cls in classes}
    apet.patch(model, **BOTH)
    say(model, collate(family, conversations(family)))
    assert {cls: dict(vars(cls)) for cls in classes} == before


def test_patch_twice_replaces(family: Family) -> None:
    model, rows = build(family.name), conversations(family)
    assert apet.options(model) is None
    apet.patch(model, **FIRST)
    chosen = apet.patch(model, **BOTH)
    assert apet.options(model) == chosen
    assert (chosen.keep, chosen.basis, chosen.llm_layer, chosen.llm_keep) == (9, 4, 2, 0.5)
    judge(family, rows, say(model, collate(family, rows)), BOTH)
    apet.unpatch(model)
    assert apet.options(model) is None


def test_patched_goes_back_to_what_was_there(family: Family) -> None:
    model, rows = build(family.name), conversations(family)
    inputs = collate(family, rows)
    apet.patch(model, **FIRST)
    with apet.patched(model, **SECOND):
        judge(family, rows, say(model, inputs), SECOND)
    judge(family, rows, say(model, inputs), FIRST)
    with pytest.raises(KeyError), apet.patched(model, **BOTH):
        raise KeyError
    judge(family, rows, say(model, inputs), FIRST)


def test_two_models(family: Family) -> None:
    """Two models are patched differently, and run in turns."""
    rows = conversations(family)
    inputs, models = collate(family, rows), [build(family.name) for _ in range(3)]
    apet.patch(models[0], **FIRST)
    apet.patch(models[1], **BOTH)
    for _ in range(2):
        for model, options in zip(models, (FIRST, BOTH, {}), strict=True):
            judge(family, rows, say(model, inputs), options)


def copies(model: transformers.PreTrainedModel) -> dict[str, transformers.PreTrainedModel]:
    saved = io.BytesIO()
    torch.save(model, saved)
    saved.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(saved, weights_only=False),
    }


def test_copies(family: Family) -> None:
    """A copy is patched like the original, with its own hooks, and each can be unpatched alone."""
    rows = conversations(family)
    inputs, model = collate(family, rows), build(family.name)
    apet.patch(model, **BOTH)
    # Before the first call, since models of transformers 5 cannot be pickled after a call, patched or not.
    for other in copies(model).values():
        assert apet.options(other) == apet.options(model)
        with torch.no_grad():
            other.lm_head.weight.zero_()  # shows if the copy's hooks still run the original
        assert not say(other, inputs).logits.any()
        other.lm_head.weight.data.copy_(model.lm_head.weight)
        judge(family, rows, say(other, inputs), BOTH)
        apet.patch(other, **FIRST)
        judge(family, rows, say(model, inputs), BOTH)
        apet.unpatch(other)
        judge(family, rows, say(other, inputs), {})
        judge(family, rows, say(model, inputs), BOTH)


def test_copy_survives_the_original(family: Family) -> None:
    rows, model = conversations(family), build(family.name)
    apet.patch(model, **BOTH)
    say(model, collate(family, rows))
    other = copy.deepcopy(model)
    apet.unpatch(model)
    judge(family, rows, say(other, collate(family, rows)), BOTH)
    judge(family, rows, say(model, collate(family, rows)), {})


def test_save_pretrained(family: Family, tmp_path) -> None:
    """The saved files are those of an unpatched model, and load into one."""
    model = build(family.name)
    model.save_pretrained(tmp_path / "before")
    apet.patch(model, **BOTH)
    say(model, collate(family, conversations(family)))
    model.save_pretrained(tmp_path / "patched")
    files = sorted(path.name for path in (tmp_path / "before").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "patched").iterdir())
    for name in files:
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "patched" / name).read_bytes()
    loaded = type(model).from_pretrained(tmp_path / "patched")
    assert apet.options(loaded) is None


def test_state_dict_and_parameters(family: Family) -> None:
    model = build(family.name)
    names, parameters = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    modules = [name for name, _ in model.named_modules()]
    apet.patch(model, **BOTH)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_parameters()] == parameters
    assert [name for name, _ in model.named_modules()] == modules


@pytest.mark.parametrize("name", FAMILIES)
def test_features_outside_a_call_are_whole(name: str) -> None:
    """`get_image_features` called by a user returns the model's own result, and does not change the next call."""
    family = FAMILIES[name]
    model, row = shared(name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    given = {
        key: inputs[key]
        for key in ("pixel_values", "pixel_values_images", "image_sizes", "image_grid_thw")
        if key in inputs
    }
    if name != "llava_onevision":
        given.pop("batch_num_images", None)
    if not family.ragged and "pixel_values_images" not in given:
        given |= {"vision_feature_layer": model.config.vision_feature_layer}
        given |= {"vision_feature_select_strategy": model.config.vision_feature_select_strategy}
    before = flat(model.get_image_features(**given))
    with apet.patched(model, **BOTH):
        during = flat(model.get_image_features(**given))
        assert all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
        judge(family, [row], say(model, inputs), BOTH)


def flat(features: object) -> list[torch.Tensor]:
    if not isinstance(features, torch.Tensor | list | tuple):
        features = features.pooler_output
    return [features] if isinstance(features, torch.Tensor) else [x for x in features if isinstance(x, torch.Tensor)]


def test_failure_in_a_call_leaves_the_model_usable(family: Family) -> None:
    """After an exception in a forward the next call is right."""
    model, rows = shared(family.name), conversations(family)
    inputs = collate(family, rows)

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    with apet.patched(model, **BOTH):
        for module in (model.model.language_model.layers[3], model.model.language_model.layers[0], model.lm_head):
            with module.register_forward_pre_hook(fail), pytest.raises(ZeroDivisionError):
                say(model, inputs)
            judge(family, rows, say(model, inputs), BOTH)


def parts(family: Family, one: Visual) -> list[torch.Tensor]:
    return units(twin(family.name), family, one)


APPEND = {"keep": 5, "basis": 4, "layout": "append"}


@pytest.mark.parametrize(("stage", "options"), [*STAGES.items(), ("first", APPEND)], ids=[*STAGES, "append"])
def test_kept(family: Family, stage: str, options: dict[str, Any]) -> None:
    """`apet.kept` has the placeholders that the recompute keeps after each stage, and the lengths."""
    model, rows = shared(family.name), conversations(family)
    inputs = collate(family, rows)
    with apet.patched(model, **options):
        assert apet.kept(model) is None
        say(model, inputs)
        kept = apet.kept(model)
    results = [expected(twin(family.name), family, row, [], **options) for row in rows]
    stages = ["source", "deep_source"] if stage == "both" else ["source" if stage == "first" else "deep_source"]
    widths = [max(len(getattr(result, name)) for result in results) for name in stages]
    assert kept.lengths == [inputs["input_ids"].shape[1], *widths]
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        told = [one for one in kept.visuals if one.modality == kind]
        for b, (row, result) in enumerate(zip(rows, results, strict=True)):
            slots = (torch.tensor(row.ids) == token).nonzero().flatten()
            for one in (one for one in row.visuals if one.kind == kind):
                mine, slots = slots[: one.count], slots[one.count :]
                said = told.pop(0)
                assert (said.row, said.tokens) == (b, one.count)
                want = [torch.isin(mine, getattr(result, name)).nonzero().flatten() for name in stages]
                if options is APPEND and family.name in ("llava", "llava_next"):  # the places, behind the projector
                    outside = set(range(one.count)) - {i for unit in parts(family, one) for i in unit.tolist()}
                    places = [unit[:9] for unit in parts(family, one)]
                    want = [torch.cat([*places, torch.tensor(sorted(outside), dtype=torch.long)]).sort().values]
                assert [left.tolist() for left in said.remaining] == [left.tolist() for left in want]
        assert not told


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl"])
def test_a_call_after_an_interrupted_one(name: str) -> None:
    """torch runs no hooks after a KeyboardInterrupt, so what the call has left must not be taken for the next one's."""
    family, model = FAMILIES[name], shared(name)
    one, other = (collate(family, [conversation(family, n, "image", 5)]) for n in (3, 7))
    labels = other["input_ids"].masked_fill(other["input_ids"] > 0, -100)
    labels[:, -2:] = other["input_ids"][:, -2:]
    how = {"max_new_tokens": 2, "do_sample": False}

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), apet.patched(model, keep=3, basis=2):
        expected = (model(**other, labels=labels).loss, model.generate(**other, **how))
        handle = model.lm_head.register_forward_pre_hook(interrupt)
        layer = model.model.language_model.layers[1].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(**one)
        handle.remove(), layer.remove()
        assert torch.equal(model.generate(**other, **how), expected[1])
        torch.testing.assert_close(model(**other, labels=labels).loss, expected[0])
