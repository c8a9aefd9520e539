"""`apet doctor`."""

from __future__ import annotations

import typer
from rich.console import Console


def doctor() -> None:
    """Show what is installed and usable, and test every usable backend against the float64 reference."""
    from apet import diagnose

    raise typer.Exit(diagnose.run(Console()))
