"""Possible changes of transformers: `patch` or the call raises an error that names the difference, or the answers are
right. `mutations/` has the changes, and their errors."""

from __future__ import annotations

import functools
import re
import traceback
import warnings
from pathlib import Path
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import Sample, collate
from families import FAMILIES, build, twin
from mutations import MUTATIONS, Classes, NotThisVersion
from running import STAGES, TOLERANCE, Said, conversations, judge, say
from torch import Tensor
from transformers import PreTrainedModel

CHECKED = ("first", "both")
WRITTEN_FOR = "5.24."  # the mutations edit its source; with other versions some give a model that does not run
OURS = Path(apet.__file__).parent
CASES = [
    pytest.param(name, family, marks=() if family == "llava" else pytest.mark.slow)
    for name, one in MUTATIONS.items()
    for family in one.families
]

# With check=False, `patch` may accept a mutated model. These are the calls whose result is then neither right nor an
# error of this package: "bare" is an error of torch or transformers, which does not name the difference; "wrong" is a
# wrong answer. The list may become shorter, not longer.
UNCHECKED: dict[tuple[str, str, str], str] = {}


@functools.cache
def rows_of(family: str) -> list[Sample]:
    """Returns a batch of three samples: one image, two, and none."""
    return conversations(FAMILIES[family])[:3]


@functools.cache
def inputs_of(family: str) -> dict[str, Tensor]:
    return collate(FAMILIES[family], rows_of(family))


@functools.cache
def unchanged(family: str) -> Said:
    """Returns the output of an unpatched model of the unchanged classes."""
    return say(twin(family), inputs_of(family))


def attempt(model: PreTrainedModel, inputs: dict[str, Tensor], stage: str, check: bool) -> Said | Exception:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with apet.patched(model, check=check, **STAGES[stage]):
                return say(model, inputs)
    except Exception as error:
        return error


def result(outcome: Said | Exception, family: str, stage: str) -> str:
    """Returns "right", "wrong", "says" (an error of this package) or "bare" (another error)."""
    if isinstance(outcome, Exception):
        ours = Path(traceback.extract_tb(outcome.__traceback__)[-1].filename).is_relative_to(OURS)
        return "says" if ours and isinstance(outcome, ValueError) else "bare"
    try:
        judge(FAMILIES[family], rows_of(family), outcome, STAGES[stage])
    except AssertionError:
        return "wrong"
    return "right"


@pytest.mark.parametrize(("name", "family"), CASES)
def test_mutation(name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutation, inputs, before = MUTATIONS[name], inputs_of(family), unchanged(family)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written_for = transformers.__version__.startswith(WRITTEN_FOR)
    outcomes: dict[str, list[Said | Exception]] = {}
    with pytest.MonkeyPatch.context() as changes:
        classes = Classes(family, changes)
        try:
            mutation.apply(classes)
        except NotThisVersion as reason:
            pytest.skip(str(reason))
        model = build(family)
        given: dict[str, Any] = {mutation.inputs.get(n, n): value for n, value in inputs.items()}
        try:
            told = say(model, given)
        except Exception as error:
            if written_for:
                raise
            pytest.skip(f"the change does not fit this version's code: {error}")
        for stage in CHECKED:
            outcomes[stage] = [attempt(model, given, stage, check=True)]
            if isinstance(outcomes[stage][0], Exception):
                outcomes[stage].append(attempt(model, given, stage, check=False))
    if mutation.faithful:
        if not torch.allclose(told.logits, before.logits, rtol=0, atol=TOLERANCE) and not written_for:
            pytest.skip("the change does not fit this version's code: the unpatched model computes something else")
        torch.testing.assert_close(told.logits, before.logits, rtol=0, atol=TOLERANCE)
    assert not classes.edited or not [*tmp_path.rglob("*.json")], "a changed class left the record of a passed check"
    for stage, (first, *second) in outcomes.items():
        says = mutation.says.get(stage)
        assert result(first, family, stage) == ("right" if says is None else "says"), (stage, first)
        assert says is None or re.search(says, str(first)), (stage, first)
        for outcome in second:
            found = result(outcome, family, stage)
            assert UNCHECKED.get((name, family, stage)) == (found if found in ("bare", "wrong") else None), (
                stage,
                found,
                outcome,
            )
