"""The encoder's budget, the cap on all visual tokens of a request, and the counters for `/metrics`."""

from __future__ import annotations

import pytest
import tiny
import torch
from engines import ENGINE, MODELS, picture, prompt, video, visual
from prometheus_client import REGISTRY

LLAVA = pytest.mark.parametrize("served", ["llava"], indirect=True)


@LLAVA
def test_the_encoder_gets_as_many_images_as_without_compression(served):
    """Four images of 64 tokens, 8 kept of each: their prompts fit into a step of 96 tokens, two images do not."""
    images = [picture(112, 112, seed) for seed in range(4)]
    with served.watched() as seen:
        served.ids(*(prompt("llava", image, text="?", apet_keep=8) for image in images))
        served.ids(prompt("llava", *images, text="!", apet_keep=9))
    passes = [len(features) for features in seen.tower]
    assert sum(passes) == 8
    assert max(passes) * tiny.TILE <= ENGINE["max_num_batched_tokens"]


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_a_video_that_the_encoder_cannot_take_raises(served):
    """Its budget counts tokens before compression. Such a video would never be scheduled, and the request never end."""
    budget = served.llm.llm_engine.input_processor.mm_encoder_cache_size
    short, long = (video(2 * steps, 56, 56) for steps in (budget // 4 - 1, budget // 4 + 1))  # of 4 tokens a step
    assert len(served.ids(prompt(served.name, videos=[short], apet_keep=1))[0]) == 8
    for _ in range(2):  # the second time, vLLM would not send what it believes the engine to have
        with pytest.raises(ValueError, match=rf"tokens before compression, and the encoder's budget\s+is {budget}"):
            served.ids(prompt(served.name, videos=[long], apet_keep=1))
    assert len(served.ids(prompt(served.name, picture(112, 112), apet_keep=8))[0]) == 8


@pytest.mark.parametrize("served", ["pixtral", "mistral3"], indirect=True)
def test_the_largest_image_of_a_model_with_row_ends(served):
    """The encoder makes no rows for the tokens at the ends of its rows."""
    image = picture(2 * tiny.SIDE, 2 * tiny.SIDE)
    rows = served.lengths(prompt(served.name, image, apet_keep=1.0))[0]
    assert served.llm.llm_engine.input_processor.mm_encoder_cache_size < rows
    assert len(served.ids(prompt(served.name, image, apet_keep=8))[0]) == 8


@pytest.mark.parametrize("served", MODELS, indirect=True)
def test_a_cap_on_a_request_is_shared_by_its_images(served):
    """The cap is shared equally, so that an image keeps the same tokens beside any other; in an image, by units."""
    one, two = picture(112, 112), picture(90, 300, 1)
    ids, _, embeds, _ = served.read(prompt(served.name, one, apet_max_tokens=40))
    both, _, read, _ = served.read(prompt(served.name, one, two, apet_max_tokens=80))
    rows = {*visual(served.name), tiny.BREAK, tiny.LAST}
    alone, together = (sum(token in rows for token in prompt_) for prompt_ in (ids, both))
    whole = [sum(token in rows for token in served.read(prompt(served.name, i, apet_keep=1.0))[0]) for i in (one, two)]
    assert alone == min(40, whole[0])
    assert together == alone + min(40, whole[1])
    end = 1 + max(column for column, token in enumerate(ids) if token in rows)
    assert both[:end] == ids[:end]
    torch.testing.assert_close(read[:end], embeds[:end])


@LLAVA
def test_a_cap_that_is_too_small_raises(served):
    images = [picture(112, 112, seed) for seed in range(3)]
    with pytest.raises(ValueError, match="apet_max_tokens=2 is less than one for each of 3 images"):
        served.ids(prompt("llava", *images, apet_max_tokens=2))
    (length,) = served.lengths(prompt("llava", *images, apet_max_tokens=3))
    assert length == served.lengths(prompt("llava", *images, apet_keep=1))[0]


@LLAVA
def test_tokens_are_counted_for_prometheus(served):
    """Tokens of a cached image count too, those of requests without compression do not."""

    def counted() -> tuple[float, float]:
        names = (f"apet:visual_tokens_{when}_total" for when in ("before", "after"))
        return tuple(REGISTRY.get_sample_value(name, {"modality": "image"}) or 0 for name in names)

    before, after = counted()
    served.ids(prompt("llava", picture(112, 112)))
    assert counted() == (before, after)
    for times in (1, 2):
        served.ids(prompt("llava", picture(112, 112), picture(90, 300, 1), apet_keep=8))
        assert counted() == (before + times * 2 * tiny.TILE, after + times * 2 * 8)
