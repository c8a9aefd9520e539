"""Finds the visual tokens of a call: the positions of their placeholders, and the image or video of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .config import Keep
from .parts import of
from .state import Call, Trace, brings_pixels
from .target import Target
from .units import Tokens, group


def find(target: Target, call: Call, generation: Call | None, x: Tensor) -> tuple[Trace, Tokens]:
    """Returns the visual tokens of a call among the rows of its embeddings x [B, L, D], flattened to [B * L, D].

    generation: the call of generate() that this call is part of, if that has encoded the images.
    """
    adapter, options, core, inputs = target.adapter, target.options, call.core, call.inputs
    batch, length = x.shape[:2]
    flats = {m: placeholders(adapter, core, m, inputs, x) for m in sorted(adapter.brings(inputs))}
    if set(flats) == {"video"} and not len(flats["video"]):  # GLM's frames stand at placeholders of images
        flats = {"video": placeholders(adapter, core, "image", inputs, x)}
    elif len(flats) > 1 and len({adapter.tokens[m] for m in flats}) < len(flats):
        raise ValueError(f"{' and '.join(flats)} stand at the same placeholders, so apet cannot tell them apart")
    repeats = 1
    if not brings_pixels(inputs):  # generate() has encoded the images before this forward
        if generation is None or not brings_pixels(generation.inputs):
            raise ValueError("mm_encoder_outputs were encoded outside of this call; give the pixel values instead")
        inputs, repeats = generation.inputs, batch // generation.rows
    known = adapter.visuals(core, inputs, {m: len(flat) // repeats for m, flat in flats.items()})
    visuals, units, numbers, before = [], [], [], 0
    for modality, flat in flats.items():
        columns = flat.cpu()
        per_row = (columns // length).bincount(minlength=batch).tolist()
        found = known.get(modality)
        if found is None:
            lengths = contiguous_lengths(columns[columns // length % repeats == 0])
            found = [adapter.run(core, n) for n in adapter.apart(inputs, modality, lengths)]
        for row, number in by_row([len(u) for u in found], per_row, repeats, modality):
            visuals.append((modality, row, len(found[number])))
            units.append(found[number])
            numbers.append(before + number)
        before += len(found)
    check_list("keep", options.keep, before)
    check_list("llm_keep", options.llm_keep, before)
    flat = torch.cat([*flats.values()])
    return Trace(visuals, flat, [length]), group(units, flat, numbers)


def placeholders(adapter: Adapter, core: nn.Module, modality: str, inputs: Mapping[str, Any], x: Tensor) -> Tensor:
    """Returns the rows of x [B, L, D], flattened, that hold the features of a modality, ascending."""
    name = adapter.tokens.get(modality)
    token = None if name is None else of(core, name)
    if token is None:
        raise ValueError(
            f"{type(core.config).__name__} has no {name or f'{modality}_token_id'}, the placeholder of a modality "
            f"'{modality}'; an adapter's `tokens` says what it is called (docs/add-a-model.md)"
        )
    if inputs.get("input_ids") is not None:
        is_placeholder = inputs["input_ids"] == token
    else:  # as the model does, compare with the embedding of the placeholder
        given = inputs["inputs_embeds"]
        embedded = core.get_input_embeddings()(torch.tensor(token, device=given.device))
        is_placeholder = (given == embedded.to(given.device)).all(-1)
    if is_placeholder.shape != x.shape[:2]:
        raise ValueError(
            f"the core model was called with {tuple(is_placeholder.shape)} tokens, but calls its language model with "
            f"{tuple(x.shape[:2])}: apet does not know where its images are then, and does not support a prefill in "
            "several calls"
        )
    return is_placeholder.flatten().nonzero().view(-1).to(x.device)


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
