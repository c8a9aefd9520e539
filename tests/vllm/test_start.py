"""Options at the start of the engine, and those that it rejects."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import Served, picture, prompt


def test_a_request_goes_before_the_start(folder: Callable[[str], Path]):
    """A request's budget replaces that of the start, and may be larger, since memory is reserved for all tokens."""
    served = Served("llava", folder("llava"), {"apet_keep": 16, "apet_basis": 4})
    image = picture(112, 112)
    usual, fewer, more, everything, other = (
        prompt("llava", image, **kwargs)
        for kwargs in ({}, {"apet_keep": 8}, {"apet_keep": 40}, {"apet_keep": 1.0}, {"apet_basis": 10})
    )
    full = served.lengths(everything)[0]
    assert served.lengths(usual, fewer, more, other) == [full - 48, full - 56, full - 24, full - 48]
    assert served.ids(usual) != served.ids(other)
    assert served.ids(usual) == served.ids({**usual, "mm_processor_kwargs": {"apet_keep": 16, "apet_basis": 4}})


def test_qwen_has_to_be_told_at_the_start(folder: Callable[[str], Path]):
    served = Served("qwen2_5_vl", folder("qwen2_5_vl"))
    with pytest.raises(ValueError, match=r"apet_keep=8 in a request needs an engine started with apet_keep"):
        served.ids(prompt("qwen2_5_vl", picture(112, 112), apet_keep=8))
    assert served.model.at_start is None
    assert len(served.ids(prompt("qwen2_5_vl", picture(112, 112)))[0]) == 8


@pytest.mark.parametrize(
    ("name", "at_start", "more", "message"),
    [
        ("llava", {"apet_keep": 0}, {}, "apet_keep=0 is neither a count"),
        ("qwen2_5_vl", {"apet_keep": 8}, {"video_pruning_rate": 0.5}, "video_pruning_rate=0.5 both drop tokens"),
    ],
)
def test_a_start_that_cannot_be_met_raises(folder: Callable[[str], Path], name, at_start, more, message):
    with pytest.raises(ValueError, match=message):
        Served(name, folder(name), at_start, **more)


@pytest.mark.parametrize(
    ("stages", "drafts", "message"),
    [(2, None, "with pipeline_parallel_size=2 later stages get no"), (1, object(), "leave out speculative_config")],
)
def test_qwen_rejects_engines_whose_parts_get_no_positions(stages, drafts, message):
    from apet.vllm.qwen2_vl import Qwen2_5_VL

    model_config = SimpleNamespace(
        multimodal_config=SimpleNamespace(mm_processor_kwargs={"apet_keep": 8}, video_pruning_rate=None)
    )
    parallel = SimpleNamespace(pipeline_parallel_size=stages)
    config = SimpleNamespace(model_config=model_config, parallel_config=parallel, speculative_config=drafts)
    with pytest.raises(ValueError, match=message):
        Qwen2_5_VL(vllm_config=config)
