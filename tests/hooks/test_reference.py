"""The reference (hooks/reference.py) notices mistakes of a patched model, planted in the call of the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from apet.hooks import selfcheck, tiny
from apet.hooks.engine import Engine
from apet.hooks.selfcheck import NAMES, STAGES, TOLERANCE
from torch import Tensor, nn

pytestmark = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="configurations of transformers 4 are shrunk for the families with an adapter alone (test_selfcheck.py)",
)

Plant = Callable[[dict[str, Any]], dict[str, Any]]


def model_of(name: str) -> nn.Module:
    return tiny.build(getattr(transformers, NAMES[name]), tiny.config(name))


def moved(call: dict[str, Any]) -> dict[str, Any]:
    """Adds one to the positions after the fourth."""
    positions = call["position_ids"].clone()
    positions[..., 4:] += 1
    return call | {"position_ids": positions}


def counted(call: dict[str, Any]) -> dict[str, Any]:
    """Replaces positions along time, height and width by consecutive ones."""
    positions = call["position_ids"]
    return call | {"position_ids": torch.arange(positions.shape[-1]).expand_as(positions)}


def causal(call: dict[str, Any]) -> dict[str, Any]:
    """Hides later tokens of an image from earlier ones."""

    def tril(mask: Tensor | None) -> Tensor | None:
        return mask if mask is None else mask & torch.ones_like(mask).tril()

    mask = call["attention_mask"]
    return call | {"attention_mask": {k: tril(m) for k, m in mask.items()} if isinstance(mask, dict) else tril(mask)}


def no_window(call: dict[str, Any]) -> dict[str, Any]:
    """Removes the window of sliding layers."""
    mask = call["attention_mask"]
    return call | {"attention_mask": dict.fromkeys(mask, mask["full_attention"])}


def rolled(*names: str) -> Plant:
    """Shifts the features of visual tokens by one token."""

    def plant(call: dict[str, Any]) -> dict[str, Any]:
        for name in names:
            value = call[name]
            one = [v.roll(1, 0) for v in value] if isinstance(value, list) else value.roll(1, 1)
            call = call | {name: one}
        return call

    return plant


def turned(call: dict[str, Any]) -> dict[str, Any]:
    """Shifts a layer's rotary embeddings by one token."""
    return call | {"position_embeddings": tuple(t.roll(1, -2) for t in call["position_embeddings"])}


def padding_seen(call: dict[str, Any]) -> dict[str, Any]:
    return call | {"attention_mask": torch.ones_like(call["attention_mask"])}


def plant_in(monkeypatch: pytest.MonkeyPatch, plant: Plant, prefill: bool = True, layer: int | None = None) -> None:
    """Changes the arguments with which a patched model calls its decoder, or one of its layers, after the hooks."""
    install, remove = Engine.install, Engine.remove
    handles: list[Any] = []

    def change(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rows = args[0] if args else kwargs.get("inputs_embeds", kwargs.get("hidden_states"))
        return (args, plant(kwargs)) if (rows.shape[1] > 1) is prefill else None

    def installed(self: Engine) -> None:
        install(self)
        module = self.language_model if layer is None else self.language_model.layers[layer]
        handles.append(module.register_forward_pre_hook(change, with_kwargs=True))

    def removed(self: Engine) -> None:
        remove(self)
        for handle in handles:
            handle.remove()

    monkeypatch.setattr(Engine, "install", installed)
    monkeypatch.setattr(Engine, "remove", removed)


MISTAKES = {
    "a position": ("llava", moved),
    "a position in the second stage": ("llava", turned),
    "axes of positions": ("qwen2_5_vl", counted),
    "an image that is causal, in a dict": ("gemma3", causal),
    "an image that is causal": ("paligemma", causal),
    "a window": ("gemma3", no_window),
    "features of later layers": ("qwen3_vl", rolled("deepstack_visual_embeds")),
    "inputs of each layer": ("gemma4", rolled("per_layer_inputs")),
    "types of tokens": ("ernie4_5_vl_moe", rolled("moe_mm_token_type_ids")),
    "padding": ("llava", padding_seen),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_notices(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, plant = MISTAKES[mistake]
    stage = "both" if "stage" in mistake else "first"
    model = model_of(name)
    rows = [selfcheck.prompt(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)]
    if mistake != "padding":
        rows = rows[:1]
    assert selfcheck.judge(model, rows, STAGES[stage]) < TOLERANCE
    plant_in(monkeypatch, plant, layer=3 if stage == "both" else None)
    assert selfcheck.judge(model, rows, STAGES[stage]) > 10 * TOLERANCE


def test_notices_a_wrong_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step of a generated token is wrong, and the prompt is right."""
    model = model_of("qwen2_5_vl")
    rows = [selfcheck.prompt(model, selfcheck.PROMPTS[0])]
    plant_in(monkeypatch, lambda call: call | {"position_ids": call["position_ids"] + 3}, prefill=False)
    assert selfcheck.judge(model, rows, STAGES["first"]) > 10 * TOLERANCE


def test_notices_text_of_another_place(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llava")
    rows = [selfcheck.prompt(model, selfcheck.PROMPTS[0])]
    plant_in(monkeypatch, rolled("inputs_embeds"))
    with pytest.raises(ValueError, match="text tokens did not enter the decoder unchanged"):
        selfcheck.judge(model, rows, STAGES["first"])


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", "qwen3_5"])
def test_is_the_model_that_is_not_patched(name: str) -> None:
    """If no column is dropped, its states are those of the unpatched model, also with padding and a static cache."""
    model = model_of(name)
    rows = [selfcheck.prompt(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)]
    for static in (False, True):
        assert selfcheck.unpatched(model, rows, static=static) < TOLERANCE


def test_a_stage_that_drops_nothing_is_no_pass() -> None:
    model = model_of("llava")
    rows = [selfcheck.prompt(model, selfcheck.PROMPTS[0])]
    with pytest.raises(ValueError, match="0 stages dropped tokens of an image"):
        selfcheck.judge(model, rows, selfcheck.Options(keep=1.0))
