"""The first stage: before the projector, or where the language model begins; there the sequence gets shorter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import Keep, Options
from .sequence import Packing, counted, padding
from .state import PREFILL, Prompt, Run, Trace, part
from .units import Shorter, Tokens, group, shorten

if TYPE_CHECKING:
    from .engine import Engine

GONE = -math.inf  # every channel of a row that the projector did not see


@dataclass
class Projected:
    """Which rows of the projector's input [tiles, N, C] it got, and how many there were."""

    slots: Tensor
    shape: tuple[int, int]


@torch.compiler.disable(reason=PREFILL)
def project_fewer(engine: Engine, inputs: Mapping[str, Any], x: Tensor) -> Tensor | None:
    """The projector's input [tiles, N, C] -> [1, kept, C]; None where nothing is dropped."""
    units = engine.adapter.features(engine.core, inputs, x)
    check_list("keep", engine.options.keep, len(units))
    x, shape = x.flatten(0, 1), (x.shape[0], x.shape[1])  # [tiles * N, C]
    tokens = group(units, torch.arange(len(x), device=x.device), range(len(units)))
    shorter = shorten(x, tokens, engine.options.keep, engine.options)
    if shorter is None:
        return None
    slots = shorter.tokens.where
    engine.projected = Projected(slots, shape)
    return x.index_copy(0, shorter.slots, shorter.rows)[slots][None]


def project_back(projected: Projected, y: Tensor) -> Tensor:
    """The projector's result [1, kept, D] -> [tiles, N, D], marked where there was nothing."""
    full = y.new_full((math.prod(projected.shape), y.shape[-1]), GONE)
    full[projected.slots] = y[0]
    return full.unflatten(0, projected.shape)


@torch.compiler.disable(reason=PREFILL)
def begin(engine: Engine, inputs: Mapping[str, Any], kwargs: dict[str, Any]) -> Run | None:
    """A prefill with visual inputs: finds their tokens and shortens what the language model is given, in `kwargs`.

    None where there is no placeholder, so that neither stage has anything to do.
    """
    x = kwargs["inputs_embeds"]  # [B, L, D]
    batch, length = x.shape[:2]
    cache = kwargs.get("past_key_values")
    engine.trace, tokens = find(engine, inputs, x)
    if not tokens.lengths:
        return None
    positions = kwargs.get("position_ids")
    if kwargs.get("attention_mask") is None and positions is not None:
        check_one_sequence(positions)
    valid = padding(kwargs.get("attention_mask"), batch, length, x.device, engine.window)
    if not valid.flatten()[tokens.where].all():
        raise ValueError("attention_mask hides placeholders of images or videos, which cannot be compressed then")
    left = bool(valid[:, -1].all())
    run = Run(Prompt(None, None, batch, length, 0, needed(tokens, length, left)), tokens, valid, left)
    rows = x.flatten(0, 1)
    shorter = None
    if engine.options.keep is not None:
        find_shorter = marked if engine.adapter.projector else shorten
        shorter = find_shorter(rows, tokens, engine.options.keep, engine.options)
    if shorter is None:
        return run
    packing = shorter.pack(valid, run.left)
    if engine.adapter.positions == "renumber":
        kwargs["position_ids"], following = counted(packing.valid), packing.valid.sum(1, keepdim=True)
    else:
        if positions is None:
            positions = torch.arange(length, device=x.device)[None]
        kwargs["position_ids"], following = kept_positions(positions, valid, packing)
    kwargs["inputs_embeds"] = shorter.placed(packing, x)
    kwargs["attention_mask"] = packing.valid.long()
    if kwargs.get("cache_position") is not None:
        kwargs["cache_position"] = torch.arange(packing.valid.shape[1], device=x.device)
    engine.adapter.follow(packing, kwargs)
    engine.trace.stage(shorter, packing)
    run.tokens, run.valid = shorter.tokens.moved(packing), packing.valid
    run.prompt.early = part(cache, packing.valid, following, engine.flash)
    run.prompt.dropped = length - packing.valid.shape[1]
    run.prompt.least = needed(run.tokens, packing.valid.shape[1], run.left)
    return run


def check_one_sequence(positions: Tensor) -> None:
    """Refuses positions [B, L], or [4, B, L] with those of the text first, by which transformers tells packed sequences
    apart where there is no mask."""
    if positions.dim() == 3 and len(positions) != 4:  # M-RoPE alone tells nothing apart
        return
    text = positions[0] if positions.dim() == 3 else positions
    if (text.diff(dim=-1) < 0).any():
        raise ValueError("position_ids start again within a row: packed sequences with images cannot be compressed")


def needed(tokens: Tokens, length: int, left: bool) -> int | Tensor:
    """How many columns of a prompt [B, length] end with its last visual token; all, if padding follows the text."""
    return (tokens.where % length).max() + 1 if left else length


