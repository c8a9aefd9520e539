"""Draws the picture of `apet compress` for a patched model, from its own prefill."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from apet import outcome
from apet.calls import RecordedCall, Recorder
from apet.hooks import kept
from apet.hooks.engine import Engine
from apet.hooks.units import VisualTokens
from apet.model_report import GREEDY, engine_of, generating
from apet.pictures import PATCH, Panel, clip_figure, photo_figure

FIRST = "after the encoder"
UnitKey = tuple[int, int]  # the number of an image or video in the call, and of a unit within it


def picture(model: nn.Module, inputs: Mapping[str, Any], processor: Any, visual: int = 0) -> Figure:
    """Draws what a patched model keeps of an image or video: the kept tokens, the merges and the residual.

    Args:
        model: a model that `apet.patch` has patched.
        inputs: arguments of `model.generate(**inputs)`; one prefill is run with them.
        processor: the one that made the inputs; its image_mean and image_std convert pixel values back to pictures.
        visual: number of the image or video, as in `apet.kept(model).visuals`.

    Returns:
        A figure with a column for each tile or frame and each stage; `figure.savefig("picture.png")` writes it.

    Raises:
        ValueError: the model is not patched or does not generate, the inputs hold a cache, there is no such image, none
            of its tokens was dropped, or the positions of its tokens in the image are not known (models that crop or
            scale projected features).

    Example:
        >>> apet.patch(model, keep=64)
        >>> apet.picture(model, inputs, processor).savefig("picture.png")
    """
    drawn = panels(model, inputs, processor, visual)
    engine, found = engine_of(model), kept(model)
    assert found is not None  # the panels are those of a prefill
    seen = found.visuals[visual]
    options, name = engine.options, type(engine.model).__name__
    counts, extra = [seen.tokens, *map(len, seen.remaining)], ""
    if options.layout == "append":  # the rows of basis tokens are not positions
        counts[1] = sum(len(panel.frame.kept) for panel in drawn)
        extra = f" + {sum(len(panel.frame.basis) for panel in drawn)} basis"
    title = f"{seen.modality} {visual + 1}: {' → '.join(map(str, counts))}{extra} tokens"
    stages = [] if options.keep is None else [f"keep {options.keep}"]
    stages += [] if options.llm_keep is None else [f"keep {options.llm_keep} after layer {options.llm_layer}"]
    subtitle = f"{name}, {', '.join(stages)}   ·   {outcome.describe(options)}"
    return photo_figure(drawn[0], title, subtitle) if len(drawn) == 1 else clip_figure(drawn, title, subtitle)


def panels(model: nn.Module, inputs: Mapping[str, Any], processor: Any, visual: int = 0) -> list[Panel]:
    """Returns the panels that `picture` draws, one for every tile or frame that lost tokens, stage after stage.
    Arguments and errors are those of `picture`."""
    engine = generating(model, inputs)
    calls, projected = _prefill(engine, inputs)
    visuals = _visuals(engine)
    if not 0 <= visual < len(visuals):
        raise ValueError(f"visual={visual} is none of the {len(visuals)} images and videos of the inputs")
    if projected is None:
        units, per_tile = _placeholder_units(engine, inputs), None
    else:
        units, per_tile = engine.adapter.units_before_projector(engine.core, inputs, projected), projected.shape[1]
    tiles = _tiles(engine, inputs, units, per_tile, processor, visual)
    modality = visuals[visual][0]
    drawn = []
    for stage, (_, number), places, frame in _frames(engine, units, calls, visual):
        first = int((units[visual] == number).nonzero()[0])
        tile, places = (number, places - first) if per_tile is None else (first // per_tile, places % per_tile)
        photo, (rows, columns) = tiles[tile]
        labels = [f"{'step' if modality == 'video' else 'tile'} {tile + 1}"] if len(tiles) > 1 else []
        labels += [stage] if engine.options.llm_keep is not None else []
        panel = Panel(photo, _spread(frame, places, rows * columns), (rows, columns), ", ".join(labels))
        drawn.append((stage, panel))
    if not drawn:
        raise ValueError(f"nothing was dropped of image or video {visual}, so there is nothing to draw")
    if len({stage for stage, _ in drawn}) > 1:  # features before and inside the language model differ in scale
        for _, panels_of_stage in itertools.groupby(drawn, lambda one: one[0]):
            frames = [panel.frame for _, panel in panels_of_stage]
            finite = np.concatenate([frame.residual[np.isfinite(frame.residual)] for frame in frames])
            for frame in frames:
                frame.residual = frame.residual / max(finite.max(initial=0.0), 1e-12)
    return [panel for _, panel in drawn]


def _prefill(engine: Engine, inputs: Mapping[str, Any]) -> tuple[list[RecordedCall], Tensor | None]:
    """Runs a prefill. Returns its calls of the op, and the projector's input [tiles, N, C] if that is compressed."""
    projected: list[Tensor] = []
    with Recorder() as recorder, ExitStack() as hooks:
        if engine.adapter.projector is not None:
            projector = engine.core.get_submodule(engine.adapter.projector)
            seen = projector.register_forward_pre_hook(lambda _, args: projected.append(args[0]), prepend=True)
            hooks.enter_context(seen)
        engine.model.generate(**inputs, **GREEDY, max_new_tokens=1)
    if not recorder.calls:
        raise ValueError(f"nothing was dropped, so there is nothing to draw: {engine.options}")
    return recorder.calls, projected[0] if projected else None


