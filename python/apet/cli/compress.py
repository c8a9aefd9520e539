"""The command `apet compress`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from apet import ApetError
from apet.cli.arguments import (
    BASIS_HELP,
    Backend,
    Frames,
    Json,
    Layout,
    Quiet,
    Refine,
    Select,
    basis_count,
    budget,
    source,
)
from apet.cli.output import check_report, note, percent, picture_paths, printable, progress, save, table
from apet.hub import first_line, need

if TYPE_CHECKING:
    from apet.encoders import Encoder
    from apet.explore.report import Entry
    from apet.media import Media
    from apet.outcome import Frame, Measure, OpArguments

MOST_TOKENS = 65536  # of one image


@dataclass
class Source:
    """A photo or clip that was read once. Frames of a file on a disk are read again when they are needed: those of a
    hundred photos would not fit into memory."""

    path: str
    name: str
    size: tuple[int, int]
    notes: list[str]
    frames: int
    held: Media | None

    @classmethod
    def of(cls, path: str, frames: int) -> Source:
        """Reads it. Raises: ApetError if it cannot be read."""
        from apet import media

        item = media.read(path, frames)
        return cls(path, item.name, item.size, item.notes, frames, None if media.is_file(path) else item)

    def item(self) -> Media:
        """Returns its frames. Raises: ApetError if they have another size now."""
        from apet import media

        item = self.held or media.read(self.path, self.frames)
        if item.size != self.size:
            raise ApetError(f"{self.name} has changed: it has {item.size} pixels now, and had {self.size}")
        return item


@dataclass
class Job:
    """One photo or clip that has passed every check."""

    source: Source
    grid: tuple[int, int]  # rows, columns of patches
    keep: int
    picture: Path

    @property
    def name(self) -> str:
        """The last part of the source's path."""
        return PurePath(self.source.name).name


