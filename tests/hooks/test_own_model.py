"""Models that no adapter of the package knows, made usable by `apet.register_adapter`, as docs/hooks.md describes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import apet
import pytest
import torch
from conversations import collate
from families import IMAGE, OTHERS, Family, build, shared
from postcard import PATCHES
from running import BOTH, FIRST, STAGES, conversation, conversations, judge, say
from torch import Tensor, nn
from transformers import PreTrainedModel


class Postcards(apet.Adapter):
    """All that `postcard.py` needs: where its parts are, and that the first token of an image stays."""

    tokens: ClassVar[Mapping[str, str]] = {"image": "image_token_id"}

    def core(self, model: nn.Module) -> nn.Module:
        return model.album

    def language_model(self, core: nn.Module) -> nn.Module:
        return core.reader

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Tensor]]:
        image = torch.cat([torch.tensor([-1]), apet.one_unit(PATCHES)])
        return {"image": [image] * (counts["image"] // len(image))}


class PostcardsBeforeMix(Postcards):
    """The same, compressed before `mix`."""

    projector = "mix"


CASES = {
    "aya_vision": (OTHERS["aya_vision"], apet.Adapter()),
    "postcard": (OTHERS["postcard"], Postcards()),
    "postcard before mix": (dataclasses.replace(OTHERS["postcard"], projector="mix"), PostcardsBeforeMix()),
}


@pytest.fixture(params=list(CASES))
def other(request: pytest.FixtureRequest) -> Family:
    family, adapter = CASES[request.param]
    apet.register_adapter(family.name, adapter)
    return family


def test_unknown_model_says_what_to_do() -> None:
    class Stamp(PreTrainedModel):
        pass

    model = build("llava")
    model.config.model_type = "stamp"
    with pytest.raises(ValueError, match=r"model_type='stamp'.*register_adapter"):
        apet.patch(model, keep=9)


@pytest.mark.parametrize("stage", STAGES)
def test_batch(other: Family, stage: str) -> None:
    rows, model = conversations(other), shared(other.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(other, rows))
    judge(other, rows, said, STAGES[stage])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_single(other: Family, stage: str, cached: bool) -> None:
    row, model = conversation(other, 2, "image1", 3, "image2", 4), shared(other.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(other, [row]), use_cache=cached)
    judge(other, [row], said, STAGES[stage])


def test_static_cache(other: Family) -> None:
    rows, model = conversations(other), shared(other.name)
    with apet.patched(model, **BOTH):
        said = say(model, collate(other, rows), cache_implementation="static")
    judge(other, rows, said, BOTH)


def test_eager(other: Family) -> None:
    rows, model = conversations(other), shared(other.name, "eager")
    with apet.patched(model, **BOTH):
        said = say(model, collate(other, rows))
    judge(other, rows, said, BOTH)


def test_keeping_all_and_unpatching(other: Family) -> None:
    rows, model = conversations(other), shared(other.name)
    before = say(model, collate(other, rows))
    with apet.patched(model, keep=1.0, llm_layer=2, llm_keep=1.0):
        during = say(model, collate(other, rows))
    after = say(model, collate(other, rows))
    assert torch.equal(before.logits, during.logits)
    assert torch.equal(before.logits, after.logits)


def test_copy(other: Family) -> None:
    rows, model = conversations(other), build(other.name)
    apet.patch(model, **BOTH)
    again = copy.deepcopy(model)
    apet.unpatch(model)
    judge(other, rows, say(again, collate(other, rows)), BOTH)
    judge(other, rows, say(model, collate(other, rows)), {})


def test_images_that_see_ahead_raise() -> None:
    """In Gemma 3 the tokens of an image see each other both ways: no adapter can promise that of what is left. And its
    layers turn their keys by two different rotary embeddings."""
    apet.register_adapter("gemma3", apet.Adapter())
    model = build("gemma3")
    ids = torch.tensor([[5, 6, *[IMAGE] * 36, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": (ids == IMAGE).long()}
    inputs["pixel_values"] = torch.randn(1, 3, 48, 48)
    before = say(model, inputs)
    with apet.patched(model, **FIRST), pytest.raises(ValueError, match="causal"):
        say(model, inputs)
    with pytest.raises(ValueError, match=r"llm_layer=2 .* rotary"):
        apet.patch(model, **BOTH)
    assert torch.equal(say(model, inputs).logits, before.logits)
