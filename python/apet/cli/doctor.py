"""`apet doctor`."""

from __future__ import annotations

import typer
from rich.console import Console


def doctor() -> None:
    """Show what is installed and usable, and test every usable backend and the hooks."""
    from apet import diagnose

    raise typer.Exit(diagnose.run(Console()))
