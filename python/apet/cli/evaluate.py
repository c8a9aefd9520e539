"""The command `apet eval`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

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
)
from apet.cli.output import hush, progress
from apet.hub import need

if TYPE_CHECKING:
    from apet.evaluation.summary import Summary

MOST_MESSAGES = 20  # that are printed about questions that failed


def evaluate(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            exists=True, file_okay=False, help="A folder of images or clips with questions.jsonl (docs/evaluation.md)."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(dir_okay=False, help="A file (.jsonl) for the answers; an interrupted run continues with it."),
    ],
    keep: Annotated[
        list[float] | None,
        typer.Option(
            parser=budget,
            metavar="COUNT|SHARE",
            help="Visual tokens to keep: 64, 0.25 or 25%; may be repeated. \\[64]",
        ),
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="Both stages with the paper's budgets, such as paper-64; may be repeated.")
    ] = None,
    layout: Layouts = None,
    frames: Frames = 8,
    select: Selection = None,
    basis: Basis = None,
    refine: Refine = 0,
    share: Share = False,
    relevance: Relevance = 0,
    distinct: Distinct = 0,
    guard: GuardOption = None,
    guard_limit: GuardLimit = None,
    positions: PositionsOption = None,
    max_new_tokens: NewTokens = 16,
    dtype: Weights = "auto",
    device: Device = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Ask a vision-language model your questions about images or clips, with and without compression, and compare."""
    hush(quiet)
    given = {"layout": layout, "select": select, "basis": basis, "refine": refine or None, "share": share or None}
    given |= {"relevance": relevance or None, "distinct": distinct or None, "positions": positions}
    given |= {"guard": guard, "guard_limit": guard_limit}
    budgets = _budgets(keep or [], preset or [], {name: value for name, value in given.items() if value is not None})
    for module in ("numpy", "PIL", "transformers"):
        need(module)
    from apet.evaluation import questions, run, summary

    found = questions.read(data)
    settings = run.Settings(model, {run.PLAIN: None, **budgets}, max_new_tokens, dtype, device, frames)
    with progress(quiet) as bar:
        task = bar.add_task("reading")
        records = run.evaluate(
            found,
            out,
            settings,
            lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    result = summary.summarise(found.items, list(settings.variants), records)
    if as_json:
        print(json.dumps({"model": model, **asdict(result)}, indent=2))
    elif not quiet:
        _print_summary(result, model)
    _print_messages(result)
    raise typer.Exit(1 if result.failed else 0)


def _budgets(keeps: list[float], presets: list[str], shared: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns the options of `apet.patch` for each budget, by its name in the table. shared: the options of every
    budget."""
    given: list[tuple[str, dict[str, Any]]] = [(f"keep={keep}", {"keep": keep}) for keep in keeps]
    given += [(preset, {"preset": preset}) for preset in presets]
    budgets: dict[str, dict[str, Any]] = {}
    for name, options in given or [("keep=64", {"keep": 64})]:
        if name in budgets:
            raise ApetError(f"{name} is given twice")
        budgets[name] = options
    added = "".join(
        f", {value}" if name in ("layout", "select") else f", {name}={value}" for name, value in shared.items()
    )
    return {name + added: {**options, **shared} for name, options in budgets.items()}


def _print_summary(result: Summary, model: str) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)  # a file or a pipe holds lines of any length
    if result.rows:
        console.print(f"[bold]{escape(model)}[/]")
        console.print(result.table())
        console.print(
            "[dim]Exact: the answer is one of those given. Contains: one of those given occurs in it. Agreement: the "
            "answer is that of the first row. Visual tokens: mean of decoder layers. Prefill: to the first token, "
            "vision encoder included; medians.[/]"
        )


def _print_messages(result: Summary) -> None:
    for messages in (result.notes, result.failed):
        for message in messages[:MOST_MESSAGES]:
            print(f"apet: {message}", file=sys.stderr)
    if len(result.notes) > MOST_MESSAGES:
        print(f"apet: {len(result.notes)} such notes; --json has all of them", file=sys.stderr)
    if result.failed:
        missing = result.asked - result.answered
        print(f"apet: {missing} of {result.asked} questions failed and do not count", file=sys.stderr)