def _visuals(engine: Engine) -> list[tuple[str, int, int]]:
    """Returns modality, row and number of placeholders of every image and video of the last prefill."""
    trace = engine.trace
    assert trace is not None  # such a prefill has run
    return trace.visuals


def _placeholder_units(engine: Engine, inputs: Mapping[str, Any]) -> list[Tensor]:
    """Returns the unit of each placeholder of every image and video; -1: none."""
    visuals = _visuals(engine)
    counts: dict[str, int] = {}
    for modality, _, tokens in visuals:
        counts[modality] = counts.get(modality, 0) + tokens
    known = {m: iter(u) for m, u in engine.adapter.units(engine.core, inputs, counts).items()}
    return [
        next(known[m]) if m in known else engine.adapter.units_of_run(engine.core, tokens) for m, _, tokens in visuals
    ]


def _frames(
    engine: Engine, units: Sequence[Tensor], calls: Sequence[RecordedCall], visual: int
) -> Iterator[tuple[str, UnitKey, np.ndarray, outcome.Frame]]:
    """Yields the result of every call for the units of an image: the stage, the unit, the positions of its tokens
    among the rows of `units` [rows] of the image, and the outcome for each token."""
    options = engine.options
    owners = [(v, n) for v, of in enumerate(units) for n in of[of >= 0].unique().tolist()]
    places = {(v, n): (units[v] == n).nonzero().view(-1).numpy() for v, n in owners}
    waiting = iter(calls)
    for stage, keep in ((FIRST, options.keep), (f"after layer {options.llm_layer}", options.llm_keep)):
        if keep is None:
            continue
        lengths = [len(places[unit]) for unit in owners]
        remaining = VisualTokens(torch.empty(0), lengths, [v for v, _ in owners]).after(keep, options)
        active = [unit for unit, k, n in zip(owners, remaining, lengths, strict=True) if k < n]
        if not active:
            continue
        for unit, (x, stay) in zip(active, _images(next(waiting)), strict=True):
            if unit[0] == visual:
                yield stage, unit, places[unit], _frame(x, stay, engine)
            places[unit] = places[unit][stay.numpy()]


