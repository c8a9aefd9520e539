"""The command `apet generate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import apet
from apet import ApetError
from apet.cli.arguments import (
    Basis,
    Device,
    Distinct,
    Frames,
    GuardLimit,
    GuardOption,
    Json,
    Layouts,
    Model,
    NewTokens,
    PositionsOption,
    Quiet,
    Refine,
    Relevance,
    Selection,
    Share,
    Weights,
    budget,
    source,
)
from apet.cli.output import hush, note, picture_paths, printable, progress, save
from apet.hub import first_line, need

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import nn


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to ask about the photos or the clip.")],
    image: Annotated[
        list[str] | None,
        typer.Option(parser=source, metavar="PHOTO", help="A file, - (standard input) or an address; may be repeated."),
    ] = None,
    video: Annotated[
        str | None, typer.Option(parser=source, metavar="CLIP", help="A short clip, instead of photos.")
    ] = None,
    frames: Frames = 8,
    keep: Annotated[
        float | None,
        typer.Option(
            parser=budget,
            metavar="COUNT|SHARE",
            help="Visual tokens to keep of each image, tile or frame: 64, 0.25 or 25%. \\[64]",
        ),
    ] = None,
    llm_layer: Annotated[int | None, typer.Option(help="Compress again after this many layers of the decoder.")] = None,
    llm_keep: Annotated[
        float | None, typer.Option(parser=budget, metavar="COUNT|SHARE", help="Tokens to keep at --llm-layer.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Both stages with the paper's budgets, such as paper-64.")] = None,
    layout: Layouts = None,
    select: Selection = None,
    basis: Basis = None,
    refine: Refine = 0,
    share: Share = False,
    relevance: Relevance = 0,
    distinct: Distinct = 0,
    guard: GuardOption = None,
    guard_limit: GuardLimit = None,
    positions: PositionsOption = None,
    max_new_tokens: NewTokens = 64,
    dtype: Weights = "auto",
    device: Device = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without compression, too.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Draw what was kept: a picture; a folder for several photos.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a vision-language model about photos or a clip, compressed, and show what compression saved."""
    if bool(image) == (video is not None):
        raise ApetError("give either photos (--image, repeatable) or one clip (--video)")
    if (keep, llm_layer, preset) == (None, None, None):
        keep = 64
    options = {"keep": keep, "llm_layer": llm_layer, "llm_keep": llm_keep, "preset": preset, "layout": layout}
    options |= {"select": select, "basis": basis, "refine": refine, "share": share}
    options |= {"relevance": relevance or None, "distinct": distinct or None, "positions": positions}
    options |= {"guard": guard, "guard_limit": guard_limit}
    files = image or [str(video)]
    hush(quiet)
    with progress(quiet) as bar:
        step = bar.add_task("reading", total=None)
        for module in ("numpy", "PIL", *(["matplotlib"] if out else [])):
            need(module)
        from apet import media, models

        found = [media.read(file, frames) for file in files]
        for item in found:
            if item.is_clip != (video is not None):
                raise ApetError(
                    f"{item.name} is a {'clip: give it as --video' if item.is_clip else 'photo: give it as --image'}"
                )
        pictures = picture_paths(files, out) if out else []
        bar.update(step, description="loading the model")
        lm, processor = models.load(model, [options], dtype, device)
        apet.patch(lm, **options)
        inputs = models.question(
            lm, processor, prompt, *(([f.frames[0] for f in found], None) if image else ([], found[0]))
        )
    note((f"{item.name}: {message}" for item in found for message in item.notes), quiet)
    drawn: list[Path] = []
    failed: Exception | None = None
    try:
        results = _answer(lm, processor, inputs, max_new_tokens, compare, show=not as_json)
    except (ValueError, RuntimeError) as error:  # the hooks' own messages, or no memory
        raise ApetError(first_line(error)) from error
    try:
        with progress(quiet) as bar:
            step = bar.add_task("measuring", total=None)
            results |= _measure(lm, inputs, max_new_tokens, show=not (as_json or quiet))
            for number, path in enumerate(pictures):
                bar.update(step, description=f"drawing {printable(path)}")
                save(_picture(lm, inputs, processor, number, len(pictures)), path)
                drawn.append(path)
    except (ApetError, ValueError, RuntimeError) as error:  # what there is already is printed before the error
        failed = error
    if as_json:
        read = [{"file": printable(i.name), "times": i.times, "notes": i.notes} for i in found]
        paths = [*map(printable, drawn)]
        print(json.dumps({"model": model, "prompt": prompt, "read": read, **results, "pictures": paths}, indent=2))
    elif not quiet:
        for path in drawn:
            Console().print(f"Picture: [bold]{escape(printable(path))}[/]", soft_wrap=True)
    if failed is not None:
        raise ApetError(first_line(failed)) from failed


def _picture(model: nn.Module, inputs: dict[str, Any], processor: Any, number: int, count: int) -> Figure:
    """Draws the picture of a photo or clip. Raises ValueError if the model does not see each of them as one."""
    from apet import kept, model_pictures

    found = kept(model)
    if found is not None and len(found.visuals) != count:
        raise ValueError(
            f"this model sees {count} photos or clips as {len(found.visuals)} images, so they cannot be drawn"
        )
    return model_pictures.picture(model, inputs, processor, number)


def _answer(
    model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int, compare: bool, show: bool
) -> dict[str, str]:
    """Returns the answer and, with `compare`, that of the uncompressed model. With `show` they are printed."""
    from apet import models
    from apet.model_report import engine_of, unpatched

    answers = {"answer": models.answer(model, processor, inputs, max_new_tokens, show)}
    if compare:
        if show:
            print("\nWithout compression:")
        with unpatched(engine_of(model)):
            answers["answer without compression"] = models.answer(model, processor, inputs, max_new_tokens, show)
    return answers


def _measure(model: nn.Module, inputs: dict[str, Any], max_new_tokens: int, show: bool) -> dict[str, Any]:
    """Returns the report of the saving for --json. With `show` it is printed."""
    from apet import model_report

    report = model_report.report(model, inputs, max_new_tokens=max_new_tokens, rounds=1)
    if show:
        Console().print(report)
    return {"report": asdict(report)}
