"""Models without an adapter in the package, made usable by `apet.register_adapter`, as docs/hooks.md describes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import apet
import pytest
import torch
from conversations import collate
from families import OTHERS, Family, build, shared
from postcard import PATCHES
from running import BOTH, STAGES, conversation, conversations, judge, say
from torch import Tensor, nn


class Postcards(apet.Adapter):
    """The detail of `postcard.py` that cannot be detected: the first token of an image is always kept."""

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Tensor]]:
        image = torch.cat([torch.tensor([-1]), apet.one_unit(PATCHES)])
        return {"image": [image] * (counts["image"] // len(image))}


class PostcardsBeforeMix(Postcards):
    """The adapter of the same model, compressed before `mix`."""

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