def compress(
    files: Annotated[
        list[str],
        typer.Argument(
            parser=source, metavar="PHOTO|VIDEO...", help="Photos or short clips: files, - (standard input), addresses."
        ),
    ],
    keep: Annotated[
        float,
        typer.Option(parser=budget, metavar="COUNT|SHARE", help="Tokens to keep of each image: 64, 0.25 or 25%."),
    ] = 64,
    basis: Annotated[Any, typer.Option(parser=basis_count, metavar="COUNT|keep", help=BASIS_HELP)] = "keep",
    layout: Annotated[Layout, typer.Option(help="Where basis tokens are placed.")] = "inplace",
    select: Annotated[Select, typer.Option(help="How the basis is picked.")] = "qr",
    start: Annotated[int, typer.Option(min=-1, help="First basis token; -1 is the one of largest norm.")] = -1,
    blend: Annotated[
        float, typer.Option(min=0, max=1, help="With overwrite: weight of the basis token in an overwritten row.")
    ] = 1.0,
    refine: Refine = 0,
    backend: Annotated[Backend | None, typer.Option(help="Default: the best one available.")] = None,
    model: Annotated[
        str | None, typer.Option(help="CLIP, SigLIP or DINOv2 from Hugging Face: an id or a folder.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer whose output is taken; negative counts from the last (-1).")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels that a square photo is scaled to.")] = None,
    frames: Frames = 8,
    out: Annotated[
        Path | None, typer.Option(help="The picture; a folder for several. Default: <name>.apet.png here.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Write one HTML page (.html) about all files, too.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compress the patch tokens of photos or clips, and draw the kept tokens, the merges and the residual."""
    with progress(quiet) as bar:
        step = bar.add_task("reading", total=None)
        for module in ("numpy", "PIL", "matplotlib"):
            need(module)
        from apet import encoders, media
        from apet.outcome import OpArguments

        arguments = OpArguments(basis, layout, select, start, blend, backend, refine)
        found = []
        for file in files:
            bar.update(step, description=f"reading {printable(media.shown(file))}")
            found.append(Source.of(file, frames))
        pictures = picture_paths(files, out)
        if report is not None:
            check_report(report, files)
        bar.update(step, description="loading the encoder")
        encoder = encoders.load(model, layer=layer, size=size)
        jobs = [_job(*each, encoder, keep, arguments) for each in zip(found, pictures, strict=True)]
        results, entries = [], []
        bar.update(step, total=len(jobs))
        for job in jobs:
            bar.update(step, description=printable(job.name))
            item = job.source.item()
            result, frame = _compress(job, item, encoder, arguments)
            results.append(result)
            if report is not None:
                entries.append(_entry(job, item, frame, result, len(entries), encoder))
            bar.advance(step)
        if report is not None:
            from apet.explore.report import write
            from apet.outcome import describe

            write(entries, report, f"{encoder.name}, layer {encoder.layer}; {describe(arguments)}")
    note((f"{item.name}: {message}" for item in found for message in item.notes), quiet)
    if as_json:
        print(json.dumps(results, indent=2))
    elif not quiet:
        _print_tables(results, encoder, arguments)


def _job(source: Source, picture: Path, encoder: Encoder, keep: float, arguments: OpArguments) -> Job:
    """Makes the job of one photo or clip. Raises: ApetError if the arguments do not fit its number of tokens."""
    from apet import outcome
    from apet.hooks.config import share_of

    rows, cols = encoder.grid(*source.size)
    tokens = rows * cols
    if tokens > MOST_TOKENS:
        raise ApetError(f"{source.name} would become {tokens} tokens, more than {MOST_TOKENS}: choose a smaller size")
    job = Job(source, (rows, cols), keep if isinstance(keep, int) else max(1, share_of(keep, tokens)), picture)
    try:
        outcome.check(tokens, job.keep, arguments)
    except (ValueError, RuntimeError) as error:
        raise ApetError(f"{source.name}: {first_line(error)}") from error
    return job


def _compress(job: Job, item: Media, encoder: Encoder, arguments: OpArguments) -> tuple[dict[str, Any], Frame]:
    """Encodes, compresses, measures and draws one photo or clip. Returns its numbers for the tables and --json, and its
    first frame."""
    from apet import outcome

    views = [encoder.view(frame) for frame in item.frames]
    begin = time.perf_counter()
    x = encoder.encode(views)  # [B, N, D]
    encode = (time.perf_counter() - begin) * 1e3
    try:
        frames, measure = outcome.compress(x, job.keep, arguments)
        times = outcome.times(x, job.keep, arguments, frames)
    except (ValueError, RuntimeError) as error:  # the op's own message
        raise ApetError(first_line(error)) from error
    measure.milliseconds = {"encode": encode, **times}
    _draw(job, item, frames, measure, encoder, arguments)
    result = {
        "file": printable(item.name),
        "picture": printable(job.picture),
        "encoder": encoder.name,
        "layer": encoder.layer,
        "images": len(frames),
        "times": item.times,
        "notes": item.notes,
        "grid": list(job.grid),
        "channels": x.shape[-1],
        **asdict(arguments),
        **asdict(measure),
    }
    return result, frames[0]


def _entry(job: Job, item: Media, frame: Frame, result: dict[str, Any], number: int, encoder: Encoder) -> Entry:
    """Makes the report's entry of a photo or clip, with a thumbnail of its first frame."""
    from apet.explore import files, report, svg
    from apet.explore.settings import Settings
    from apet.outcome import Measure

    photo = encoder.view(item.frames[0], report.PIXELS)
    measure = Measure(**{name: result[name] for name in ("tokens_in", "tokens_out", "residual_kept", "explained")})
    basis = 0 if result["basis"] == "keep" else result["basis"]
    settings = Settings("apet", job.keep, basis, result["layout"], result["select"], result["refine"])
    shown = svg.Shown(
        f"file-{number + 1}", printable(job.name), files.data_uri(photo), photo, job.grid, settings, frame, measure
    )
    return report.Entry(shown, job.source.path, job.picture, result)


def _draw(
    job: Job, item: Media, frames: list[Frame], measure: Measure, encoder: Encoder, arguments: OpArguments
) -> None:
    import numpy as np

    from apet import pictures
    from apet.outcome import describe

    photos = [np.asarray(encoder.view(frame, pictures.PATCH), np.float32) / 255 for frame in item.frames]
    labels = [f"{seconds:.2f} s" for seconds in item.times] or [""]
    panels = [pictures.Panel(p, f, job.grid, label) for p, f, label in zip(photos, frames, labels, strict=True)]
    extra = f" + {arguments.basis} basis" if arguments.layout == "append" else ""
    title = f"{printable(job.name)}: {measure.tokens_in} → {job.keep}{extra} tokens"
    share, variance = measure.tokens_out / measure.tokens_in, percent(measure.explained, 0)
    subtitle = (
        f"{share:.1%} of the tokens, {variance} of their variance   ·   "
        f"{describe(arguments)}   ·   {encoder.name}, layer {encoder.layer}"
    )
    if item.is_clip:
        figure = pictures.clip_figure(panels, f"{title} in each of {len(panels)} frames", subtitle)
    else:
        figure = pictures.photo_figure(panels[0], title, subtitle)
    save(figure, job.picture)


def _print_tables(results: list[dict[str, Any]], encoder: Encoder, arguments: OpArguments) -> None:
    """Prints two tables with a line for each photo or clip: numbers of tokens, and times."""
    import torch

    console = Console()
    title = f"Tokens: {encoder.name}, layer {encoder.layer}; layout {arguments.layout}, select {arguments.select}"
    console.print(f"[bold]{escape(title)}[/]")
    tokens = table("grid", "in", "out", "residual kept", "explained")
    times = table("encode", "s1-s3", "s4", "s5", "compress")
    for r in results:
        name, ms = escape(Path(r["file"]).name), r["milliseconds"]
        rows, cols = r["grid"]
        frames = f"{r['images']} x " if r["images"] > 1 else ""
        tokens.add_row(
            name,
            f"{frames}{rows} x {cols}",
            str(r["tokens_in"]),
            str(r["tokens_out"]),
            f"{r['residual_kept']:.1%}",
            percent(r["explained"], 1),
        )
        times.add_row(
            name,
            *(f"{ms[stage]:.2f}" for stage in ("encode", "score", "select", "merge")),
            f"[bold]{ms['compress']:.2f}[/]",
        )
    console.print(tokens)
    console.print(f"[bold]Milliseconds (median, {torch.get_num_threads()} threads; the encoder ran once)[/]")
    console.print(times)
    console.print(
        "[dim]Residual kept: share of all e^2 that lies in the kept tokens. Explained: share of the tokens' variance. "
        "s1-s3 (score), s4 (top-k) and s5 (merge) were called one by one; compress is one call of the op for all of "
        "them.[/]\n"
    )
    for r in results:
        console.print(f"Picture: [bold]{escape(r['picture'])}[/]", soft_wrap=True)
