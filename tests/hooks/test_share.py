"""`share=True`: the units of a call share their budgets."""

from __future__ import annotations

import math
from typing import Any

import apet
import pytest
import torch
from apet import calls
from conversations import Sample, collate
from families import FAMILIES, Family, shared, twin
from recompute import expected, units
from running import TOLERANCE, conversation, conversations, goes_on_at, say

import apet_kernels

STAGES: dict[str, dict[str, Any]] = {
    "first": {"keep": 9},
    "both": {"keep": 0.5, "llm_layer": 2, "llm_keep": 4},
}
FAMILY = FAMILIES["llava"]
Units = dict[tuple[int, int], list[int]]  # of visual i in row b, a number for each of its units


def plain(row: Sample) -> None:
    """Makes the last visual of a row nearly of one colour: with any weights, its tokens say less than another's."""
    row.visuals[-1].pixels.mul_(0.1).add_(1.0)


def in_order(family: Family, rows: list[Sample]) -> Units:
    """Returns the tokens of all units of a call, in the order of the call: images first, then videos."""
    found = {}
    for kind in ("image", "video"):
        for b, row in enumerate(rows):
            for i, one in enumerate(row.visuals):
                if one.kind == kind:
                    found[b, i] = [len(unit) for unit in units(twin(family.name), family, one)]
    return found


def dealt(sizes: Units, keep: float, call: calls.RecordedCall) -> tuple[Units, list[int]]:
    """Returns the budgets of all units, and of the call without sharing; checks that `share` dealt them."""
    lengths, keeps, alone = iter(call.lengths), iter(call.keeps), []
    found: Units = {}
    for at, of_visual in sizes.items():
        found[at] = []
        for n in of_visual:
            k = max(1, math.floor(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
            if k < n:
                assert next(lengths) == n
                alone.append(k)
            found[at].append(next(keeps) if k < n else n)
    assert call.keeps == apet_kernels.share(call.x, call.lengths, alone)
    return found, alone


@pytest.mark.parametrize("stage", STAGES)
def test_units_share_their_budgets(family: Family, stage: str) -> None:
    """Every logit is that of the recompute with the budgets that the units share."""
    rows, model, options = conversations(family), shared(family.name), STAGES[stage]
    plain([row for row in rows if row.visuals][-1])
    with apet.patched(model, **options, share=True), calls.Recorder() as recorder:
        said = say(model, collate(family, rows))
    names = [name for name in ("keep", "llm_keep") if name in options]
    budgets, sizes, unshared = [], in_order(family, rows), []
    for name, call in zip(names, recorder.calls, strict=True):
        sizes, alone = dealt(sizes, options[name], call)
        budgets.append(sizes)
        unshared.append(alone)
    assert [call.keeps for call in recorder.calls] != unshared
    for b, row in enumerate(rows):
        mine = {
            name: [iter(of[b, i]) for i in range(len(row.visuals))] for name, of in zip(names, budgets, strict=True)
        }
        more = {"llm_layer": 2} if "llm_layer" in options else {}
        tokens = said.tokens[b, :-1].tolist()
        result = expected(twin(family.name), family, row, tokens, goes_on_at(family, row), **mine, **more)
        torch.testing.assert_close(said.logits[b], result.logits, rtol=0, atol=TOLERANCE)


def test_without_it_an_image_does_not_depend_on_the_call() -> None:
    """And with it, it does; alone it keeps what it would without."""
    model = shared("llava")
    row, other = (conversation(FAMILY, 3, "image", 5, seed=seed) for seed in (1, 2))
    plain(other)
    kept = {}
    for share in (False, True):
        for rows in ([row], [row, other]):
            with apet.patched(model, keep=9, share=share):
                say(model, collate(FAMILY, rows), new=1)
                kept[share, len(rows)] = apet.kept(model).visuals[0].remaining[0].tolist()
    assert kept[False, 1] == kept[False, 2] == kept[True, 1] != kept[True, 2]


def test_beams_and_other_layouts_raise() -> None:
    model = shared("llava")
    inputs = collate(FAMILY, [conversation(FAMILY, 3, "image", 5)])
    with apet.patched(model, keep=9, share=True), pytest.raises(ValueError, match=r"share=True .* num_beams=3"):
        say(model, inputs, num_beams=3)
    with pytest.raises(ValueError, match="share=True needs layout='inplace', got layout='overwrite'"):
        apet.patch(model, keep=9, basis=4, layout="overwrite", share=True)
    with pytest.raises(ValueError, match="share=3 is neither True nor False"):
        apet.patch(model, keep=9, share=3)
