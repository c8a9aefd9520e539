"""Options at the start of the engine, and those that it rejects."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from engines import Served, picture, prompt, video


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
    parallel, lora = SimpleNamespace(pipeline_parallel_size=stages), SimpleNamespace(enable_tower_connector_lora=False)
    config = SimpleNamespace(
        model_config=model_config, parallel_config=parallel, speculative_config=drafts, lora_config=lora
    )
    with pytest.raises(ValueError, match=message):
        Qwen2_5_VL(vllm_config=config)
    lora.enable_tower_connector_lora = True
    with pytest.raises(ValueError, match="LoRA on the vision tower or the projector"):
        Qwen2_5_VL(vllm_config=config)


@pytest.mark.parametrize("served", ["llava"], indirect=True)
def test_lora_that_reaches_the_encoder_is_rejected(served, monkeypatch):
    """vLLM would apply it to as many rows as are kept."""
    lora = SimpleNamespace(enable_tower_connector_lora=True)
    processor = served.llm.llm_engine.input_processor
    image = picture(112, 112)
    given, whole = (processor.renderer.render_cmpl([prompt("llava", image, **kw)])[0] for kw in ({"apet_keep": 8}, {}))
    monkeypatch.setattr(processor, "lora_config", lora)
    processor._validate_model_input(whole, "decoder")
    with pytest.raises(ValueError, match="LoRA on the vision tower or the projector"):
        processor._validate_model_input(given, "decoder")


def test_row_ends_need_the_language_model():
    from apet.vllm.mistral3 import Mistral3

    multimodal = SimpleNamespace(mm_processor_kwargs={"apet_keep": 8}, mm_encoder_only=True)
    config = SimpleNamespace(model_config=SimpleNamespace(multimodal_config=multimodal), lora_config=None)
    with pytest.raises(ValueError, match="with mm_encoder_only there is no language model"):
        Mistral3(vllm_config=config)


def test_a_vllm_of_another_form_is_left_alone(monkeypatch, caplog):
    """What is missing is logged, since an error would end engines that do not use the plugin."""
    import apet.vllm
    from apet.engines.versions import check
    from apet.vllm import budget, versions

    check("vLLM", versions.USED)
    called = []
    monkeypatch.setattr(budget, "count_whole_items", lambda: called.append(1))
    monkeypatch.setitem(versions.USED, f"{versions.PROCESSOR}._get_mm_hashes", ("inputs", "more"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    apet.vllm.register()
    assert "_get_mm_hashes of this version of vLLM has no more. The plugin is off" in caplog.text
    assert not called


def test_models_without_compression_reject_the_options(folder: Callable[[str], Path]):
    """vLLM would ignore them, and give an answer with all tokens."""
    from vllm.multimodal.processing import InputProcessingContext

    with pytest.raises(ValueError, match=r"apet_keep=8: apet does not compress \w*MultiModal\w*; docs/engines.md"):
        Served("llava", folder("llava"), {"apet_keep": 8}, model_impl="transformers")

    multimodal = SimpleNamespace(merge_mm_processor_kwargs=lambda kwargs: dict(kwargs))
    config = SimpleNamespace(architecture="PixtralForConditionalGeneration", get_multimodal_config=lambda: multimodal)
    context = InputProcessingContext(config, None)
    with pytest.raises(ValueError, match=r"apet_keep=0\.25: apet does not compress PixtralForConditionalGeneration"):
        context.get_merged_mm_kwargs({"apet_keep": 0.25})
    with pytest.raises(ValueError, match="apet_kep is not an option of ApET"):
        context.get_merged_mm_kwargs({"apet_kep": 4})
    assert context.get_merged_mm_kwargs({"apet_keep": None, "size": 7})["size"] == 7


def test_an_engine_without_options_rejects_what_another_one_has_shortened():
    import torch
    from apet.engines import options, plan
    from apet.vllm.qwen2_vl import Qwen2_5_VL

    made = plan.make(options.of({"apet_keep": 4}), torch.zeros(16, dtype=torch.int64))
    feature = SimpleNamespace(data={plan.FIELD: SimpleNamespace(data=made.pack())})
    model = Qwen2_5_VL.__new__(Qwen2_5_VL)
    torch.nn.Module.__init__(model)
    model.at_start = None
    with pytest.raises(RuntimeError, match="was started without apet_keep"):
        model.get_mrope_input_positions([1, 2, 3], [feature])


@pytest.mark.parametrize("name", ["qwen2_vl:Qwen2VL", "glm4v:Glm4v", "qwen2_vl:Qwen2_5_VL"])
def test_only_instances_with_options_have_pruning(name: str):
    """vLLM would ask the others for positions that only some of its models can give."""
    module, _, kind = name.partition(":")
    ours = getattr(importlib.import_module(f"apet.vllm.{module}"), kind)
    theirs = next(base for base in ours.__mro__ if base.__module__.startswith("vllm.model_executor.models"))
    found = [getattr(cls, "supports_multimodal_pruning", False) for cls in (ours, theirs)]
    assert found[0] == found[1]


def test_an_engine_without_options_answers_after_what_another_one_has_shortened(folder: Callable[[str], Path]):
    """The request is rejected before it reaches the model, where the error would stop the engine."""
    import torch
    from apet.engines import options, plan
    from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem

    served = Served("qwen2_5_vl", folder("qwen2_5_vl"))
    request = prompt("qwen2_5_vl", picture(112, 112))
    processor = served.llm.llm_engine.input_processor
    given = processor.renderer.render_cmpl([request])[0]
    (item,) = given["mm_kwargs"]["image"]
    made = plan.make(options.of({"apet_keep": 4}), torch.zeros(16, dtype=torch.int64))
    processor._validate_model_input(given, "decoder")
    item[plan.FIELD] = MultiModalFieldElem(made.pack(), MultiModalBatchedField(keep_on_cpu=True))
    with pytest.raises(ValueError, match="the image was shortened with apet_keep, but this engine was started without"):
        processor._validate_model_input(given, "decoder")
    assert len(served.ids(request)[0]) == 8


@pytest.mark.parametrize("served", ["qwen2_5_vl", "qwen3_vl"], indirect=True)
@pytest.mark.parametrize("options", [{"apet_keep": 0.25}, {"apet_keep": 1}, {"apet_keep": 1.0, "apet_most": 4}])
def test_placeholders_in_the_text_raise(served, options):
    """The places of embeddings are found by them; without compression they are text. The same media can be sent
    again."""
    film = [video(4, 112, 112)]
    for kind, media in (("image", {"videos": film}), ("video", {"images": [picture(112, 112)]})):
        images, videos = media.get("images", []), media.get("videos", [])
        request = prompt(served.name, *images, videos=videos, before=f"what is <|{kind}_pad|>? ", **options)
        for _ in range(2):
            with pytest.raises(ValueError, match="1 tokens of images or videos"):
                served.ids(request)
        assert len(served.ids(prompt(served.name, *images, videos=videos, **options))[0]) == 8
        request["mm_processor_kwargs"] = {"apet_keep": 1.0}
        assert len(served.ids(request)[0]) == 8


@pytest.mark.parametrize("served", ["qwen2_5_vl"], indirect=True)
def test_prompt_embeds_beside_images_raise(served):
    """They would have no positions, and stop the engine. vLLM's renderer adds them to a request under this key."""
    engine, request = served.llm.llm_engine, prompt(served.name, picture(112, 112), apet_keep=8)
    processor = engine.input_processor
    given = processor.renderer.render_cmpl([request])[0]
    assert "image" in given["mm_kwargs"]
    processor._validate_model_input(given, "decoder")
    given["mm_kwargs"] = {**given["mm_kwargs"], "prompt_embeds": [None]}
    with pytest.raises(ValueError, match="prompt_embeds beside images or videos are not supported with apet_keep"):
        processor._validate_model_input(given, "decoder")
    assert len(served.ids(request)[0]) == 8


@pytest.mark.parametrize("served", ["qwen3_vl"], indirect=True)
def test_a_rate_for_each_video(served):
    """vLLM resolves the options of such a request; those of the plugin must stay among them."""
    film = [video(8, 112, 112)]
    plain, each = (prompt(served.name, videos=film, apet_keep=0.25, **more) for more in ({}, {"fps": [2.0]}))
    (expected,) = served.lengths(plain)
    served.forget()
    assert served.lengths(each, each) == [expected, expected]
    whole = served.lengths(prompt(served.name, videos=film, fps=[2.0]))[0]
    assert whole > expected
