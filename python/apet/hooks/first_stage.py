"""The first stage: compresses before the projector or at the input of the language model, where the sequence
shrinks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import along, masks
from .config import Keep, Options
from .gaps import check_rotary
from .locate import check_list, find, placeholders
from .mask_functions import RECURRENT, MaskBuilder, attention_types
from .relevance import of_images, of_prompt, question
from .sequence import Packing, counted
from .state import NOT_COMPILED_REASON, Forward, Prompt, RunningCall, part
from .target import Target
from .units import Shorter, VisualTokens, group, shorten

GONE = -math.inf  # the value of every channel of a row that was dropped before the projector


@dataclass
class Projected:
    """The rows of the projector's input [tiles, N, C] that were kept and projected, and its shape (tiles, N)."""

    kept_rows: Tensor
    shape: tuple[int, int]


@torch.compiler.disable(reason=NOT_COMPILED_REASON)
def project_fewer(
    target: Target, core: nn.Module, projector: nn.Module, call: RunningCall, x: Tensor
) -> tuple[Tensor, Projected] | None:
    """Compresses the projector's input [tiles, N, C] to [1, kept, C], in a call of the core model or of generate().
    Returns None if nothing is dropped."""
    options, inputs = target.options, call.inputs
    units = target.adapter.units_before_projector(core, inputs, x)
    check_list("keep", options.keep, len(units))
    if sum(len(u) for u in units) != x.shape[0] * x.shape[1]:
        raise ValueError(
            f"the projector was called with {x.shape[0]} x {x.shape[1]} rows, but the images of the call have "
            f"{[len(u) for u in units]}"
        )
    relevance = None
    if options.relevance:  # all rows are projected for it, by the module itself: its hooks would compress them
        relevance = of_images(target, core, call, projector.forward(x).flatten(0, 1), [len(u) for u in units])
    x, shape = x.flatten(0, 1), (x.shape[0], x.shape[1])  # [tiles * N, C]
    tokens = group(units, torch.arange(len(x), device=x.device), range(len(units)))
    shorter = shorten(x, tokens, options.keep, options, relevance, options.distinct, target.warned)
    if shorter is None:
        return None
    kept_rows = shorter.tokens.where
    return x.index_copy(0, shorter.slots, shorter.rows)[kept_rows][None], Projected(kept_rows, shape)


def project_back(projected: Projected, y: Tensor) -> Tensor:
    """Scatters the projector's result [1, kept, D] back to [tiles, N, D]; dropped rows are filled with `GONE`."""
    full = y.new_full((math.prod(projected.shape), y.shape[-1]), GONE)
    full[projected.kept_rows.to(y.device)] = y[0]  # a projector may be on another device than its input
    return full.unflatten(0, projected.shape)


@torch.compiler.disable(reason=NOT_COMPILED_REASON)
def begin(
    target: Target,
    language_model: nn.Module,
    call: RunningCall,
    generation: RunningCall | None,
    arguments: dict[str, Any],
    before: Prompt | None,
) -> tuple[Forward, dict[str, Any]]:
    """Begins a prefill with visual inputs: finds their tokens and shortens the arguments of the language model.

    generation: the call of generate() that this call is part of, if that has encoded the images; before: the prompt
    stored on the cache, if that holds tokens already. Returns the forward, and the arguments.
    """
    roles, options = target.language_model_arguments, target.options
    x = roles.get("embeds", arguments)  # [B, L, D]
    batch, length = x.shape[:2]
    cache = roles.cache(arguments)
    past = 0 if cache is None else int(cache.get_seq_length())
    trace, tokens = find(target, call, generation, x, call.columns - length)
    forward = Forward(
        language_model, Prompt(batch), cache=cache, trace=trace, labels=call.labels, attributes=call.attributes
    )
    if not tokens.lengths:
        return forward, arguments
    if past and before is None:
        raise ValueError(
            f"the cache holds {past} tokens that were not written by this patched model, so images cannot follow them"
        )
    if before is not None and before.compressed and past:
        raise ValueError(
            f"images cannot follow a cache of {past} tokens that holds compressed images: give the whole conversation "
            "without a cache"
        )
    positions, mask = roles.get("positions", arguments), roles.get("mask", arguments)
    if mask is None and positions is not None:
        check_one_sequence(positions, target.axes)
    everything, more = masks.read(mask, batch, length, x.device, target.reach(language_model), past)  # [B, past + L]
    prefix, valid = everything[:, :past], everything[:, past:]
    if not valid.flatten()[tokens.where].all():
        raise ValueError("attention_mask hides placeholders of images or videos, which cannot be compressed then")
    forward.pad_left = bool(valid[:, -1].all())
    forward.prompt = Prompt(batch, past + length, least=past + needed(tokens, length, forward.pad_left))
    forward.visual, forward.valid, forward.prefix, forward.more = tokens, valid, prefix, more
    at = along.Sequence(batch, length, sum(tokens.lengths))
    added = along.added_layers(roles, arguments, at)
    if options.llm_layer is not None and options.llm_layer < added:
        raise ValueError(
            f"llm_layer={options.llm_layer} lies before layer {added}, until which {roles.owner} adds features of "
            f"visual tokens again; llm_layer={added} is the least"
        )
    if options.keep is not None:
        moved, start = arguments, None
        if target.projector is not None:
            shorter = remove_dropped_rows(x.flatten(0, 1), tokens, options.keep, options)
        else:
            moved, start = along.move_in(roles, arguments, at)
            x, relevance = roles.get("embeds", moved), None
            if options.relevance:
                visual = torch.stack([*placeholders(target.adapter, call.core, call.inputs).values()]).any(0)
                first = call.columns - length  # columns of the prompt that earlier calls have put into the cache
                text = ~visual & question(call, visual, past - first)
                relevance = of_prompt(x, valid & text[:, first : first + length].to(x.device)).flatten()
            shorter = shorten(
                x.flatten(0, 1), tokens, options.keep, options, relevance, options.distinct, target.warned
            )
        if shorter is None:
            target.warn_nothing_dropped("keep", tokens, (modality for modality, _, _ in trace.visuals))
        else:
            positions_given = target.core_arguments.get("positions", call.inputs) is not None
            arguments = shortened(target, forward, shorter, moved, at, positions_given)
            if start is not None:
                arguments = along.move_out(roles, arguments, start)
    return forward, arguments


