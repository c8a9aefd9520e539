"""The command `apet doctor`."""

from __future__ import annotations

import json

import typer
from rich.console import Console

from apet.cli.arguments import Json, Quiet
from apet.cli.output import progress


def doctor(as_json: Json = False, quiet: Quiet = False) -> None:
    """Show what is installed and usable, and test every usable backend and the hooks."""
    from apet import diagnose

    with progress(quiet) as bar:
        step = bar.add_task("importing", total=None)
        found = diagnose.find(lambda what: bar.update(step, description=what))
    if as_json:
        print(json.dumps(found, indent=2))
    elif not quiet or not found["right"]:
        diagnose.show(found, Console())
    raise typer.Exit(0 if found["right"] else 1)
