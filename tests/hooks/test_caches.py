"""Caches that keep their tokens elsewhere or in another form: offloaded to the CPU, or quantized."""

from __future__ import annotations

import contextlib
from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from families import Family, shared
from running import NEW, STAGES, conversations, judge, lengths, say
from torch import Tensor
from transformers import cache_utils

if not hasattr(cache_utils, "QuantizedLayer"):
    pytest.skip("the caches of this version have no layers", allow_module_level=True)


class Stream(contextlib.AbstractContextManager):
    """A stream of a device that works without delay."""

    def __exit__(self, *_: object) -> None:
        pass

    def wait_stream(self, _: Stream) -> None:
        pass


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("stage", STAGES)
def test_offloaded_cache(family: Family, stage: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers offloads with the streams of a GPU. Here these do nothing, and offloaded layers are hidden until
    they are fetched, so that an access of the hooks to them raises an error."""
    monkeypatch.setattr(torch, "Stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *_: Stream())
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    away: list[Any] = []

    def offload(layer: Any) -> None:
        layer.away = layer.keys, layer.values
        counts_keys = getattr(layer, "is_compileable", False) and not hasattr(layer, "cumulative_length")
        if not counts_keys:  # transformers 4 reads the length of a static cache from its keys
            layer.keys, layer.values = (t.to("meta") for t in layer.away)
        away.append(layer)

    def prefetch(layer: Any) -> None:
        layer.keys, layer.values = vars(layer).pop("away", (layer.keys, layer.values))

    monkeypatch.setattr(cache_utils.CacheLayerMixin, "offload", offload)
    monkeypatch.setattr(cache_utils.CacheLayerMixin, "prefetch", prefetch)
    model, rows = shared(family.name), conversations(family)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(family, rows), cache_implementation=kind)
    judge(family, rows, said, STAGES[stage])
    assert away


class Exact(cache_utils.QuantizedLayer):
    """A layer whose quantized tokens are float64, so a result must be that of the recompute."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.double()

    def _dequantize(self, quantized: Tensor) -> Tensor:
        return quantized.float()


@pytest.mark.parametrize("stage", STAGES)
def test_quantized_cache(family: Family, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last tokens wait to be quantized: four of them, fewer than are generated."""
    monkeypatch.setattr(cache_utils, "QuantoQuantizedLayer", Exact)
    model, rows = shared(family.name), conversations(family)
    cache = transformers.QuantizedCache("quanto", model.config.get_text_config(), residual_length=4)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(family, rows), past_key_values=cache)
    results = judge(family, rows, said, STAGES[stage])
    first, deep = (max(getattr(r, name) for r in results) + NEW - 1 for name in ("length", "deep_length"))
    border = STAGES[stage].get("llm_layer", 4)
    assert lengths(cache) == [first] * border + [deep] * (4 - border)


@pytest.mark.skipif(not hasattr(cache_utils, "Fp8QuantizedLayer"), reason="this version has no cache in float8")
@pytest.mark.parametrize("stage", STAGES)
def test_cache_in_float8(family: Family, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It appends scaled tokens to scaled tokens. Here these are in float32, so that a wrong mask is not taken for
    rounding."""
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    model, rows = shared(family.name), conversations(family)
    with apet.patched(model, **STAGES[stage]):
        how = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
        said = say(model, collate(family, rows), **how)
    assert {type(layer) for layer in said.cache.layers} == {cache_utils.Fp8QuantizedLayer}
    judge(family, rows, said, STAGES[stage])