def shortened(
    target: Target,
    forward: Forward,
    shorter: Shorter,
    arguments: dict[str, Any],
    at: along.Sequence,
    positions_given: bool,
) -> dict[str, Any]:
    """Returns the arguments of the language model without the dropped tokens.

    positions_given: whether the positions come from the caller of the core model.
    """
    roles, prompt = target.language_model_arguments, forward.prompt
    x, valid, prefix = roles.get("embeds", arguments), forward.valid, forward.prefix
    past = prefix.shape[1]
    packing = shorter.pack(valid, forward.pad_left)
    everything = torch.cat([prefix, packing.valid], dim=1)  # [B, past + L2]
    text = counted(everything)[:, past:]
    positions = roles.get("positions", arguments)
    if target.positions == "renumber":
        check_counted(positions, roles.owner)
        positions, following = text, everything.sum(1, keepdim=True)
    else:
        if positions is None:
            positions = torch.arange(past, past + at.length, device=x.device)[None]
        positions, following = kept_positions(positions, valid, packing, target.axes, positions_given)
        if positions.dim() == 3 and target.text_row:
            # transformers detects packed sequences by gaps in the row of the text, so this row must have none
            positions = torch.cat([text[None].to(positions.dtype), positions])
        elif target.gaps is not None and positions.dim() == 2:
            target.gaps.check_attention(forward.language_model)
            forward.positions = (positions, text)
    given = roles.get("mask", arguments)
    x = shorter.placed(packing, x)
    forward.more = masks.packed(forward.more, packing, past)
    replaced = {"embeds": x, "mask": mask_of(target, forward, given, x, everything), "positions": positions}
    if roles.get("cache_position", arguments) is not None:
        replaced["cache_position"] = torch.arange(past, everything.shape[1], device=x.device)
    arguments = roles.replace(along.shorten(roles, arguments, at, packing), **replaced)
    along.check_attributes(forward.language_model, forward.attributes, at)
    forward.trace.stage(shorter, packing)
    forward.visual, forward.valid = shorter.tokens.moved(packing), packing.valid
    prompt.early = part(forward.cache, everything, following, target.flash(forward.language_model))
    prompt.dropped = at.length - packing.valid.shape[1]
    prompt.least = past + needed(forward.visual, packing.valid.shape[1], forward.pad_left)
    return arguments


