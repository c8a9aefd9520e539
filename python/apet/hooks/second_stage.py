"""The second stage, inside the language model: the layers from `llm_layer` on get a shorter sequence."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .calling import check_mask, versions
from .sequence import counted
from .state import PREFILL, Forward, Late, part
from .target import Target
from .units import shorten


def enter(target: Target, forward: Forward, cache: Cache | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Where layer `llm_layer` begins: fills in forward.late, if there is anything to it, and returns the arguments."""
    layer = target.options.llm_layer
    roles = target.layer_arguments[layer]
    if forward.tokens is not None:
        return shortened(target, forward, cache, arguments)
    part = forward.prompt.late
    if part is not None:
        x = roles.get("hidden", arguments)  # [B, L, D]
        new, past = x.shape[1], cache.get_seq_length(layer)
        positions, rotary = part.positions(past, new, forward.tail), None
        if target.adapter.positions == "renumber":
            rotary = forward.language_model.rotary_emb(x, positions)
        forward.late = Late(part.columns(past, new, forward.tail), past, rotary, positions, x)
    return arguments


@torch.compiler.disable(reason=PREFILL)
def shortened(target: Target, forward: Forward, cache: Cache | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """A prefill: compresses the hidden states [B, L, D] of the visual tokens -> [B, L2, D]."""
    options = target.options
    roles = target.layer_arguments[options.llm_layer]
    x, rotary = roles.get("hidden", arguments), roles.get("rotary", arguments)
    if not isinstance(x, Tensor) or x.shape[:2] != forward.valid.shape:
        raise ValueError(
            f"{roles.owner} was called with hidden states of shape {tuple(getattr(x, 'shape', ()))}, where "
            f"{tuple(forward.valid.shape)} tokens were expected: apet cannot shorten them"
        )
    tokens, valid, prefix = (t.to(x.device) for t in (forward.tokens, forward.valid, forward.prefix))
    shorter = shorten(x.flatten(0, 1), tokens, options.llm_keep, options)
    if shorter is None:
        target.say_nothing_dropped("llm_keep", tokens, (modality for modality, _, _ in forward.trace.visuals))
        return arguments
    past = prefix.shape[1]
    packing = shorter.pack(valid, forward.pad_left)
    everything = torch.cat([prefix, packing.valid], dim=1)
    positions = counted(everything)[:, past:]
    check_rotary_arguments(roles.owner, rotary, x)
    if target.adapter.positions == "renumber":
        before = counted(torch.cat([prefix, valid], dim=1))[:, past:]
        check_rotary_values(forward, x, rotary, before, valid, past)
        rotary = forward.language_model.rotary_emb(x, positions)
    else:
        rotary = tuple(packing.along(t, -2) for t in rotary)
    x = shorter.placed(packing, x)
    forward.trace.stage(shorter, packing)
    following = everything.sum(1, keepdim=True)
    forward.prompt.llm_layer = options.llm_layer
    forward.prompt.late = part(cache, everything, following, target.flash(forward.language_model))
    forward.late = Late(everything, past, tuple(t.to(x.device) for t in rotary), positions, x)
    return roles.replace(arguments, hidden=x)


def check_rotary_arguments(owner: str, rotary: Any, x: Tensor) -> None:
    """Raises ValueError where a layer is not given cosines and sines of the positions of x [B, L, D]: of [B or 1, L, d]
    or, of the three axes of M-RoPE, [3, B, L, d]."""
    batch, length = x.shape[:2]
    known = [((batch, length), 3), ((1, length), 3), ((3, batch, length), 4)]
    pair = isinstance(rotary, tuple | list) and len(rotary) == 2
    if not pair or not all(isinstance(t, Tensor) and (tuple(t.shape[:-1]), t.dim()) in known for t in rotary):
        given = rotary if isinstance(rotary, tuple | list) else [rotary]
        shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in given)
        raise ValueError(
            f"{owner} was called with rotary embeddings {shapes}, where apet knows a cosine and a sine of "
            f"[{batch}, {length}, d] ({versions()})"
        )


def check_rotary_values(
    forward: Forward, x: Tensor, rotary: tuple[Tensor, ...], positions: Tensor, valid: Tensor, past: int
) -> None:
    """Raises ValueError where a model does not give its layers what `rotary_emb` gives for counted positions [B, L].

    The layers from `llm_layer` on get what it gives for the positions of the shorter sequence. A model that is told no
    positions may count padding, too: attention sees differences of positions alone. valid [B, L]: no padding.
    """
    columns = torch.arange(past, past + x.shape[1], device=x.device)[None]
    for counts in (positions, columns):
        made = forward.language_model.rotary_emb(x, counts)
        if all(
            torch.equal(given.to(x.device).expand(len(valid), -1, -1)[valid], ours.expand(len(valid), -1, -1)[valid])
            for given, ours in zip(rotary, made, strict=True)
        ):
            return
    raise ValueError(
        f"{type(forward.language_model).__name__} gives its layers other rotary embeddings than rotary_emb gives for "
        "positions 0, 1, 2, ...: position_ids that count otherwise cannot be used with llm_layer"
    )


def arguments(target: Target, forward: Forward, index: int, call: dict[str, Any]) -> dict[str, Any]:
    """What decoder layer `index` >= `llm_layer` is called with, instead of `call`."""
    late, roles = forward.late, target.layer_arguments[index]
    length = late.x.shape[1]
    if forward.tokens is not None:
        whole = forward.valid.shape[1]
        roles.check_along(call, {whole: "tokens", sum(forward.tokens.lengths): "visual tokens"})
    given = roles.get("mask", call)
    check_mask(f"{roles.owner} was called with", given)
    replaced: dict[str, Any] = {}
    if isinstance(given, Tensor) and given.dim() == 2:  # the layer makes its own mask
        replaced["mask"] = late.mask.to(given.dtype)
    else:
        sliding = target.slides(forward.language_model, index)
        if sliding not in late.built:
            cache = roles.cache(call)
            config = forward.language_model.config
            late.built[sliding] = target.masks.build(config, late.x, late.mask, cache, index, late.past, sliding)
        replaced["mask"] = late.built[sliding]
    if roles.get("positions", call) is not None:
        replaced["positions"] = late.positions
    if late.rotary is not None:
        replaced["rotary"] = late.rotary
    if roles.get("cache_position", call) is not None:
        replaced["cache_position"] = torch.arange(length, device=late.x.device) + late.past
    return roles.replace(call, **replaced)
