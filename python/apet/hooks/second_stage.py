"""The second stage, inside the language model: the layers from `llm_layer` on get a shorter sequence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from . import along, masks
from .caches import length
from .calling import versions
from .mask_functions import IDLE, RECURRENT, check_mask
from .sequence import counted
from .state import NOT_COMPILED_REASON, Forward, Late, on, part
from .target import Target
from .units import shorten


def enter(target: Target, forward: Forward, cache: Cache | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Begins the second stage at layer `llm_layer`: sets forward.late, if tokens are dropped there, and returns the
    arguments."""
    layer = target.options.llm_layer
    roles = target.layer_arguments[layer]
    if forward.visual is not None:
        return shortened(target, forward, cache, arguments)
    part = forward.prompt.late
    if part is not None:
        x = roles.get("hidden", arguments)  # [B, L, D]
        new, past = x.shape[1], on(length(cache, layer), x.device)
        columns, positions = part.columns(past, new, forward.tail), part.positions(past, new, forward.tail)
        forward.late = Late(columns.to(x.device), past, positions.to(x.device), x)
    return arguments


@torch.compiler.disable(reason=NOT_COMPILED_REASON)
def shortened(target: Target, forward: Forward, cache: Cache | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Compresses the visual tokens in the hidden states of a prefill, [B, L, D] or [B, L, streams, D] -> [B, L2,
    ...]."""
    options = target.options
    roles = target.layer_arguments[options.llm_layer]
    x = roles.get("hidden", arguments)
    if not isinstance(x, Tensor) or x.shape[:2] != forward.valid.shape or x.dim() < 3:
        raise ValueError(
            f"{roles.owner} was called with hidden states of shape {tuple(getattr(x, 'shape', ()))}, where "
            f"{tuple(forward.valid.shape)} tokens were expected: apet cannot shorten them"
        )
    tokens, valid, prefix = (t.to(x.device) for t in (forward.visual, forward.valid, forward.prefix))
    flat = x.flatten(2)  # the streams of a token are one vector
    shorter = shorten(flat.flatten(0, 1), tokens, options.llm_keep, options)
    if shorter is None:
        target.warn_nothing_dropped("llm_keep", tokens, (modality for modality, _, _ in forward.trace.visuals))
        return arguments
    if target.gaps is not None:
        target.gaps.check_attention(forward.language_model)
    past = prefix.shape[1]
    packing = shorter.pack(valid, forward.pad_left)
    everything = torch.cat([prefix, packing.valid], dim=1)
    before = counted(torch.cat([prefix, valid], dim=1))[:, past:]
    x = shorter.placed(packing, flat).unflatten(2, x.shape[2:])
    forward.trace.stage(shorter, packing)
    forward.prompt.llm_layer, forward.prompt.positions = options.llm_layer, target.positions
    following = everything.sum(1, keepdim=True)
    forward.prompt.late = part(cache, everything, following, target.flash(forward.language_model))
    forward.late = Late(everything, past, counted(everything)[:, past:], x, packing, before)
    forward.late.more = masks.packed(forward.more, packing, past)
    return roles.replace(arguments, hidden=x)


def arguments(target: Target, forward: Forward, index: int, layer: nn.Module, call: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments for decoder layer `index` >= `llm_layer`, in place of `call`."""
    late, roles = forward.late, target.layer_arguments[index]
    x = roles.get("hidden", call)
    if isinstance(x, Tensor):
        late.follow(x)
    if late.packing is not None:
        batch, whole = forward.valid.shape
        at = along.Sequence(batch, whole, sum(forward.visual.lengths))
        check_attributes(layer, forward, at)
        call = along.shorten(roles, call, at, late.packing)
    kind = target.kind(forward.language_model, index)
    given = roles.get("mask", call)
    check_mask(f"{roles.owner} was called with", given)
    replaced: dict[str, Any] = {"mask": mask_of(target, forward, index, kind, given, roles.cache(call))}
    rotary = rotary_of(target, forward, kind, roles.owner, roles.get("rotary", call))
    if rotary is not None:
        replaced["rotary"] = rotary
    if roles.name("recurrent", call) is not None:
        replaced["recurrent"] = new_tokens(late)
    positions = roles.get("positions", call)
    if positions is not None:
        replaced["positions"] = positions_of(target, late, positions)
    if roles.get("cache_position", call) is not None:
        replaced["cache_position"] = torch.arange(late.x.shape[1], device=late.x.device) + late.past
    return roles.replace(call, **replaced)


@torch.compiler.disable(reason=NOT_COMPILED_REASON)
def check_attributes(layer: nn.Module, forward: Forward, at: along.Sequence) -> None:
    along.check_attributes(layer, forward.attributes, at)


def mask_of(target: Target, forward: Forward, index: int, kind: str, given: Any, cache: Cache | None) -> Any:
    """Returns the mask of a layer, in the form of the mask that the layer was given."""
    late = forward.late
    if kind in IDLE:
        return given
    if kind in RECURRENT and (given is None or given.dim() == 2):
        return new_tokens(late)
    if kind in RECURRENT:  # it is given a 4-D mask although it keeps a state: build that of a layer that attends
        index = target.attending(forward.language_model)
        kind = target.kind(forward.language_model, index)
    if isinstance(given, Tensor) and given.dim() == 2:  # the layer makes its own mask
        return late.mask.to(given.dtype)
    if kind not in late.built:
        config, more = forward.language_model.config, late.more.get(kind)
        if more is None and len(late.more) == 1 and target.reach(forward.language_model).single in late.more:
            more = next(iter(late.more.values()))  # one mask was given for all layers
        late.built[kind] = target.masks.build(config, late.x, late.mask, cache, index, late.past, kind, more)
    return late.built[kind]


def positions_of(target: Target, late: Late, given: Tensor) -> Tensor:
    """Returns the positions for a layer that is given these [B or 1, L]: counted ones, unless it needs those that its
    tokens keep."""
    if target.gaps is None or not target.gaps.scales:
        return late.positions
    return given if late.packing is None else late.packing.along(given, -1)


def new_tokens(late: Late) -> Tensor | None:
    """Returns which new tokens [B, L] a recurrent state takes in: all but padding; None: all."""
    new = late.x.shape[1]
    return None if new == 1 else late.mask[:, late.mask.shape[1] - new :].long()


def rotary_of(target: Target, forward: Forward, kind: str, owner: str, given: Any) -> Any:
    """Returns the rotary embedding of layers of a kind for the remaining tokens; None: they keep the one they are
    given."""
    late = forward.late
    if given is None:  # this layer uses no rotary embedding
        return None
    if target.rotary is None:
        raise ValueError(f"{owner} was called with rotary embeddings, where apet found no layer that takes them")
    shared = kind if target.rotary.by_kind else ""
    if shared in late.rotary and (late.packing is None or late.given[shared] is given):
        return late.rotary[shared]
    late.given[shared] = given
    if late.packing is not None:
        check_rotary_arguments(owner, given, *forward.valid.shape, target.axes)
    if target.positions == "renumber":
        if late.packing is not None:
            check_rotary_values(target, forward, kind, given)
        made = rotary_like(target, forward, kind, late.positions, given)
    elif late.packing is not None:
        made = _like(given, [late.packing.along(t, -2) for t in parts_of(given)])
    else:
        made = None
    late.rotary[shared] = made
    return made


def rotary_like(target: Target, forward: Forward, kind: str, positions: Tensor, given: Any) -> Any:
    """Returns the rotary embedding of layers of a kind for positions [B, L], in the number type of the given one and on
    the device of the hidden states.

    Under autocast the hidden states may have another type than the embeddings that the model makes it with. In a model
    on several devices, `rotary_emb` may return it on a device of its own.
    """
    late = forward.late
    x, dtype = late.x, next(parts_of(given)).dtype
    made = target.rotary.make(forward.language_model, x.to(dtype) if dtype.is_floating_point else x, positions, kind)
    return _like(made, [part.to(x.device) for part in parts_of(made)])


def parts_of(rotary: Any) -> Iterator[Tensor]:
    """Yields the cosine and the sine, or the one tensor that holds both."""
    yield from rotary if isinstance(rotary, tuple | list) else [rotary]


def _like(rotary: Any, parts: list[Tensor]) -> Any:
    return tuple(parts) if isinstance(rotary, tuple | list) else parts[0]


def check_rotary_arguments(owner: str, rotary: Any, batch: int, length: int, axes: int) -> None:
    """Raises ValueError if a layer is not given the cosines and sines of its positions, [B or 1, L, d], or of the axes
    of M-RoPE, [axes, B, L, d]."""
    given = list(parts_of(rotary))
    known = all(
        isinstance(t, Tensor) and tuple(t.shape[:-1]) in ((batch, length), (1, length), (axes, batch, length))
        for t in given
    )
    if not known or len(given) > 2:
        shapes = ", ".join(str(tuple(t.shape)) if isinstance(t, Tensor) else type(t).__name__ for t in given)
        raise ValueError(
            f"{owner} was called with rotary embeddings {shapes}, expected a cosine and a sine of "
            f"[{batch}, {length}, d] ({versions()})"
        )


def check_rotary_values(target: Target, forward: Forward, kind: str, rotary: Any) -> None:
    """Raises ValueError if a model gives its layers something else than `rotary_emb` gives for counted positions [B,
    L].

    The layers from `llm_layer` on get the result of `rotary_emb` for the positions of the shorter sequence. A model
    that is given no positions may count padding, too: attention depends only on differences of positions.
    """
    late, device = forward.late, forward.late.x.device
    valid = forward.valid.to(device)
    columns = torch.arange(late.past, late.past + valid.shape[1], device=device)[None]
    # Positions may also be counted from 1, since attention depends on their differences.
    for counts in (late.before, columns, late.before + 1, columns + 1):
        made = rotary_like(target, forward, kind, counts, rotary)
        if all(
            torch.equal(one.to(device).expand(len(valid), -1, -1)[valid], ours.expand(len(valid), -1, -1)[valid])
            for one, ours in zip(parts_of(rotary), parts_of(made), strict=True)
        ):
            return
    raise ValueError(
        f"{type(forward.language_model).__name__} gives its layers other rotary embeddings than rotary_emb gives for "
        "positions 0, 1, 2, ...: position_ids that count otherwise cannot be used with llm_layer"
    )
