"""`apet generate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

import apet
from apet import Refused
from apet.cli.arguments import Device, Frames, Layout, Model, Weights, budget
from apet.cli.output import picture_paths, printable, progress, save
from apet.hub import first_line, need

if TYPE_CHECKING:
    from torch import nn


def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What to ask about the photos or the clip.")],
    image: Annotated[
        list[Path] | None, typer.Option(exists=True, dir_okay=False, help="A photo; may be repeated.")
    ] = None,
    video: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="A short clip, instead of photos.")
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
    llm_layer: Annotated[int | None, typer.Option(help="Compress again after so many layers of the decoder.")] = None,
    llm_keep: Annotated[
        float | None, typer.Option(parser=budget, metavar="COUNT|SHARE", help="Tokens to keep there.")
    ] = None,
    preset: Annotated[str | None, typer.Option(help="Both stages with the paper's budgets, such as paper-64.")] = None,
    layout: Annotated[Layout | None, typer.Option(help="Where basis tokens go.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer at most.")] = 64,
    dtype: Weights = "auto",
    device: Device = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without compression, too.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Draw what was kept: a picture; a folder for several photos.")
    ] = None,
) -> None:
    """Ask a vision-language model about photos or a clip, compressed, and show what compression saved."""
    if bool(image) == (video is not None):
        raise Refused("give photos (--image, once for each) or a clip (--video), one of the two")
    if (keep, llm_layer, preset) == (None, None, None):
        keep = 64
    options = {"keep": keep, "llm_layer": llm_layer, "llm_keep": llm_keep, "preset": preset, "layout": layout}
    files = image or [video]
    with progress() as bar:
        step = bar.add_task("reading", total=None)
        for module in ("numpy", "PIL", *(["matplotlib"] if out else [])):
            need(module)
        from apet import media, models

        found = [media.read(path, frames) for path in files]
        for item in found:
            if bool(item.times) != (video is not None):
                raise Refused(
                    f"{item.path} is a {'clip: give it as --video' if item.times else 'photo: give it as --image'}"
                )
        pictures = picture_paths(files, out) if out else []
        bar.update(step, description="loading the model")
        lm, processor = models.load(model, [options], dtype, device)
        apet.patch(lm, **options)
        inputs = models.question(
            lm, processor, prompt, *(([f.frames[0] for f in found], []) if image else ([], found[0].frames))
        )
    try:
        _answer(lm, processor, inputs, max_new_tokens, compare)
        from apet import model_report

        Console().print(model_report.report(lm, inputs, max_new_tokens=max_new_tokens, rounds=1))
        for number, path in enumerate(pictures):
            from apet import model_pictures

            save(model_pictures.picture(lm, inputs, processor, number), path)
            Console().print(f"Picture: [bold]{escape(printable(path))}[/]", soft_wrap=True)
    except (ValueError, RuntimeError) as error:  # the hooks' own messages, or no memory
        raise Refused(first_line(error)) from error


def _answer(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int, compare: bool) -> None:
    """The answer, and with `compare` that of the model without compression."""
    from apet import models
    from apet.model_report import engine_of, unpatched

    models.answer(model, processor, inputs, max_new_tokens)
    if compare:
        print("\nWithout compression:")
        with unpatched(engine_of(model)):
            models.answer(model, processor, inputs, max_new_tokens)
