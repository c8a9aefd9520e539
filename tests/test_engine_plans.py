"""What the plugins for inference engines share: budgets of units, and encoded plans. More: tests/vllm, tests/sglang."""

from __future__ import annotations

import pytest
import torch
from apet.engines import options, plan


def wanted(**kwargs: object) -> options.Wanted:
    found = options.of({f"apet_{name}": value for name, value in kwargs.items()})
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("given", "lengths", "staying", "kept"),
    [
        ({"keep": 12}, [64, 8], 0, [12, 8]),
        ({"keep": 0.25}, [64, 6, 1], 0, [16, 2, 1]),
        ({"keep": 0.25, "least": 4}, [64, 6, 1], 0, [16, 4, 1]),
        ({"keep": 0.25, "most": 10}, [64, 16], 0, [10, 4]),
        ({"keep": 0.5, "least": 6, "most": 20, "layout": "overwrite", "basis": 4}, [100, 8], 0, [20, 6]),
        ({"max_tokens": 100}, [64, 8], 0, [64, 8]),
        ({"max_tokens": 20}, [64, 8], 0, [17, 3]),
        ({"max_tokens": 20}, [64, 8], 10, [8, 2]),
        ({"keep": 12, "max_tokens": 9}, [64, 64, 64], 0, [3, 3, 3]),
        ({"keep": 12, "max_tokens": 10}, [64, 64, 64], 0, [3, 3, 4]),
        ({"max_tokens": 3}, [64, 64, 64], 0, [1, 1, 1]),
        ({"max_tokens": 12, "layout": "overwrite", "basis": 3}, [64, 2, 64], 0, [5, 2, 5]),
    ],
)
def test_budgets_of_units(given, lengths, staying, kept):
    found = wanted(**given).kept(lengths, staying)
    assert found == kept
    assert sum(found) + staying <= given.get("max_tokens", sum(lengths) + staying)


def test_a_cap_below_what_units_need_raises():
    with pytest.raises(ValueError, match="leaves 5 tokens to an image or video that needs at least 7: 1 for each of 3"):
        wanted(max_tokens=5).kept([64, 64, 64], 4)


def test_a_plan_as_it_travels():
    units = torch.tensor([0, 0, 1, -1, 0, 1, 1, -1])
    made = plan.make(
        wanted(keep=2, basis=1, select="qr", blend=0.3, layout="overwrite"), units, torch.arange(8) * 3, 30
    )
    assert made.lengths == [3, 3]
    assert made.order.tolist() == [0, 1, 4, 2, 5, 6]
    assert made.removed.nonzero()[:, 0].tolist() == [4, 6]
    assert (made.gone, made.rows) == (2, 6)
    medoids = wanted(keep=2, basis="keep", select="qr", refine=2)
    assert (medoids.kernel["basis"], medoids.kernel["refine"]) == (None, 2)
    for sent in (made, plan.make(wanted(keep=0.5), units), plan.make(medoids, units)):
        got = plan.unpack(sent.pack())
        assert (got.kernel, got.kept, got.features) == (sent.kernel, sent.kept, sent.features)
        assert torch.equal(got.units, sent.units)
        assert (got.sources is None) == (sent.sources is None)
        assert sent.sources is None or torch.equal(got.sources, sent.sources)


@pytest.mark.parametrize(
    ("name", "value"), [("positions", "keep"), ("distinct", 2.0), ("relevance", 0.5), ("share", True)]
)
def test_options_of_patch_that_engines_do_not_have(name: str, value: object) -> None:
    """Their schedulers number and count tokens before images are encoded."""
    with pytest.raises(ValueError, match=f"apet_{name} is not an option of ApET; these are: apet_keep"):
        wanted(keep=8, **{name: value})
