"""The command `apet`: `apet compress` shows what compression does to a photo or clip, `apet generate` what it does to a
vision-language model, `apet eval` measures what it costs in accuracy, `apet doctor` checks the kernels.

Modules that need torch are imported by the commands that use them, so that `apet --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

import apet
from apet import Refused

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress
    from torch import nn

    from apet.encoders import Encoder
    from apet.evaluation.summary import Summary
    from apet.media import Media
    from apet.outcome import Frame, Measure, Options

LAYOUTS = ("inplace", "overwrite", "append")
SELECTS = ("fps", "qr")
DTYPES = ("auto", "float32", "bfloat16", "float16")
MOST_TOKENS = 65536  # of one image
MOST_SENTENCES = 20  # about single questions
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")
# What typer raises for wrong options. Newer releases carry their own click, so click's class may be another one.
UsageError = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The commands, with every error as one sentence on stderr and exit code 2."""

    def main(self, *args: Any, standalone_mode: bool = True, **kwargs: Any) -> NoReturn:
        try:
            code = super().main(*args, standalone_mode=False, **kwargs)
        except UsageError as error:
            code = _complain(error.format_message())
        except Refused as error:
            code = _complain(str(error))
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


def _complain(sentence: str) -> int:
    if os.environ.get("RANK", "0") == "0":  # of several processes, which are all refused the same, one speaks
        print(f"apet: {' '.join(sentence.split())}", file=sys.stderr)
    return 2


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode="rich", pretty_exceptions_enable=False)


def main() -> None:
    """Entry point of the command."""
    app()


@dataclass
class Job:
    """One photo or clip that has passed every check."""

    item: Media
    grid: tuple[int, int]  # rows, columns of patches
    keep: int
    picture: Path