@torch.compiler.disable(reason=NOT_COMPILED_REASON)
def layer_arguments(target: Target, forward: Forward, index: int, arguments: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments for a layer of a prefill whose positions have gaps: with counted positions, unless the
    layer needs the others."""
    gaps, roles = target.gaps, target.layer_arguments[index]
    kept, text = forward.positions
    rotary = roles.get("rotary", arguments)
    if index >= gaps.first and rotary is not None and not forward.rotary_checked:  # some layers use none
        x, kind = roles.get("hidden", arguments), target.kind(forward.language_model, index)
        check_rotary(forward.language_model, kept, x, kind, roles.owner, rotary)
        forward.rotary_checked = True
    positions = roles.get("positions", arguments)
    if gaps.scales or positions is None:
        return arguments
    return roles.replace(arguments, positions=text.to(positions.device))


def mask_of(target: Target, forward: Forward, given: Any, x: Tensor, everything: Tensor) -> Any:
    """Returns the mask for the shortened call: `everything` [B, past + L2] bool, from which the language model builds
    its masks. If some tokens see more than causal attention shows, it returns these masks, already built."""
    if not forward.more:
        return everything.long()
    config, past = forward.language_model.config, everything.shape[1] - x.shape[1]
    kinds, single = attention_types(config), target.reach(forward.language_model).single

    masks_of = target.masks or MaskBuilder.find()

    def build(kind: str) -> Any:
        layer = kinds.index(kind) if kind in kinds else 0
        return masks_of.build(config, x, everything, forward.cache, layer, past, kind, forward.more.get(kind))

    if not isinstance(given, Mapping):
        return build(single)
    return {kind: everything[:, past:].long() if kind in RECURRENT else build(kind) for kind in given}


def check_counted(positions: Any, owner: str) -> None:
    """Raises ValueError for positions that differ between axes (M-RoPE) if the adapter would renumber them."""
    if isinstance(positions, Tensor) and positions.dim() == 3 and not torch.equal(*positions.aminmax(dim=0)):
        raise ValueError(
            f"{owner} was called with positions {tuple(positions.shape)} that differ between their rows, as M-RoPE's "
            "do; "
            'an adapter with positions = "keep" keeps them (docs/add-a-model.md)'
        )


def check_one_sequence(positions: Tensor, axes: int) -> None:
    """Raises ValueError if positions start again within a row: transformers then takes the row for packed sequences, if
    there is no mask. positions: [B, L], or [axes + 1, B, L] with the positions of the text first."""
    if positions.dim() == 3 and len(positions) == axes:  # transformers does not look for sequences in M-RoPE axes
        return
    text = positions[0] if positions.dim() == 3 else positions
    if (text.diff(dim=-1) < 0).any():
        raise ValueError("position_ids start again within a row: packed sequences with images cannot be compressed")


def needed(tokens: VisualTokens, length: int, pad_left: bool) -> int | Tensor:
    """Returns the number of columns of a prompt [B, length] up to its last visual token; all, if padding follows the
    text."""
    return (tokens.where % length).max() + 1 if pad_left else length


def kept_positions(
    positions: Tensor, valid: Tensor, packing: Packing, axes: int, positions_given: bool
) -> tuple[Tensor, Tensor]:
    """Returns the positions of the tokens that stay, and the next position [B, 1]. positions: [.., B or 1, L] as given.

    Of M-RoPE positions only the axes [axes, B, L2] are returned, without the row of the text. The next position is
    ambiguous if a video reaches past the text after it: models continue after the largest position of the prompt, but
    callers that give the positions themselves (`positions_given`; newer versions of generate() do) continue after the
    last one.
    """
    if positions.dim() == 3 and len(positions) not in (axes, axes + 1):
        raise ValueError(
            f"position_ids of shape {tuple(positions.shape)} have {len(positions)} rows, expected {axes} (M-RoPE) "
            f"or {axes + 1} (the positions of the text before them)"
        )
    rotary = positions[-axes:] if positions.dim() == 3 else positions[None]
    rotary = rotary.to(valid.device)
    real = torch.where(valid, rotary, -1).amax(0)  # [B, L]
    if positions_given:
        last = torch.where(valid, torch.arange(valid.shape[1], device=valid.device), -1).argmax(1, keepdim=True)
        following = real.gather(1, last) + 1
    else:
        following = real.amax(1, keepdim=True) + 1
    rotary = packing.along(rotary, -1)  # [axes or 1, B, L2]
    return (rotary[0] if len(rotary) == 1 else rotary), following


def remove_dropped_rows(x: Tensor, tokens: VisualTokens, keep: Keep, options: Options) -> Shorter | None:
    """Returns what `shorten` would, if the projector's hooks have compressed already: the rows of x [T, D] that are
    filled with `GONE` are removed."""
    remaining_counts = tokens.after(keep, options)
    expected = sum(tokens.lengths) - sum(remaining_counts)
    if not expected:
        return None
    gone = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    gone[tokens.where] = (x[tokens.where] == GONE).all(-1)
    found = int(gone.sum())
    fewer = options.guard == "keep"  # which drops as many as it finds that it can
    if found > expected or (found < expected and not fewer):
        raise ValueError(
            f"{found} instead of {expected} tokens were dropped before the projector: these features were encoded "
            "outside of this call, or by a model patched otherwise"
        )
    if not found:
        return None
    if options.adaptive:  # only the rows say how many remain of each unit
        remaining = (~gone[tokens.where]).split(tokens.lengths)
        remaining_counts = [int(of_unit.sum()) for of_unit in remaining]
    none = tokens.where[:0]
    return Shorter(gone, none, none, x[none], tokens.without(gone, remaining_counts))
