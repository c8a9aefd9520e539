"""Options: their text form, presets, and errors, which are one message with the wrong value."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import apet
import pytest
import torch
from conversations import collate
from families import FAMILIES, Family, build, shared, takes, twin
from recompute import expected
from running import BOTH, FIRST, STAGES, TOLERANCE, conversation, conversations, judge, say
from torch import nn

BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "keep"),
    ({"keep": 0}, "keep=0"),
    ({"keep": -3}, "keep=-3"),
    ({"keep": 0.0}, r"keep=0\.0"),
    ({"keep": 1.5}, r"keep=1\.5"),
    ({"keep": float("nan")}, "keep=nan"),
    ({"keep": True}, "keep=True"),
    ({"keep": "64"}, "keep='64'"),
    ({"keep": []}, "keep"),
    ({"keep": [9, 0]}, "keep=0"),
    ({"keep": 9, "basis": 0}, "basis=0"),
    ({"keep": 9, "basis": 65, "select": "fps"}, "basis=65"),
    ({"keep": 9, "basis": 2.5}, r"basis=2\.5"),
    ({"keep": 9, "basis": "all"}, "basis='all' is not a whole number, nor 'keep'"),
    ({"keep": 9, "select": "fps"}, "basis='keep' needs select='qr', got select='fps'; give basis in 1..64"),
    ({"keep": 9, "layout": "append"}, "basis='keep' needs layout='inplace', got layout='append'; give basis in 1..64"),
    ({"keep": 9, "basis": "keep", "select": "qr", "layout": "append"}, "needs layout='inplace'"),
    ({"keep": 9, "basis": "keep", "select": "qr", "refine": 9}, "refine=9"),
    ({"keep": 9, "basis": 9, "refine": 1}, "refine=1 needs basis='keep', got basis=9"),
    ({"keep": 9, "layout": "outplace"}, "layout='outplace'"),
    ({"keep": 9, "select": "dpc"}, "select='dpc'"),
    ({"keep": 9, "blend": 0.5}, r"blend=0\.5"),
    ({"keep": 9, "blend": -1.0, "layout": "overwrite", "basis": 4}, "blend=-1"),
    ({"keep": 4, "basis": 4, "layout": "overwrite"}, "keep=4"),
    ({"llm_layer": 2}, "llm_layer=2"),
    ({"keep": 9, "llm_keep": 4}, "llm_keep=4"),
    ({"llm_layer": 0, "llm_keep": 4}, "llm_layer=0"),
    ({"llm_layer": 4, "llm_keep": 4}, "llm_layer=4"),
    ({"llm_layer": -1, "llm_keep": 4}, "llm_layer=-1"),
    ({"llm_layer": 1.5, "llm_keep": 4}, r"llm_layer=1\.5"),
    ({"llm_layer": 2, "llm_keep": 0}, "llm_keep=0"),
    ({"keep": 9, "basis": 3, "layout": "append", "llm_layer": 2, "llm_keep": 4}, "append"),
    ({"preset": "paper-65"}, "preset='paper-65'"),
]


@pytest.mark.parametrize(("options", "says"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_raise(options: dict[str, Any], says: str) -> None:
    """The error comes before anything is patched, and earlier options stay."""
    model = build("llava")
    apet.patch(model, **FIRST)
    with pytest.raises(ValueError, match=says) as error:
        apet.patch(model, **options)
    one_message(error.value)
    assert apet.options(model) == apet.Options(**FIRST)
    with pytest.raises(ValueError, match=says), apet.patched(model, **options):
        pass
    assert apet.options(model) == apet.Options(**FIRST)


def one_message(error: BaseException) -> None:
    text = str(error)
    assert 20 < len(text) < 400
    assert "\n" not in text


def test_unknown_argument() -> None:
    with pytest.raises(TypeError, match="keeps"):
        apet.patch(build("llava"), keeps=9)


@pytest.mark.parametrize("model", [nn.Linear(2, 2), "llava"], ids=["module", "name"])
def test_what_is_no_known_model(model: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=type(model).__name__) as error:
        apet.patch(model, keep=9)
    one_message(error.value)


def test_options_are_frozen_printable_and_comparable() -> None:
    model = build("llava")
    chosen = apet.patch(model, **BOTH)
    assert isinstance(chosen, apet.Options)
    assert dataclasses.is_dataclass(chosen)
    assert chosen == apet.Options(**BOTH)
    assert hash(chosen) == hash(apet.Options(**BOTH))
    for name, value in BOTH.items():
        assert re.search(rf"\b{name}={value!r}", repr(chosen))
    with pytest.raises(dataclasses.FrozenInstanceError):
        chosen.keep = 3


@pytest.mark.parametrize(
    ("name", "preset", "want"),
    [
        ("llava", "paper-192", {"keep": 288, "llm_keep": 96, "llm_layer": 16, "layout": "overwrite"}),
        ("llava", "paper-128", {"keep": 192, "llm_keep": 64, "llm_layer": 16, "layout": "overwrite"}),
        ("llava", "paper-64", {"keep": 96, "llm_keep": 32, "llm_layer": 16, "layout": "overwrite"}),
        ("llava_next", "paper-128", {"keep": 192, "llm_keep": 64, "llm_layer": 16, "layout": "overwrite"}),
        ("llava_next", "paper-64", {"keep": 96, "llm_keep": 32, "llm_layer": 16, "layout": "overwrite"}),
        ("qwen2_5_vl", "paper-0.2", {"keep": 0.3, "llm_keep": 0.333, "llm_layer": 14, "blend": 0.5}),
        ("video_llava", "paper-32", {"keep": 22, "llm_keep": None, "llm_layer": None, "layout": "append"}),
    ],
)
def test_presets(name: str, preset: str, want: dict[str, Any]) -> None:
    """The paper's budgets, for models with as many layers as the paper's."""
    model = build(name, layers=20)
    chosen = apet.patch(model, preset=preset)
    assert {field: getattr(chosen, field) for field in want} == want
    assert (chosen.basis, chosen.select, chosen.refine, chosen.preset) == (10, "fps", 0, preset)
    assert apet.patch(model, preset=preset, basis=7).basis == 7


def test_preset_deeper_than_the_model() -> None:
    with pytest.raises(ValueError, match="llm_layer=16"):
        apet.patch(build("llava"), preset="paper-64")


@pytest.mark.parametrize("refine", [0, 2])
def test_a_basis_of_all_that_is_kept(refine: int) -> None:
    """Both stages run with it, one of which keeps more tokens than are picked one at a time."""
    family, model = FAMILIES["llava"], shared("llava")
    options = {"keep": 24, "llm_layer": 2, "llm_keep": 9, "basis": "keep", "select": "qr", "refine": refine}
    rows = conversations(family)
    with apet.patched(model, **options) as chosen:
        assert chosen.kernel == {"basis": None, "select": "qr", "layout": "inplace", "blend": 1.0, "refine": refine}
        said = say(model, collate(family, rows))
    judge(family, rows, said, options)


# ---- budgets for each image


def test_budgets_of_each_visual(family: Family) -> None:
    """The list is in the order of the prompts, images first, then videos."""
    rows = conversations(family)
    images = [one for row in rows for one in row.visuals if one.kind == "image"]
    videos = [one for row in rows for one in row.visuals if one.kind == "video"]
    keep = [[5, 0.5, 8, 3, 0.9, 7][i] for i in range(len(images) + len(videos))]
    llm_keep = [[0.5, 3, 4, 2, 0.3, 5][i] for i in range(len(images) + len(videos))]
    model = shared(family.name)
    with apet.patched(model, keep=keep, basis=3, llm_layer=2, llm_keep=llm_keep):
        said = say(model, collate(family, rows))
    counted = {"image": 0, "video": len(images)}
    for b, row in enumerate(rows):
        mine: dict[str, list] = {"keep": [], "llm_keep": []}
        for one in row.visuals:
            mine["keep"].append(keep[counted[one.kind]])
            mine["llm_keep"].append(llm_keep[counted[one.kind]])
            counted[one.kind] += 1
        tokens = said.tokens[b, :-1].tolist()
        result = expected(twin(family.name), family, row, tokens, basis=3, llm_layer=2, **mine)
        torch.testing.assert_close(said.logits[b], result.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("wrong", [{"keep": [5]}, {"keep": [5, 5, 5, 5, 5, 5, 5]}])
def test_budgets_for_another_number_of_visuals(family: Family, wrong: dict[str, Any]) -> None:
    rows, model = conversations(family)[:2], shared(family.name)
    with apet.patched(model, basis=3, **wrong):
        with pytest.raises(ValueError, match=rf"{len(wrong['keep'])}.*3|3.*{len(wrong['keep'])}") as error:
            say(model, collate(family, rows))
        one_message(error.value)


# ---- calls that raise


def labels(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    model(**inputs, labels=inputs["input_ids"])


def images_on_a_used_cache(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    out = model(**inputs, use_cache=True)
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    model(**bare, past_key_values=out.past_key_values, use_cache=True)


def another_batch_size(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    out = model(**inputs, use_cache=True)
    model(input_ids=torch.tensor([[5], [6]]), past_key_values=out.past_key_values, use_cache=True)


def a_mask_that_hides(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    L = inputs["input_ids"].shape[1]
    mask = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    mask[..., L - 1, 1] = False  # the last token does not attend to the second
    positions = torch.arange(L)[None]  # passed, since models with M-RoPE would search the mask for padding
    more = {"position_ids": positions.expand(3, 1, L) if family.ragged else positions, "attention_mask": mask}
    model(**{**inputs, **more})


def gradients(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    with torch.enable_grad():
        model(**inputs)


def packed_sequences(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Returns two prompts in one row, with positions that start again."""
    L = inputs["input_ids"].shape[1]
    positions = torch.cat([torch.arange(L), torch.arange(3)])[None]
    given = {name: value for name, value in inputs.items() if name != "attention_mask"}
    given["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([[5, 6, 7]])], dim=1)
    if "mm_token_type_ids" in given:
        given["mm_token_type_ids"] = torch.nn.functional.pad(given["mm_token_type_ids"], (0, 3))
    given["position_ids"] = positions.expand(4, 1, -1) if family.ragged else positions
    model(**given, use_cache=False)


def features_from_outside(family: Family, model: nn.Module, inputs: dict[str, Any]) -> None:
    """Returns a call with features that the caller has got from the model."""
    known = inspect.signature(model.model.get_image_features).parameters
    given = {name: inputs.pop(name) for name in list(inputs) if name in known}
    encoded = model.model.get_image_features(**given, return_dict=True)
    model(**inputs, mm_encoder_outputs={"image": encoded})


CALLS: dict[str, tuple[Callable[..., None], str]] = {
    "labels": (labels, "labels"),
    "new images on a used cache": (images_on_a_used_cache, "cache"),
    "another batch size": (another_batch_size, "batch of 2"),
    "a mask that hides tokens": (a_mask_that_hides, "causal"),
    "gradients": (gradients, "no_grad"),
    "packed sequences": (packed_sequences, "packed"),
    "features from outside": (features_from_outside, "mm_encoder_outputs"),
}


@pytest.mark.parametrize("stage", ["first", "second"])
@pytest.mark.parametrize("call", CALLS)
def test_calls_that_raise(family: Family, call: str, stage: str) -> None:
    """The error is one message, and the next call is right."""
    run, says = CALLS[call]
    if call == "features from outside" and not takes(shared(family.name), "mm_encoder_outputs"):
        pytest.skip("this version takes no encoded features")
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    with apet.patched(model, **STAGES[stage]):
        with pytest.raises((ValueError, RuntimeError), match=says) as error:
            run(family, model, dict(inputs))
        one_message(error.value)
        judge(family, [row], say(model, inputs), STAGES[stage])