@app.callback(invoke_without_command=True)
def _apet(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    """ApET: compress the visual tokens of vision-language models by approximation error (arXiv 2602.19870)."""
    if version:
        print(f"apet {apet.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command()
def compress(
    files: Annotated[list[Path], typer.Argument(metavar="PHOTO|VIDEO...", help="Photos, or short clips.")],
    keep: Annotated[str, typer.Option(help="Tokens to keep of each image: a count, or a share (0.25, 25%).")] = "64",
    basis: Annotated[int, typer.Option(help="Basis tokens, 1 to 64.")] = 10,
    layout: Annotated[str, typer.Option(help="Where basis tokens go: inplace, overwrite, append.")] = "inplace",
    select: Annotated[str, typer.Option(help="How the basis is picked: fps, qr.")] = "fps",
    start: Annotated[int, typer.Option(help="First basis token; -1 is the one of largest norm.")] = -1,
    blend: Annotated[float, typer.Option(help="With overwrite: the basis token's share of its slot.")] = 1.0,
    backend: Annotated[str | None, typer.Option(help="cpu or reference; else the best there is.")] = None,
    model: Annotated[
        str | None, typer.Option(help="CLIP, SigLIP or DINOv2 from Hugging Face: an id or a folder.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="Layer whose output is taken; negative counts from the last (-1).")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Pixels that a square photo is scaled to.")] = None,
    frames: Annotated[int, typer.Option(help="Frames taken from a clip, evenly spaced.")] = 8,
    out: Annotated[
        Path | None, typer.Option(help="The picture; a folder for several. Else <name>.apet.png here.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers as JSON instead of tables.")] = False,
) -> None:
    """Compress the patch tokens of photos or clips, and draw what was kept, merged and why."""
    _check(keep, basis, layout, select, start, blend, frames)
    with _progress() as progress:
        step = progress.add_task("reading", total=None)
        from apet import encoders, media

        for module in ("numpy", "PIL", "matplotlib"):
            encoders.need(module)
        found = [media.read(path, frames) for path in files]
        pictures = _picture_paths(files, out)
        _check_backend(backend)
        progress.update(step, description="loading the encoder")
        encoder = encoders.load(model, layer=layer, size=size)
        jobs = []
        for item, picture in zip(found, pictures, strict=True):
            rows, cols = encoder.grid(*item.size)
            jobs.append(Job(item, (rows, cols), _count(keep, rows * cols), picture))
            _check_tokens(jobs[-1], basis, layout, start)

        from apet.outcome import Options

        options = Options(basis, layout, select, start, blend, backend)
        results = []
        progress.update(step, total=len(jobs))
        for job in jobs:
            progress.update(step, description=_printable(job.item.path.name))
            results.append(_compress(job, encoder, options))
            progress.advance(step)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        _print_tables(results, encoder, options)


@app.command()
def generate(
    model: Annotated[str, typer.Option(help="A vision-language model from Hugging Face: an id or a folder.")],
    prompt: Annotated[str, typer.Option(help="What to ask about the photos or the clip.")],
    image: Annotated[list[Path] | None, typer.Option(help="A photo; may be repeated.")] = None,
    video: Annotated[Path | None, typer.Option(help="A short clip, instead of photos.")] = None,
    frames: Annotated[int, typer.Option(help="Frames taken from a clip, evenly spaced.")] = 8,
    keep: Annotated[
        str | None,
        typer.Option(help="Visual tokens to keep of each image, tile or frame: a count, or a share (0.25, 25%). [64]"),
    ] = None,
    llm_layer: Annotated[int | None, typer.Option(help="Compress again after so many layers of the decoder.")] = None,
    llm_keep: Annotated[str | None, typer.Option(help="Tokens to keep there: a count, or a share.")] = None,
    preset: Annotated[str | None, typer.Option(help="Both stages with the paper's budgets, such as paper-64.")] = None,
    layout: Annotated[str | None, typer.Option(help="Where basis tokens go: inplace, overwrite, append.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the answer at most.")] = 64,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; else an accelerator, if any.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer without compression, too.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="Draw what was kept: a picture; a folder for several photos.")
    ] = None,
) -> None:
    """Ask a vision-language model about photos or a clip, compressed, and show what compression saved."""
    _check_dtype(dtype)
    for name, value in (("max_new_tokens", max_new_tokens), ("frames", frames)):
        if value < 1:
            raise Refused(f"{name}={value} is less than 1")
    if bool(image) == (video is not None):
        raise Refused("give photos (--image, once for each) or a clip (--video), one of the two")
    if (keep, llm_layer, preset) == (None, None, None):
        keep = "64"
    options = {
        "keep": None if keep is None else _wanted(keep),
        "llm_layer": llm_layer,
        "llm_keep": None if llm_keep is None else _wanted(llm_keep, "llm_keep"),
        "preset": preset,
        "layout": layout,
    }
    files = image or [video]
    with _progress() as progress:
        step = progress.add_task("reading", total=None)
        from apet import encoders, media, models

        for module in ("numpy", "PIL", *(["matplotlib"] if out else [])):
            encoders.need(module)
        found = [media.read(path, frames) for path in files]
        for item in found:
            if bool(item.times) != (video is not None):
                raise Refused(
                    f"{item.path} is a {'clip: give it as --video' if item.times else 'photo: give it as --image'}"
                )
        pictures = _picture_paths(files, out) if out else []
        progress.update(step, description="loading the model")
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

            _save(model_pictures.picture(lm, inputs, processor, number), path)
            Console().print(f"Picture: [bold]{escape(_printable(path))}[/]", soft_wrap=True)
    except (ValueError, RuntimeError) as error:  # the hooks' own sentences, or no memory
        raise Refused(encoders.first_line(error)) from error


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Option(help="A vision-language model from Hugging Face: an id or a folder.")],
    data: Annotated[Path, typer.Option(help="A folder of images with questions.jsonl (docs/evaluation.md).")],
    out: Annotated[Path, typer.Option(help="A folder for the answers; a run that was cut off goes on from there.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Visual tokens to keep: a count, or a share (0.25, 25%); may be repeated. [64]"),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Both stages with the paper's budgets, such as paper-64; may be repeated.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="Of all of these: inplace, overwrite, append.")] = None,
    metric: Annotated[str, typer.Option(help="What an answer is worth: exact (GQA), vqa (TextVQA), pope.")] = "exact",
    max_new_tokens: Annotated[int, typer.Option(help="Length of an answer at most.")] = 16,
    dtype: Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; else an accelerator, if any.")] = None,
) -> None:
    """Put questions about images to a vision-language model, with and without compression, and compare the answers."""
    _check_dtype(dtype)
    if max_new_tokens < 1:
        raise Refused(f"max_new_tokens={max_new_tokens} is less than 1")
    budgets = _budgets(keep or [], preset or [], layout)
    from apet import encoders
    from apet.evaluation import metrics, processes, questions

    if metric not in metrics.METRICS:
        raise Refused(f"metric='{metric}' is none of {', '.join(metrics.METRICS)}")
    found = questions.read(data)
    metrics.METRICS[metric].check(found.items)
    for module in ("numpy", "PIL", "transformers"):
        encoders.need(module)
    from apet.evaluation import run, summary

    variants = {run.PLAIN: None, **budgets}
    settings = run.Settings(model, variants, max_new_tokens, dtype, device)
    with processes.joined() as here, _progress() as bar:
        task = bar.add_task("reading", visible=here.first)

        def progress(what: str, done: int, total: int) -> None:
            mine = f", process 1 of {here.count}" if here.count > 1 else ""
            bar.update(task, description=f"{what}{mine}", completed=done, total=total)

        records = run.evaluate(found, out, settings, here, progress)
    if here.first:
        result = summary.summarise(found.items, list(variants), records, metrics.METRICS[metric])
        _print_summary(result, model)
        raise typer.Exit(1 if result.failed else 0)


