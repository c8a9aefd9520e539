"""Computes the result of a patched model in another way: for one sample, without padding, cache, and the hooks.

The inputs of the projector and of the language model are recorded on an unpatched model, and compressed by
`apet_kernels`. This module builds the shortened sequence and its positions, and calls the decoder layers one by one on
the prompt and the generated tokens. For the stage inside the language model the sequence is not shortened; from that
layer on, the keys of dropped tokens are masked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from conversations import FRAMES, Sample, Visual, collate, sources
from families import IMAGE, TILE, VIDEO, Family, core, reader
from torch import Tensor
from transformers import PreTrainedModel

import apet_kernels

Keep = int | float | Iterator[int] | None


@dataclass(frozen=True)
class Options:
    """The arguments of `apet.patch`, with the same names; a budget may be a list, one for each visual of the sample."""

    keep: Keep | list[Keep] = None
    basis: int | str = "keep"
    layout: str = "inplace"
    select: str = "qr"
    refine: int = 0
    blend: float = 1.0
    llm_layer: int | None = None
    llm_keep: Keep | list[Keep] = None
    positions: str | None = None


@dataclass(frozen=True)
class Expected:
    """The expected values for one sample."""

    logits: Tensor  # [1 + generated, V], from the last token of the prompt on
    source: Tensor  # positions of the shortened prompt's rows in the whole prompt, in the layers before `llm_layer`
    deep_source: Tensor  # the same in the other layers

    @property
    def length(self) -> int:
        return len(self.source)

    @property
    def deep_length(self) -> int:
        return len(self.deep_source)


@torch.no_grad()
def expected(
    model: PreTrainedModel,
    family: Family,
    row: Sample,
    generated: list[int],
    following: int | None = None,
    **options: Any,
) -> Expected:
    """Returns the results that the unpatched `model` would have if it were patched, for one sample and its generated
    tokens. These begin at position `following`, or after all others."""
    chosen = Options(**options)
    prompt = shorten(model, family, row, chosen)
    if following is not None:
        prompt.following = following
    logits, kept = language(model, prompt, generated, chosen)
    return Expected(logits, prompt.source, prompt.source[kept])


def budget(keep: Keep | list[Keep], visual: int, tokens: int, options: Options) -> int:
    """Returns the number of kept tokens in a visual's unit of `tokens`: a count, or a ratio of them, rounded half up.
    It is at least the smallest possible number, and at most `tokens`. An iterator has a count for each unit."""
    if isinstance(keep, list):
        keep = keep[visual]
    if isinstance(keep, Iterator):
        return next(keep)
    if keep is None:
        return tokens
    if isinstance(keep, float):
        keep = max(options.basis + 1 if options.layout == "overwrite" else 1, math.floor(keep * tokens + 0.5))
    return min(keep, tokens)


def compress(x: Tensor, keep: int, options: Options, layout: str) -> tuple[Tensor, Tensor]:
    """Runs the op on one unit x [N, C]. Returns rows [R, C], and the row of x that belongs to each."""
    if keep + (options.basis if layout == "append" else 0) >= len(x):
        return x, torch.arange(len(x))
    more = {"layout": layout, "select": options.select, "blend": options.blend, "refine": options.refine}
    basis = None if options.basis == "keep" else options.basis
    tokens, index = apet_kernels.compress(x[None].contiguous(), keep, basis, **more)
    return tokens[0], index[0]


def units(model: PreTrainedModel, family: Family, one: Visual) -> list[Tensor]:
    """Returns the placeholders of an image or video that are compressed together. Those in no unit are always kept."""
    every = torch.arange(one.count)
    if family.ragged:  # each temporal step
        return list(every.chunk(one.size[0]))
    if one.kind == "video":  # a frame, without the CLS of Video-LLaVA and the last newline of LLaVA-OneVision
        frames = every[: one.count // FRAMES * FRAMES].chunk(FRAMES)
        return [frame[1:] if family.name == "video_llava" else frame for frame in frames]
    if family.tiles:  # a tile, or the image of all tiles; without the newlines
        source = sources(model, one.size, len(one.pixels))
        if family.name == "llava_onevision":
            return [every[source >= 0]]
        return [every[source.div(TILE, rounding_mode="floor") == t] for t in range(len(one.pixels))]
    if family.name == "internvl":  # a tile
        return list(every.chunk(len(one.pixels)))
    return [every[1:] if family.name == "postcard" else every]


def cells(model: PreTrainedModel, family: Family, one: Visual) -> tuple[Tensor, int]:
    """Returns the row of the projector's input that each placeholder of an image comes from, and how many rows the
    image has."""
    if family.name == "postcard":
        return torch.arange(one.count) - 1, one.count - 1
    if family.tiles:
        return sources(model, one.size, len(one.pixels)), len(one.pixels) * TILE
    return torch.arange(one.count), one.count


@dataclass
class Prompt:
    """A prompt as it enters the decoder layers."""

    embeds: Tensor  # [L, D]
    positions: Tensor  # [L], or [3, L] with M-RoPE
    following: int  # the position of the first generated token
    groups: list[tuple[Tensor, int]]  # the rows of every unit, with the number of its visual
    deep: list[Tensor]  # for each early layer, the features [L, D] that are added after it
    source: Tensor  # [L], the position of each row in the whole prompt


def enter(model: PreTrainedModel, family: Family, row: Sample) -> tuple[dict[str, Any], Tensor | None]:
    """Returns the input of the language model (keyword arguments) and of the projector ([rows, C]) for a whole
    prompt."""
    seen: dict[str, Any] = {}
    features: list[Tensor] = []

    def language_model(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    def projector(_: torch.nn.Module, args: tuple) -> None:
        features.append(args[0].flatten(0, 1))

    if family.ragged:  # in some versions a prompt without a picture gets the offset of the prompt before it
        core(model).rope_deltas = None
    with ExitStack() as hooks:
        hooks.enter_context(reader(model).register_forward_pre_hook(language_model, with_kwargs=True))
        if family.projector:
            hooks.enter_context(core(model).get_submodule(family.projector).register_forward_pre_hook(projector))
        model(**collate(family, [row], dtype=model.dtype), use_cache=False)
    return seen, torch.cat(features) if features else None


def shorten(model: PreTrainedModel, family: Family, row: Sample, options: Options) -> Prompt:
    """Returns the prompt of one sample after the first stage."""
    seen, features = enter(model, family, row)
    embeds = seen["inputs_embeds"][0]
    L = len(embeds)
    ids = torch.tensor(row.ids)
    slots = {"image": (ids == IMAGE).nonzero().flatten(), "video": (ids == VIDEO).nonzero().flatten()}
    done = {"image": 0, "video": 0, "features": 0}
    at: list[Tensor] = []  # for each unit: the old positions of its rows,
    place: list[Tensor] = []  # their new positions,
    new: list[Tensor] = []  # their new values,
    visual: list[int] = []  # and the number of its image or video
    for v, one in enumerate(row.visuals):
        here = slots[one.kind][done[one.kind] : done[one.kind] + one.count]
        for unit in units(model, family, one):
            x, project = embeds[here[unit]], torch.nn.Identity()
            if family.projector:
                x = features[done["features"] + cells(model, family, one)[0][unit]]
                project = core(model).get_submodule(family.projector)
            rows, index = compress(x, budget(options.keep, v, len(unit), options), options, options.layout)
            at.append(here[unit[index]])
            place.append(here[unit[: len(rows)]] if options.layout == "append" else at[-1])
            new.append(project(rows) if len(index) < len(unit) else embeds[here[unit]])
            visual.append(v)
        done[one.kind] += one.count
        done["features"] += cells(model, family, one)[1] if family.projector else 0
    outside = torch.ones(L, dtype=torch.bool)
    for v, one in enumerate(row.visuals):
        first = sum(other.count for other in row.visuals[:v] if other.kind == one.kind)
        outside[slots[one.kind][first : first + one.count][torch.cat(units(model, family, one))]] = False
    alone = outside.nonzero().flatten()
    unit = torch.cat([*(torch.full((len(rows),), u) for u, rows in enumerate(at)), torch.full((len(alone),), -1)])
    source = torch.cat([*at, alone])
    order = torch.cat([*place, alone]).sort().indices  # the old order; appended basis rows are last in their unit
    source, unit, embeds = source[order], unit[order], torch.cat([*new, embeds[alone]])[order]
    deep = []
    for added in seen.get("deepstack_visual_embeds") or []:
        whole = torch.zeros(L, added.shape[-1], dtype=added.dtype)
        whole[seen["visual_pos_masks"][0]] = added
        deep.append(whole[source])
    groups = [((unit == u).nonzero().flatten(), v) for u, v in enumerate(visual)]
    if family.ragged:
        whole = torch.arange(L).expand(3, L) if seen["position_ids"] is None else seen["position_ids"][-3:, 0]
        return Prompt(embeds, whole[:, source], int(whole.max()) + 1, groups, deep, source)
    if options.positions == "keep":
        return Prompt(embeds, source, L, groups, deep, source)
    return Prompt(embeds, torch.arange(len(source)), len(source), groups, deep, source)


def language(model: PreTrainedModel, prompt: Prompt, generated: list[int], options: Options) -> tuple[Tensor, Tensor]:
    """Runs the decoder layers on the prompt and on the generated tokens.

    Returns the logits [1 + len(generated), V] from the prompt's end on, and which of its rows are kept [L].
    """
    text = reader(model)
    L, extra = len(prompt.embeds), len(generated)
    hidden = torch.cat([prompt.embeds, text.embed_tokens(torch.tensor(generated, dtype=torch.long))])[None]
    ahead = prompt.following + torch.arange(extra)
    positions = torch.cat([prompt.positions, ahead.expand(*prompt.positions.shape[:-1], extra)], dim=-1)
    kept = torch.ones(L + extra, dtype=torch.bool)
    for i, layer in enumerate(text.layers):
        if i == options.llm_layer:
            hidden, kept = second_stage(hidden, prompt.groups, options)
            if positions.ndim == 1 and options.positions != "keep":  # renumbered, as after the first stage
                positions = kept.cumsum(0) - 1
        allowed = torch.ones(L + extra, L + extra, dtype=torch.bool).tril() & kept
        if slides(text.config, i):  # over the columns in the input of the layer
            number = kept.cumsum(0)
            allowed &= number[:, None] - number < text.config.sliding_window
        allowed |= torch.eye(L + extra, dtype=torch.bool)  # so that no row is empty; dropped rows are not read
        mask = torch.zeros(L + extra, L + extra, dtype=hidden.dtype)
        mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[None, None]
        rotary = text.rotary_emb(hidden, positions.unsqueeze(-2))
        out = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = out[0] if isinstance(out, tuple) else out
        if i < len(prompt.deep):
            hidden[0, :L] += prompt.deep[i] * kept[:L, None]
    ends = torch.cat([kept[:L].nonzero()[-1], L + torch.arange(extra)])
    return model.lm_head(text.norm(hidden[:, ends]))[0], kept[:L]


def slides(config: Any, layer: int) -> bool:
    types = getattr(config, "layer_types", None)
    return bool(types) and types[layer] == "sliding_attention"


def second_stage(hidden: Tensor, groups: list[tuple[Tensor, int]], options: Options) -> tuple[Tensor, Tensor]:
    """Compresses every unit of hidden [1, L, D] in place; returns the result, and which rows are kept [L]."""
    hidden, kept = hidden.clone(), torch.ones(hidden.shape[1], dtype=torch.bool)
    layout = "inplace" if options.layout == "append" else options.layout
    for group, visual in groups:
        rows, index = compress(hidden[0, group], budget(options.llm_keep, visual, len(group), options), options, layout)
        kept[group] = False
        kept[group[index]] = True
        hidden[0, group[index]] = rows
    return hidden, kept
