"""The second stage, inside the language model: the layers from `llm_layer` on get a shorter sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .sequence import counted, layer_mask
from .state import PREFILL, Late, Run, part
from .units import shorten

if TYPE_CHECKING:
    from .engine import Engine


def enter(engine: Engine, run: Run, x: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """Where layer `llm_layer` begins, with x [B, L, D]: fills in run.late, if there is anything to it, and returns
    what the layer is to work on."""
    cache = kwargs.get("past_key_values")
    if run.tokens is not None:
        return shortened(engine, run, x, cache, kwargs["position_embeddings"])
    if run.prompt.late is not None:
        late, new = run.prompt.late, x.shape[1]
        past = cache.get_seq_length(engine.options.llm_layer)
        rotary = None
        if engine.adapter.positions == "renumber":
            rotary = engine.language_model.rotary_emb(x, late.positions(past, new, run.tail))
        run.late = Late(late.columns(past, new, run.tail), past, rotary, x)
    return x


@torch.compiler.disable(reason=PREFILL)
def shortened(engine: Engine, run: Run, x: Tensor, cache: Any, rotary: tuple[Tensor, ...]) -> Tensor:
    """A prefill: compresses the hidden states [B, L, D] of the visual tokens -> [B, L2, D]."""
    tokens, valid = run.tokens.to(x.device), run.valid.to(x.device)
    shorter = shorten(x.flatten(0, 1), tokens, engine.options.llm_keep, engine.options)
    if shorter is None:
        return x
    packing = shorter.pack(valid, run.left)
    x = shorter.placed(packing, x)
    if engine.adapter.positions == "renumber":
        rotary = engine.language_model.rotary_emb(x, counted(packing.valid))
    else:
        rotary = tuple(packing.along(t, -2) for t in rotary)
    engine.trace.stage(shorter, packing)
    run.prompt.late = part(cache, packing.valid, packing.valid.sum(1, keepdim=True), engine.flash)
    run.late = Late(packing.valid, 0, rotary, x)
    return x


def arguments(engine: Engine, late: Late, index: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What decoder layer `index` is called with, instead of `kwargs`."""
    sliding = engine.slides(index)
    if sliding not in late.built:
        cache = kwargs.get("past_key_values")
        late.built[sliding] = layer_mask(
            engine.language_model.config, late.x, late.mask, cache, index, late.past, sliding
        )
    changed = {"attention_mask": late.built[sliding], "position_ids": None}
    if late.rotary is not None:
        changed["position_embeddings"] = late.rotary
    if kwargs.get("cache_position") is not None:
        changed["cache_position"] = torch.arange(late.x.shape[1], device=late.x.device) + late.past
    return kwargs | changed