@app.command("eval-data")
def eval_data(
    kind: Annotated[str, typer.Argument(metavar="gqa|pope|textvqa", help="Whose official files these are.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="The files with the questions.")],
    data: Annotated[Path, typer.Option(help="The folder in which questions.jsonl is written, for apet eval.")],
    images: Annotated[str, typer.Option(help="Where the images are in that folder.")] = "images",
    prompts: Annotated[
        Path | None, typer.Option(help="TextVQA: LLaVA's file of prompts with what OCR has read.")
    ] = None,
) -> None:
    """Turn the official questions of GQA, POPE or TextVQA into those of `apet eval`."""
    from apet.evaluation import official

    done = official.convert(kind, files, data, images, prompts)
    print(f"{done.questions} questions in {data / 'questions.jsonl'}, {done.without_image} of them without their image")


@app.command()
def doctor() -> None:
    """Show what is installed and usable, and test every usable backend against the float64 reference."""
    from apet import diagnose

    raise typer.Exit(diagnose.run(Console()))


def _answer(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int, compare: bool) -> None:
    """The answer, and with `compare` that of the model without compression."""
    from apet import models
    from apet.model_report import engine_of, unpatched

    models.answer(model, processor, inputs, max_new_tokens)
    if compare:
        print("\nWithout compression:")
        with unpatched(engine_of(model)):
            models.answer(model, processor, inputs, max_new_tokens)


def _budgets(keeps: list[str], presets: list[str], layout: str | None) -> dict[str, dict[str, Any]]:
    """The options of `apet.patch` by the name that tables call them."""
    budgets: dict[str, dict[str, Any]] = {}
    given: list[tuple[str, dict[str, Any]]] = [(f"keep={_wanted(keep)}", {"keep": _wanted(keep)}) for keep in keeps]
    given += [(preset, {"preset": preset}) for preset in presets]
    for name, options in given or [("keep=64", {"keep": 64})]:
        if name in budgets:
            raise Refused(f"{name} is given twice")
        budgets[name] = options
    if layout is None:
        return budgets
    return {f"{name}, {layout}": {**options, "layout": layout} for name, options in budgets.items()}


def _print_summary(result: Summary, model: str) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe holds lines of any length
    if result.rows:
        console.print(f"[bold]{escape(model)}[/]")
        console.print(result.table())
        console.print(
            "[dim]Of plain: of the accuracy, or F1, of the uncompressed model. Agreement: same answer as that model. "
            "Visual tokens: mean of decoder layers. Prefill: to the first token, vision encoder included; medians.[/]"
        )
    for sentence in result.failed[:MOST_SENTENCES]:
        print(f"apet: {sentence}", file=sys.stderr)
    if result.failed:
        print(f"apet: {len(result.failed)} of {result.asked} questions failed and do not count", file=sys.stderr)


def _check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise Refused(f"dtype='{dtype}' is none of {', '.join(DTYPES)}")


def _check(keep: str, basis: int, layout: str, select: str, start: int, blend: float, frames: int) -> None:
    """Refuse arguments that are wrong whatever the photo."""
    _wanted(keep)
    if not 1 <= basis <= 64:
        raise Refused(f"basis={basis} is outside 1..64")
    if layout not in LAYOUTS:
        raise Refused(f"layout='{layout}' is none of {', '.join(LAYOUTS)}")
    if select not in SELECTS:
        raise Refused(f"select='{select}' is none of {', '.join(SELECTS)}")
    if start < -1:
        raise Refused(f"start={start} is neither a token nor -1")
    if not 0 <= blend <= 1:
        raise Refused(f"blend={blend} is outside 0..1")
    if blend != 1 and layout != "overwrite":
        raise Refused(f"blend={blend} has a meaning for the layout overwrite only, not for {layout}")
    if frames < 1:
        raise Refused(f"frames={frames} is less than 1")


def _wanted(keep: str, name: str = "keep") -> int | float:
    """'64' -> 64 tokens; '0.25' and '25%' -> the share 0.25."""
    try:
        if keep.endswith("%"):
            wanted: int | float = float(keep[:-1]) / 100
        else:
            wanted = float(keep) if "." in keep else int(keep)
    except ValueError:
        wanted = 0
    if wanted >= 1 if isinstance(wanted, int) else 0 < wanted <= 1:
        return wanted
    raise Refused(f"{name}={keep} is neither a count from 1 nor a share such as 0.25 or 25%")


def _count(keep: str, tokens: int) -> int:
    wanted = _wanted(keep)
    return wanted if isinstance(wanted, int) else max(1, round(wanted * tokens))


def _check_tokens(job: Job, basis: int, layout: str, start: int) -> None:
    """Refuse what does not fit this photo's number of tokens."""
    tokens, name = job.grid[0] * job.grid[1], job.item.path.name
    if tokens > MOST_TOKENS:
        raise Refused(f"{name} would become {tokens} tokens, more than {MOST_TOKENS}: choose a smaller size")
    if job.keep > tokens:
        raise Refused(f"keep={job.keep} exceeds the {tokens} tokens of {name}")
    if start >= tokens:
        raise Refused(f"start={start} is not one of the {tokens} tokens of {name}")
    if layout == "overwrite" and job.keep <= basis and job.keep != tokens:
        raise Refused(f"layout overwrite needs keep > basis, but keep={job.keep} and basis={basis} for {name}")


def _check_backend(backend: str | None) -> None:
    import apet_kernels

    if backend is None:
        return
    try:
        why = apet_kernels.why_unavailable(backend)
    except ValueError as error:
        raise Refused(str(error)) from None
    if why is not None:
        raise Refused(f"backend {backend} cannot be used: {why}")


def _picture_paths(files: list[Path], out: Path | None) -> list[Path]:
    """Where each picture goes; made sure of before any work is done.

    Raises: Refused where a picture could not be written, or would replace one of the photos.
    """
    if out is not None and len(files) == 1 and not out.is_dir():
        if out.suffix.lower() not in PICTURES:
            raise Refused(f"cannot write a picture as {out.name!r}: the name must end in one of {', '.join(PICTURES)}")
        paths = [out]
    else:
        folder = out or Path()
        if folder.exists() and not folder.is_dir():
            raise Refused(f"{folder} is a file, but several pictures need a folder")
        if len(files) > 1 and folder.suffix.lower() in PICTURES and not folder.exists():
            raise Refused(f"{folder} names one picture, but several files need a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Refused(f"cannot make the folder {folder}: {error.strerror}") from error
        paths = []
        for file in files:
            name, n = f"{file.stem}.apet.png", 2
            while folder / name in paths:
                name, n = f"{file.stem}-{n}.apet.png", n + 1
            paths.append(folder / name)
    for path in paths:
        if not path.parent.is_dir():
            raise Refused(f"no such folder: {path.parent}")
        if path.resolve() in [file.resolve() for file in files]:
            raise Refused(f"the picture would replace the photo {path}")
    return paths


def _compress(job: Job, encoder: Encoder, options: Options) -> dict[str, Any]:
    """Encode, compress, measure and draw one photo or clip; returns what the tables and --json say of it."""
    from apet import outcome

    views = [encoder.view(frame) for frame in job.item.frames]
    begin = time.perf_counter()
    x = encoder.encode(views)  # [B, N, D]
    encode = (time.perf_counter() - begin) * 1e3
    try:
        frames, measure = outcome.compress(x, job.keep, options)
    except (ValueError, RuntimeError) as error:  # the op's own sentence
        raise Refused(str(error).splitlines()[0]) from error
    measure.milliseconds = {"encode": encode, **measure.milliseconds}
    _draw(job, frames, measure, encoder, options)
    return {
        "file": _printable(job.item.path),
        "picture": _printable(job.picture),
        "encoder": encoder.name,
        "layer": encoder.layer,
        "images": len(frames),
        "grid": list(job.grid),
        "channels": x.shape[-1],
        **asdict(options),
        **asdict(measure),
    }


def _draw(job: Job, frames: list[Frame], measure: Measure, encoder: Encoder, options: Options) -> None:
    import numpy as np

    from apet import pictures

    photos = [np.asarray(encoder.view(frame, pictures.PATCH), np.float32) / 255 for frame in job.item.frames]
    labels = [f"{seconds:.2f} s" for seconds in job.item.times] or [""]
    panels = [pictures.Panel(p, f, job.grid, label) for p, f, label in zip(photos, frames, labels, strict=True)]
    extra = f" + {options.basis} basis" if options.layout == "append" else ""
    title = f"{_printable(job.item.path.name)}: {measure.tokens_in} → {job.keep}{extra} tokens"
    share, variance = measure.tokens_out / measure.tokens_in, _percent(measure.explained, 0)
    subtitle = (
        f"{share:.1%} of the tokens, {variance} of their variance   ·   "
        f"layout {options.layout}, {len(frames[0].basis)} basis tokens   ·   {encoder.name}, layer {encoder.layer}"
    )
    if job.item.times:
        figure = pictures.clip_figure(panels, f"{title} in each of {len(panels)} frames", subtitle)
    else:
        figure = pictures.photo_figure(panels[0], title, subtitle)
    _save(figure, job.picture)


def _save(figure: Figure, path: Path) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the font has no sign for some letter of a file name
            figure.savefig(path)
    except OSError as error:
        raise Refused(f"cannot write the picture {path}: {error.strerror or error}") from error


def _print_tables(results: list[dict[str, Any]], encoder: Encoder, options: Options) -> None:
    """Two tables, a line for each photo or clip: what became of the tokens, and the time it took."""
    import torch

    console = Console()
    title = f"Tokens: {encoder.name}, layer {encoder.layer}; layout {options.layout}, select {options.select}"
    console.print(f"[bold]{escape(title)}[/]")
    tokens = _table("grid", "in", "out", "residual kept", "explained")
    times = _table("encode", "s1-s3", "s4", "s5", "compress", "eager", "speed-up")
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
            _percent(r["explained"], 1),
        )
        eager = ms.get("eager")
        times.add_row(
            name,
            *(f"{ms[stage]:.2f}" for stage in ("encode", "score", "select", "merge")),
            f"[bold]{ms['compress']:.2f}[/]",
            f"{eager:.1f}" if eager else "-",
            f"[bold green]{eager / ms['compress']:.0f}x[/]" if eager else "-",
        )
    console.print(tokens)
    console.print(f"[bold]Milliseconds (median, {torch.get_num_threads()} threads; the encoder ran once)[/]")
    console.print(times)
    console.print(
        "[dim]Residual kept: share of all e^2 that lies in the kept tokens. Explained: share of the tokens' variance. "
        "s1-s3 (score), s4 (top-k) and s5 (merge) were called one by one; compress is one call of the op for all of "
        "them. Eager is the published formulation in eager torch, whatever the options: layout overwrite, select fps, "
        "start at the token of largest norm.[/]\n"
    )
    for r in results:
        console.print(f"Picture: [bold]{escape(r['picture'])}[/]", soft_wrap=True)


def _printable(path: Path | str) -> str:
    """A file's name for people: bytes that are not UTF-8 become the replacement sign."""
    return os.fsencode(path).decode("utf-8", "replace")


def _percent(share: float, digits: int) -> str:
    """0.256 -> '25.6%'; what rounds to zero has no sign."""
    return f"{round(share, digits + 2) + 0.0:.{digits}%}"


def _table(*headings: str) -> Table:
    """A table whose first column is a file name and whose others are numbers."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("", overflow="fold")  # a long name is broken before any number is
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _progress() -> Progress:
    """A bar on stderr that vanishes when it is done; nothing where stderr is not a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
