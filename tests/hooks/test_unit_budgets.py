"""Budgets that depend on what units contain: `share=True`, and the guard, `guard="warn" | "raise" | "keep"`."""

from __future__ import annotations

import math
import re
import warnings
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

LIMIT = 0.3
STAGES: dict[str, dict[str, Any]] = {
    "first shared": {"keep": 9, "share": True},
    "both shared": {"keep": 0.5, "llm_layer": 2, "llm_keep": 4, "share": True},
    "first guarded": {"keep": 2, "guard": "keep", "guard_limit": LIMIT},
    "both guarded": {"keep": 0.1, "llm_layer": 2, "llm_keep": 2, "guard": "keep", "guard_limit": LIMIT},
    "shared and guarded": {"keep": 2, "share": True, "guard": "keep", "guard_limit": LIMIT},
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


def dealt(
    sizes: Units, keep: float, call: calls.RecordedCall, share: bool = False, limit: float | None = None
) -> tuple[Units, list[int]]:
    """Returns the budgets of all units, and the usual ones of the call; checks that `share` and `needed` gave them."""
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
    expected = apet_kernels.share(call.x, call.lengths, alone) if share else alone
    if limit is not None:
        expected = apet_kernels.needed(call.x, call.lengths, expected, limit)
    assert call.keeps == expected
    return found, alone


@pytest.mark.parametrize("stage", STAGES)
def test_units_have_budgets_of_their_own(family: Family, stage: str) -> None:
    """Every logit is that of the recompute with the budgets that the units share or need."""
    rows, model, options = conversations(family), shared(family.name), STAGES[stage]
    plain([row for row in rows if row.visuals][-1])
    with apet.patched(model, **options), calls.Recorder() as recorder:
        said = say(model, collate(family, rows))
    names = [name for name in ("keep", "llm_keep") if name in options]
    budgets, sizes, usual = [], in_order(family, rows), []
    limits = [options.get("guard_limit"), None]  # of the stages: the second one has no guard
    for name, call, limit in zip(names, recorder.calls, limits[: len(names)], strict=True):
        sizes, alone = dealt(sizes, options[name], call, "share" in options, limit)
        budgets.append(sizes)
        usual.append(alone)
    assert [call.keeps for call in recorder.calls] != usual
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


@pytest.mark.parametrize("option", [{"share": True}, {"guard": "keep"}], ids=["share", "guard"])
def test_beams_and_other_layouts_raise(option: dict[str, Any]) -> None:
    model, named = shared("llava"), re.escape("=".join(f"{name}={value!r}" for name, value in option.items()))
    inputs = collate(FAMILY, [conversation(FAMILY, 3, "image", 5)])
    with apet.patched(model, keep=9, **option), pytest.raises(ValueError, match=rf"{named} .* num_beams=3"):
        say(model, inputs, num_beams=3)
    with pytest.raises(ValueError, match=rf"{named} needs layout='inplace', got layout='overwrite'"):
        apet.patch(model, keep=9, basis=4, layout="overwrite", **option)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": 3}, "share=3 is neither True nor False"),
        ({"guard": "stop"}, "guard='stop' is none of 'warn', 'raise', 'keep'"),
        ({"guard": True}, "guard=True is none of"),
        ({"guard": "warn", "guard_limit": 0}, "guard_limit=0 is not a number above 0"),
        ({"guard": "warn", "guard_limit": True}, "guard_limit=True is not a number above 0"),
        ({"guard": "raise", "keep": None, "llm_layer": 2, "llm_keep": 4}, "guard='raise' needs keep: only the first"),
        ({"guard_limit": 0.3}, "guard_limit=0.3 needs guard"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apet.patch(shared("llava"), **{"keep": 9, **options})


def guarded(keep: int, guard: str, times: int = 1, **more: Any) -> list[warnings.WarningMessage]:
    """Runs a patched model on one image, some times, and returns the warnings."""
    model = shared("llava")
    inputs = collate(FAMILY, [conversation(FAMILY, 3, "image", 5)])
    with apet.patched(model, keep=keep, guard=guard, **more), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(times):
            say(model, inputs, new=1)
        assert apet.kept(model) is not None
    return found


LITTLE = (
    r"keep=2 is little for 1 of the 1 units \(images, tiles, frames\) of this call: a unit of 36 tokens keeps 2, but "
    r"it would take (\d+) until no dropped token has a squared residual above 0\.3 \(guard_limit\) of the mean square"
)


def test_a_budget_that_is_little_is_told_once_or_raises() -> None:
    (warning,) = guarded(2, "warn", times=2, guard_limit=LIMIT)
    assert issubclass(warning.category, apet.Notice)
    enough = int(re.fullmatch(LITTLE, str(warning.message))[1])
    assert 2 < enough < 36
    with pytest.raises(ValueError, match=LITTLE):
        guarded(2, "raise", guard_limit=LIMIT)
    for guard in ("warn", "raise"):  # so many are enough, and no fewer
        assert not guarded(enough, guard, guard_limit=LIMIT)
    with pytest.raises(ValueError, match=rf"keep={enough - 1} is little"):
        guarded(enough - 1, "raise", guard_limit=LIMIT)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])  # before the projector, and after it
def test_images_that_need_all_of_their_tokens_keep_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is dropped, without a note that `keep` is too large."""
    monkeypatch.setattr(apet_kernels, "needed", lambda x, lengths, keep, limit: list(lengths))
    family, model = FAMILIES[name], shared(name)
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    with warnings.catch_warnings(), apet.patched(model, keep=2, guard="keep"), calls.Recorder() as recorder:
        warnings.simplefilter("error")
        said = say(model, inputs)
    assert not recorder.calls
    assert torch.equal(said.logits, say(model, inputs).logits)
