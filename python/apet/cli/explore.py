"""The command `apet explore`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from apet.cli.arguments import Device, Frames, Weights
from apet.cli.output import progress
from apet.hub import need


def explore(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[PHOTO|CLIP]", exists=True, dir_okay=False, help="The file to open."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A vision-language model to ask, from Hugging Face: an id or a folder."),
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="CLIP, SigLIP or DINOv2 from Hugging Face, whose tokens are shown.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Layer of the encoder; negative counts from the last (-1).")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels that a square photo is scaled to.")] = None,
    frames: Frames = 8,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860.")] = None,
    max_size: Annotated[int, typer.Option(min=1, help="The most megabytes of a file dropped on the page.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 64,
    dtype: Weights = "auto",
    device: Device = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page.")] = True,
) -> None:
    """Open a local page that shows which tokens of a photo or clip are kept, with sliders for the settings."""
    with progress() as bar:
        step = bar.add_task("loading the encoder", total=None)
        for module in ("numpy", "PIL", "matplotlib"):
            need(module)
        need("gradio", "explore")
        from apet import encoders
        from apet.explore.asking import Asker
        from apet.explore.explorer import Explorer
        from apet.explore.files import Files
        from apet.explore.page import build, serve

        files = Files(encoders.load(encoder, layer=layer, size=size), frames)
        if file is not None:
            bar.update(step, description="reading")
            files.get(file.resolve())
        asker = None
        if model is not None:
            bar.update(step, description="loading the model")
            asker = Asker(model, frames, max_new_tokens, dtype, device)
        page = build(Explorer(files, asker), file)
        address = serve(page, port=port, megabytes=max_size, allowed=[file] if file else [], browser=browser)
    Console().print(f"The page is at [bold]{address}[/], on this machine alone. Ctrl+C ends it.", soft_wrap=True)
    page.block_thread()
