"""Prefix cache, encoder cache, batches: the result of a request does not depend on other requests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import plain
import pytest
from engines import MODELS, Served, picture, prompt

EVERY = pytest.mark.parametrize("served", MODELS, indirect=True)
TEXTS = [
    text * (60 // len(text)) for text in ("what is it? ", "what? ", "who? ", "where is the cat? ", "?", "how many? ")
]


def alone(served: Served, request: dict[str, Any]) -> list[int]:
    served.forget()
    (ids,) = served.ids(request)
    return ids


@pytest.fixture
def without_plugin(served: Served, folder: Any) -> list[list[int]]:
    """Returns the output of vLLM alone, for the model that is served."""
    done = subprocess.run(
        [sys.executable, Path(plain.__file__), served.name, folder(served.name)],
        env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@EVERY
def test_all_tokens_give_what_vllm_gives(served, without_plugin):
    """Without a budget (models with M-RoPE have one at their start), and with a budget of all tokens."""
    requests = plain.requests(served.name)
    assert served.ids(*requests) == without_plugin
    served.forget()
    everything = [{**r, "mm_processor_kwargs": {"apet_keep": 100000}} for r in requests]
    assert served.ids(*everything) == without_plugin


@EVERY
def test_an_image_with_other_budgets(served):
    """One image several times, with full caches: every budget gives the result that it gives with empty caches."""
    image, wanted = picture(150, 280), []
    asked = [{}, {"apet_keep": 8}, {"apet_keep": 8, "apet_layout": "overwrite", "apet_basis": 4}, {"apet_keep": 0.3}]
    for text in TEXTS:  # until every budget has another answer
        requests = [prompt(served.name, image, text=text, **kwargs) for kwargs in asked]
        expected = [alone(served, request) for request in requests]
        wanted.append((len({tuple(ids) for ids in expected}), requests, expected))
        if wanted[-1][0] == len(asked):
            break
    most, requests, expected = max(wanted, key=lambda one: one[0])
    assert most >= len(asked) - 1
    served.forget()
    for _ in range(2):
        assert [served.ids(request)[0] for request in requests] == expected
    (output,) = served.outputs(requests[1])
    # The blocks of linear attention are longer than these prompts.
    block = served.llm.llm_engine.vllm_config.cache_config.block_size
    assert (output.num_cached_tokens > 0) == (len(output.prompt_token_ids) > block)


@EVERY
def test_an_image_under_one_name_with_other_budgets(served):
    """The name that a client gives an image is not the whole key."""
    image, name = picture(150, 280), {"multi_modal_uuids": {"image": ["cat"]}}
    requests = [prompt(served.name, image, **kwargs) | name for kwargs in ({}, {"apet_keep": 8}, {"apet_keep": 20})]
    expected = [alone(served, request) for request in requests]
    served.forget()
    assert [served.ids(request)[0] for request in requests] == expected


@EVERY
def test_an_image_seen_before_is_not_encoded_again(served):
    """The encoder cache is hit, so nothing is encoded or compressed. Other text before the image misses the prefix."""
    first, second = (prompt(served.name, picture(150, 280), before=text, apet_keep=8) for text in ("one ", "two "))
    expected = alone(served, second)
    served.forget()
    with served.watched() as seen:
        served.ids(first)
        encoded = len(seen.tower)
        assert served.ids(second) == [expected]
        assert len(seen.tower) == encoded == 1
        served.ids({**second, "mm_processor_kwargs": {"apet_keep": 9}})
        assert len(seen.tower) == 2


@EVERY
def test_equal_budgets_are_one_in_the_caches(served):
    """Equal budgets may be written in different ways."""
    image = picture(150, 280)
    served.ids(prompt(served.name, image, before="one ", apet_keep=8))
    with served.watched() as seen:
        served.ids(prompt(served.name, image, before="two ", apet_keep=8, apet_basis="keep", apet_layout="inplace"))
    assert seen.tower == []


@EVERY
def test_many_requests_at_once(served):
    """Ten requests of different sizes, numbers of images, budgets and layouts, batched by vLLM."""
    sizes = [(112, 112), (90, 300), (260, 130), (40, 60), (150, 280)]
    replaced = {"apet_keep": 14, "apet_layout": "overwrite", "apet_basis": 10}
    requests = []
    for i in range(10):
        images = [picture(*sizes[(i + j) % 5], i + j) for j in range(i % 3)]
        kwargs = [{}, {"apet_keep": 5 + i}, {"apet_keep": 0.3}, replaced][i % 4]
        requests.append(prompt(served.name, *images, text=f"what is {i}?", **(kwargs if images else {})))
    expected = []
    for request in requests:
        served.forget()
        expected += served.outputs(request)
    # Where bfloat16 makes ties, the comparison still distinguishes nearly all requests.
    assert sum(served.same(one, other) for one in expected for other in expected) <= len(expected) + 2
    served.forget()
    for order in (requests, requests[::-1]):
        found = served.outputs(*order)
        assert all(map(served.same, found, expected if order is requests else expected[::-1]))


BAD = [
    ({"apet_keep": 0}, "apet_keep=0 is neither a count"),
    ({"apet_keep": -3}, "apet_keep=-3 is neither a count"),
    ({"apet_keep": 1.5}, r"apet_keep=1.5 is neither a count .* nor a ratio"),
    ({"apet_keep": "64"}, "apet_keep='64' is neither a count"),
    ({"apet_keep": True}, "apet_keep=True is neither a count"),
    ({"apet_keep": [8, 16]}, r"apet_keep=\[8, 16\] must be one count or ratio"),
    ({"apet_keep": 8, "apet_basis": 65, "apet_select": "fps"}, "apet_basis=65 is outside 1..64"),
    ({"apet_keep": 8, "apet_basis": 2.5}, "apet_basis=2.5 is not a whole number"),
    ({"apet_keep": 8, "apet_layout": "overwrite", "apet_basis": 10}, "apet_layout='overwrite' needs keep > basis"),
    ({"apet_keep": 8, "apet_layout": "append"}, "apet_layout='append' is not supported"),
    ({"apet_keep": 8, "apet_layout": 3}, "apet_layout=3 is not a name"),
    ({"apet_keep": 8, "apet_blend": 2}, "apet_blend=2 is outside 0..1"),
    ({"apet_keep": 8, "apet_blend": "x"}, "apet_blend='x' is not a number"),
    ({"apet_keep": 8, "apet_select": "best"}, "apet_select='best' is none of fps, qr"),
    ({"apet_keep": 8, "apet_least": 4}, "apet_least=4 bounds a ratio, but apet_keep=8 is not a ratio"),
    ({"apet_keep": 0.5, "apet_most": 0}, "apet_most=0 is not a count"),
    ({"apet_keep": 0.5, "apet_least": 9, "apet_most": 8}, "apet_least=9 exceeds apet_most=8"),
    ({"apet_max_tokens": 2.5}, "apet_max_tokens=2.5 is not a count"),
    (
        {"apet_max_tokens": 8, "apet_layout": "overwrite", "apet_basis": 10},
        "leaves 8 tokens to an image or video that needs at least 11",
    ),
    ({"apet_keep": 8, "apet_budget": 8}, "apet_budget is not an option of ApET; these are: apet_keep"),
    ({"apet_keep": 8, "images_kwargs": {"apet_keep": 4}}, "options directly into mm_processor_kwargs"),
]


@pytest.mark.parametrize("served", ["llava"], indirect=True)
@pytest.mark.parametrize(("kwargs", "message"), BAD)
def test_what_cannot_be_met_raises(served, kwargs, message):
    """The request gets an error message, and the engine continues."""
    with pytest.raises(ValueError, match=message):
        served.ids(prompt("llava", picture(112, 112), **kwargs))
    assert len(served.ids(prompt("llava", picture(112, 112), apet_keep=8))[0]) == 8


@pytest.mark.parametrize("served", ["llava"], indirect=True)
def test_null_is_not_asked(served):
    image = picture(112, 112)
    plain_, null = served.lengths(prompt("llava", image), prompt("llava", image, apet_keep=None))
    assert plain_ == null
    assert served.lengths(prompt("llava", image, apet_keep=None, apet_basis=5)) == [null]
    with pytest.raises(ValueError, match="apet_basis=5 needs apet_keep"):
        served.ids(prompt("llava", image, apet_basis=5))
