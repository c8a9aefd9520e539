"""Every type of model of transformers: the statements of docs/models.md are tested."""

from __future__ import annotations

import json
from pathlib import Path

import apet
import pytest
import torch
import transformers
from apet.hooks import reference, selfcheck, tiny
from apet.hooks.selfcheck import NAMES

from tools import models_table

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="configurations of transformers 4 are shrunk for the families with an adapter alone (test_selfcheck.py)",
)

DAILY = (
    *("llava", "llava_onevision", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "gemma3", "gemma4", "internvl", "mistral3"),
    *("smolvlm", "florence2", "mllama", "qwen2_audio"),
)
TABLE = json.loads((models_table.DOCS / "models.json").read_text())
# Models with another decoder than the default of their type.
OTHER_DECODERS = {
    ("internvl", "qwen3_moe"): "both",
    ("llava", "gemma3_text"): "both",
    ("paligemma", "gemma2"): "both",
    ("mistral3", "ministral3"): "both",
    ("llava_next", "mistral"): "both",
}


def types(names: list[str]) -> list:
    return [pytest.param(name, marks=() if name in DAILY else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", types(sorted(TABLE)))
def test_type(name: str) -> None:
    """The cells of the table are right; a type that is not supported raises an error with its reason."""
    said = TABLE[name]
    if said.get("reason") == models_table.UNTRIED:
        pytest.skip("the table does not have it yet")
    if name not in NAMES or said["transformers"] != transformers.__version__:
        pytest.skip(f"the table is of transformers {said['transformers']}")
    found = models_table.try_type(name)
    assert found.get("reason") == said.get("reason")
    kinds, expected = ({c: sorted(v) for c, v in one.get("cells", {}).items()} for one in (found, said))
    assert kinds == expected


def test_every_type_is_in_the_table() -> None:
    missing = [name for name in NAMES if name not in TABLE]
    newer = transformers.__version__ not in {one["transformers"] for one in TABLE.values()}
    assert newer or not missing


def test_nothing_is_wrong() -> None:
    for name, one in TABLE.items():
        assert not any("wrong" in cell for cell in one.get("cells", {}).values()), name
        assert "cells" in one or one["reason"], name


def test_the_page_is_that_of_the_table() -> None:
    text = Path(models_table.DOCS / "models.md").read_text()
    assert models_table.page(TABLE).strip() in text


def test_other_pages_say_the_same_numbers() -> None:
    first, both = (sum(models_table.verified(one, stage) for one in TABLE.values()) for stage in ("first", "both"))
    readme, status = (
        " ".join((models_table.DOCS / name).read_text().split()) for name in ("../README.md", "status.md")
    )
    assert f"**{first} of the {len(TABLE)} types**" in readme
    assert f"an independent reference, {both} of them" in readme
    assert f"{first} of the {len(TABLE)} types" in status


@pytest.mark.parametrize(("name", "decoder"), OTHER_DECODERS)
def test_other_decoder(name: str, decoder: str) -> None:
    model = tiny.build(getattr(transformers, NAMES[name]), tiny.config(name, decoder))
    assert model.config.get_text_config().model_type == decoder
    result = selfcheck.check(model, OTHER_DECODERS[name, decoder])
    assert result.error is None


def test_gemma_4_with_images_that_see_themselves() -> None:
    """Of its two masks, only that of the sliding layers is not causal."""
    small = tiny.config("gemma4")
    small.text_config.use_bidirectional_attention = "vision"
    model = tiny.build(transformers.Gemma4ForConditionalGeneration, small)
    result = selfcheck.check(model, "both")
    assert result.error is None


# ---- the tiny models ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gemma3", "qwen3_5", "llava", "qwen3_vl", "gemma4"])
def test_every_kind_of_layer_stays(name: str) -> None:
    text, whole = tiny.config(name).text_config, transformers.AutoConfig.for_model(name).text_config
    assert {*(getattr(text, "layer_types", None) or ())} == {*(getattr(whole, "layer_types", None) or ())}
    assert text.num_hidden_layers <= 6


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl", "llava_onevision"])
def test_a_tiny_configuration_stays_as_it_is(name: str) -> None:
    """`patch` makes a tiny configuration from that of a model, which may be tiny already, as in tests."""
    small = tiny.config(name)
    assert tiny.config(small).to_dict() == small.to_dict()


def test_a_checkpoint_differs_from_the_default() -> None:
    """The tiny model has the architecture of the user's configuration, not of the default one."""
    whole = transformers.AutoConfig.for_model("gemma3")
    whole.text_config.sliding_window, whole.text_config.layer_types = 1024, ["full_attention"] * 26
    small = tiny.config(whole)
    assert {*small.text_config.layer_types} == {"full_attention"}
    assert small.text_config.vocab_size == tiny.VOCABULARY


def test_nested_configurations_are_shrunk_whatever_their_name() -> None:
    """A nested configuration is recognised by its model_type, and a decoder by its name."""
    small = tiny.config("t5gemma2")
    text, vision = tiny.config("gemma3").text_config, tiny.config("gemma3").vision_config
    assert small.decoder.hidden_size == small.encoder.text_config.hidden_size == text.hidden_size
    assert small.encoder.vision_config.hidden_size == vision.hidden_size


def test_a_model_that_is_not_tiny_is_not_built() -> None:
    """No memory is allocated for it."""
    large = tiny.config("llava")
    large.text_config.vocab_size = 10**6  # rows of 64 features, in the embedding and in the head
    with pytest.raises(MemoryError, match="a tiny LlavaForConditionalGeneration has 128 million parameters"):
        tiny.build(transformers.LlavaForConditionalGeneration, large)


def test_images_of_a_type_that_is_not_known() -> None:
    model = tiny.build(transformers.LlavaForConditionalGeneration, tiny.config("llava"))
    model.model.get_image_features = lambda **_: torch.zeros(3, 4) @ torch.zeros(5, 4)
    with pytest.raises(ValueError, match="the images of LlavaModel are not supported: RuntimeError"):
        tiny.sample(model, [2, "image"])


def test_a_generic_adapter_without_a_tiny_model_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiny, "sample", lambda *_: (_ for _ in ()).throw(ValueError("its images are not known")))
    model = tiny.build(transformers.Gemma3ForConditionalGeneration, tiny.config("gemma3"))
    with pytest.raises(ValueError, match=r"no tiny model of model_type='gemma3'.*its images are not known"):
        apet.patch(model, keep=0.5)
    assert apet.options(model) is None


def test_a_generic_adapter_that_is_not_right_raises(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = tiny.build(transformers.Gemma3ForConditionalGeneration, tiny.config("gemma3"))
    with monkeypatch.context() as planted:
        right = reference.expected_states
        planted.setattr(reference, "expected_states", lambda *args: right(*args) + 1)
        with pytest.raises(ValueError, match="the self-check failed for model_type='gemma3'"):
            apet.patch(model, keep=0.5)
    apet.patch(model, keep=0.5)
    assert apet.options(model) is not None