def _images(call: RecordedCall) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the tokens [n, D] of every image of a call, and the positions [k] of those that were kept."""
    extra = call.options["basis"] if call.options["layout"] == "append" else 0  # never None with "append"
    start = row = 0
    for n, k in zip(call.lengths, call.keeps, strict=True):
        yield call.x[start : start + n], (call.indices[row : row + k] - start).cpu()
        start, row = start + n, row + k + extra


def _frame(x: Tensor, stay: Tensor, engine: Engine) -> outcome.Frame:
    options = engine.options
    arguments = outcome.OpArguments(options.basis, options.layout, options.select, refine=options.refine)
    residual, basis = (t[0].cpu() for t in outcome.score(x[None], arguments))
    return outcome.frame(x.cpu(), stay, residual, basis[basis >= 0], options.layout)


def _spread(frame: outcome.Frame, places: np.ndarray, total: int) -> outcome.Frame:
    """Converts the frame of tokens at some places [n] of a grid to a frame of the whole grid with `total` places."""
    retained: np.ndarray = np.zeros(total, bool)
    target, residual = np.full(total, -1), np.zeros(total)
    retained[places], residual[places] = frame.retained, frame.residual
    target[places] = np.where(frame.target_position >= 0, places[frame.target_position], -1)
    return outcome.Frame(places[frame.kept], places[frame.basis], places[frame.overwritten], retained, target, residual)


def _tiles(
    engine: Engine,
    inputs: Mapping[str, Any],
    units: Sequence[Tensor],
    per_tile: int | None,
    processor: Any,
    visual: int,
) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Returns the tiles or frames of an image or video, [rows * PATCH, columns * PATCH, 3] in 0..1, each with its rows
    and columns of tokens."""
    visuals = _visuals(engine)
    modality = visuals[visual][0]
    of_kind = [units[v] for v, (m, _, _) in enumerate(visuals) if m == modality]
    number = visual - next(v for v, (m, _, _) in enumerate(visuals) if m == modality)
    name = "pixel_values_videos" if modality == "video" else "pixel_values"
    pixels = inputs.get(name)
    if pixels is None:
        pixels = inputs["pixel_values_images"]  # Video-LLaVA's in transformers 4
    pixels = pixels.float().cpu()
    mine = units[visual]
    unknown = ValueError(
        f"the places of the {len(mine)} tokens of {modality} {visual} of a {engine.model.config.model_type} model in "
        "its pixels are not known, so they cannot be drawn"
    )
    grids = inputs.get(f"{modality}_grid_thw")
    if grids is not None:
        steps, high, wide = grids[number].tolist()
        merge = math.isqrt(steps * high * wide // len(mine))
        before = int(grids[:number].prod(1).sum())
        patches = pixels[before : before + steps * high * wide]
        grid = (high // merge, wide // merge)
        views = _unfold(patches, steps, *grid, merge, engine.core.config.vision_config.temporal_patch_size)
    else:
        tokens = int((mine == mine.max()).sum()) if per_tile is None else per_tile
        side = math.isqrt(tokens)
        if side * side != tokens or (per_tile is None and "image_sizes" in inputs and modality == "image"):
            raise unknown
        grid = (side, side)
        ends = torch.tensor([0, *(int(u.max()) + 1 for u in of_kind)]).cumsum(0)
        if pixels.dim() == 5 and len(pixels) == len(of_kind):
            views = pixels[number]
        elif pixels.dim() == 4 and len(pixels) == int(ends[-1]):  # tiles of all images, one after another
            views = pixels[ends[number] : ends[number + 1]]
        else:
            raise unknown
        if views.dim() != 4 or views.shape[1] != 3:  # patches, or tiles that are images by themselves
            raise unknown
    return [(_photo(view, grid, processor), grid) for view in views]


def _unfold(patches: Tensor, steps: int, rows: int, columns: int, merge: int, times: int) -> Tensor:
    """Converts Qwen's patches [steps * rows * columns * merge^2, 3 * times * p * p], in which the patches of a token
    are adjacent, to the first frame of every step [steps, 3, rows * merge * p, columns * merge * p]."""
    p = math.isqrt(patches.shape[1] // (3 * times))
    blocks = patches.view(steps, rows, columns, merge, merge, 3, times, p, p)[:, :, :, :, :, :, 0]
    return blocks.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(steps, 3, rows * merge * p, columns * merge * p)


def _photo(view: Tensor, grid: tuple[int, int], processor: Any) -> np.ndarray:
    """Converts pixel values [3, H, W] to a photo [rows * PATCH, columns * PATCH, 3] in 0..1."""
    images = getattr(processor, "image_processor", processor)
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    pixels = ((view * std + mean).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    rows, columns = grid
    resized = Image.fromarray(pixels).resize((columns * PATCH, rows * PATCH), Image.Resampling.BICUBIC)
    photo: np.ndarray = np.asarray(resized, np.float32) / 255
    return photo
