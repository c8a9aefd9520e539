"""Finds the visual tokens of a call: the positions of their placeholders, and the image or video of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .adapter import Adapter
from .calling import versions
from .config import Keep
from .parts import of
from .state import RunningCall, Trace, has_pixels
from .target import Target
from .units import VisualTokens, group


def find(
    target: Target, call: RunningCall, generation: RunningCall | None, x: Tensor, start: int = 0
) -> tuple[Trace, VisualTokens]:
    """Returns the visual tokens of a call among the rows of its embeddings x [B, L, D], flattened to [B * L, D].

    generation: the call of generate() that this call is part of, if that has encoded the images; start: the first
    column of x in the prompt.
    """
    adapter, options, core, inputs = target.adapter, target.options, call.core, call.inputs
    batch, length = x.shape[:2]
    found_at = placeholders(adapter, core, inputs)
    rows = next(map(len, found_at.values()))
    if rows != batch:
        raise ValueError(f"the core model was called with {rows} rows, but calls its language model with {batch}")
    flats = {
        modality: where[:, start : start + length].flatten().nonzero().view(-1).to(x.device)
        for modality, where in found_at.items()
    }
    repeats = 1
    if not has_pixels(inputs):  # generate() has encoded the images before this forward
        if generation is None or not has_pixels(generation.inputs):
            raise ValueError("mm_encoder_outputs were encoded outside of this call; give the pixel values instead")
        inputs, repeats = generation.inputs, batch // generation.rows
    known = adapter.units(core, inputs, {m: len(flat) // repeats for m, flat in flats.items()})
    visuals, units, numbers, before = [], [], [], 0
    for modality, flat in flats.items():
        columns = flat.cpu()
        per_row = (columns // length).bincount(minlength=batch).tolist()
        found = known.get(modality)
        if found is None:
            lengths = contiguous_lengths(columns[columns // length % repeats == 0])
            found = [adapter.units_of_run(core, n) for n in adapter.split_runs(inputs, modality, lengths)]
        for row, number in by_row([len(u) for u in found], per_row, repeats, modality):
            visuals.append((modality, row, len(found[number])))
            units.append(found[number])
            numbers.append(before + number)
        before += len(found)
    check_list("keep", options.keep, before)
    check_list("llm_keep", options.llm_keep, before)
    flat = torch.cat([*flats.values()])
    return Trace(visuals, flat, [length]), group(units, flat, numbers)


def takes_images(target: Target, call: RunningCall, embeds: Any, cache: Cache | None) -> bool:
    """Returns whether a call of the language model with embeds [B, n, D] has the images and videos of the core model's
    call, and counts its columns.

    A core model may call its language model for one part of the prompt after another, with the same cache. One of these
    parts must have all images; those before and after it are text. Raises: ValueError for anything else.
    """
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        raise ValueError(
            f"{target.language_model_arguments.owner} was called without embeddings [B, L, D], so its images cannot "
            "be found"
        )
    start, length = call.columns, length_of(call.inputs)
    call.columns = end = start + embeds.shape[1]
    if start == 0 and end == length:
        return True
    called = (
        f"{type(call.core).__name__} calls its language model with columns {start} to {end - 1} of a prompt of "
        f"{length} tokens"
    )
    if end > length:
        raise ValueError(
            f"{called}, so its images cannot be found; expected one call with all tokens, or one after another with a "
            f"part of them ({versions()})"
        )
    held = None if cache is None else int(cache.get_seq_length())
    if held is None or (start and held != call.held):
        given = "no cache" if held is None else f"a cache of {held} tokens, not the {call.held} of the parts before"
        raise ValueError(f"{called}, and with {given}: a prefill in such parts is not supported ({versions()})")
    visual = torch.stack([*placeholders(target.adapter, call.core, call.inputs).values()]).any(0)
    here, everywhere = int(visual[:, start:end].sum()), int(visual.sum())
    if 0 < here < everywhere:
        raise ValueError(
            f"{called}, {here} of its {everywhere} placeholders of images and videos: of a prefill in several calls, "
            "one call must have all of them"
        )
    return here > 0


def check_all(call: RunningCall) -> None:
    """Raises ValueError if a core model has called its language model with a part of the prompt only."""
    length = length_of(call.inputs)
    if 0 < call.columns < length:
        raise ValueError(
            f"{type(call.core).__name__} has called its language model with {call.columns} of the {length} tokens of a "
            f"prompt, expected all ({versions()})"
        )


def length_of(inputs: Mapping[str, Any]) -> int:
    """Returns the length L of the prompt that a core model was called with."""
    ids = inputs.get("input_ids")
    length: int = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
    return length


def placeholders(adapter: Adapter, core: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns which tokens of a prompt [B, L] hold the features of each modality that the call brings, [B, L] bool."""
    found = {m: _placeholders(adapter, core, m, inputs) for m in sorted(adapter.modalities(inputs))}
    if set(found) == {"video"} and not found["video"].any():  # GLM's frames stand at placeholders of images
        return {"video": _placeholders(adapter, core, "image", inputs)}
    if len(found) > 1 and len({adapter.tokens[m] for m in found}) < len(found):
        raise ValueError(f"{' and '.join(found)} stand at the same placeholders, so they cannot be told apart")
    return found


def _placeholders(adapter: Adapter, core: nn.Module, modality: str, inputs: Mapping[str, Any]) -> Tensor:
    name = adapter.tokens.get(modality)
    token = None if name is None else of(core, name)
    if token is None:
        raise ValueError(
            f"{type(core.config).__name__} has no {name or f'{modality}_token_id'}, the placeholder of a modality "
            f"'{modality}'; an adapter's `tokens` says what it is called (docs/add-a-model.md)"
        )
    if inputs.get("input_ids") is not None:
        found: Tensor = inputs["input_ids"] == token
    else:  # as the model does, compare with the embedding of the placeholder
        given = inputs["inputs_embeds"]
        embedded = core.get_input_embeddings()(torch.tensor(token, device=given.device))
        found = (given == embedded.to(given.device)).all(-1)
    return found


def contiguous_lengths(flat: Tensor) -> list[int]:
    """Returns the lengths of the contiguous runs among ascending positions [N]."""
    return (flat.diff(prepend=flat[:1] - 2) != 1).cumsum(0).bincount()[1:].tolist()


def by_row(sizes: list[int], per_row: list[int], repeats: int, modality: str) -> list[tuple[int, int]]:
    """Assigns images or videos (of these sizes, in order) to rows of the batch: pairs (row, number), row after row.

    per_row: the number of placeholders of each row. `repeats` rows in succession are copies of one prompt (beams).
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
    if number != len(sizes):
        raise ValueError(f"{len(sizes)} of modality '{modality}' are given, but there are placeholders for {number}")
    return placed


def check_list(name: str, keep: Keep | None, visuals: int) -> None:
    """Raises ValueError if a list of budgets does not have one entry for each image and video."""
    if isinstance(keep, tuple) and len(keep) != visuals:
        raise ValueError(f"{name} has {len(keep)} entries, but the call has {visuals} images and videos")