def kept_positions(positions: Tensor, valid: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Positions [.., B or 1, L] as given -> those of the tokens that stay, and the one that comes next [B, 1].

    Of four rows the first counts tokens, as transformers wants it to tell sequences apart; the others are M-RoPE's.
    """
    rotary = positions[-3:] if positions.dim() == 3 else positions[None]
    following = torch.where(valid, rotary, -1).amax(dim=(0, 2))[:, None] + 1
    positions = packing.along(positions, -1)
    if positions.dim() == 3 and len(positions) == 4:
        positions = torch.cat([counted(packing.valid)[None], positions[1:]])
    return positions, following


def find(engine: Engine, inputs: Mapping[str, Any], x: Tensor) -> tuple[Trace, Tokens]:
    """The visual tokens of a call among the rows of its embeddings x [B, L, D], flattened to [B * L, D]."""
    batch, length = x.shape[:2]
    flats = {m: placeholders(engine, m, inputs, x) for m in sorted(engine.adapter.brings(inputs))}
    repeats = 1
    if not brings_pixels(inputs):  # generate() has encoded them before this forward
        if engine.generating is None or not brings_pixels(engine.generating):
            raise ValueError("mm_encoder_outputs were encoded outside of this call; give the pixel values instead")
        inputs, repeats = engine.generating, batch // engine.rows
    known = engine.adapter.visuals(engine.core, inputs, {m: len(flat) // repeats for m, flat in flats.items()})
    visuals, units, numbers, before = [], [], [], 0
    for modality, flat in flats.items():
        columns = flat.cpu()
        per_row = (columns // length).bincount(minlength=batch).tolist()
        found = known.get(modality)
        if found is None:
            lengths = runs(columns[columns // length % repeats == 0])
            found = [engine.adapter.run(engine.core, n) for n in lengths]
        for row, number in by_row([len(u) for u in found], per_row, repeats, modality):
            visuals.append((modality, row, len(found[number])))
            units.append(found[number])
            numbers.append(before + number)
        before += len(found)
    check_list("keep", engine.options.keep, before)
    check_list("llm_keep", engine.options.llm_keep, before)
    flat = torch.cat([*flats.values()])
    return Trace(visuals, flat, [length]), group(units, flat, numbers)


def brings_pixels(inputs: Mapping[str, Any]) -> bool:
    """Whether images or videos are given as they are, not encoded."""
    return any(name.startswith("pixel_values") and value is not None for name, value in inputs.items())


def placeholders(engine: Engine, modality: str, inputs: Mapping[str, Any], x: Tensor) -> Tensor:
    """The rows of x [B, L, D], flattened, that hold the features of a modality, ascending."""
    token = getattr(engine.core.config, engine.adapter.tokens[modality])
    if inputs.get("input_ids") is not None:
        there = inputs["input_ids"] == token
    else:  # the model looks for the placeholder's embedding, too
        given = inputs["inputs_embeds"]
        there = (given == engine.core.get_input_embeddings()(torch.tensor(token, device=given.device))).all(-1)
    return there.flatten().nonzero().view(-1).to(x.device)


def runs(flat: Tensor) -> list[int]:
    """The lengths of the contiguous runs among ascending positions [N]."""
    return (flat.diff(prepend=flat[:1] - 2) != 1).cumsum(0).bincount()[1:].tolist()


def by_row(sizes: list[int], per_row: list[int], repeats: int, modality: str) -> list[tuple[int, int]]:
    """Which image or video (of these sizes, in order) stands in which row: pairs (row, number), row after row.

    per_row: the placeholders of each row. `repeats` rows in succession are copies of one prompt (beams).
    """
    placed, number = [], 0
    for row in range(0, len(per_row), repeats):
        first, missing = number, per_row[row]
        while missing > 0 and number < len(sizes):
            missing -= sizes[number]
            number += 1
        if missing:
            raise ValueError(
                f"row {row} has {per_row[row]} placeholders of modality '{modality}', but its share of "
                f"{len(sizes)} has sizes {sizes[first:number]}"
            )
        placed += [(row + copy, n) for copy in range(repeats) for n in range(first, number)]
    return placed


def marked(x: Tensor, tokens: Tokens, keep: Keep, options: Options) -> Shorter | None:
    """`shorten` where the projector's hooks have done the work: the marked rows of x [T, D] leave."""
    left = tokens.after(keep, options)
    expected = sum(tokens.lengths) - sum(left)
    if not expected:
        return None
    gone = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    gone[tokens.where] = (x[tokens.where] == GONE).all(-1)
    found = int(gone.sum())
    if found != expected:
        raise ValueError(
            f"{found} instead of {expected} tokens were dropped before the projector: these features were encoded "
            "outside of this call, or by a model patched otherwise"
        )
    none = tokens.where[:0]
    return Shorter(gone, none, none, x[none], tokens.without(gone, left))


def check_list(name: str, keep: Keep | None, visuals: int) -> None:
    """Refuses a list of budgets that does not fit the call."""
    if isinstance(keep, tuple) and len(keep) != visuals:
        raise ValueError(f"{name} has {len(keep)} entries, but the call has {visuals} images and videos")
