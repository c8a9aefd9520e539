"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # benchmarks/gpu_quick.py runs beside a broken torch
    from benchmarks.lib.device import Device


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Of `python -m benchmarks.NAME`, described by that module's docstring."""
    summary, _, usage = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawTextHelpFormatter,
    )


def add_only(given: argparse.ArgumentParser) -> None:
    """--only TEXT ..."""
    given.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose name holds every TEXT")


def chosen(given: argparse.ArgumentParser, cases: list[Any], only: list[str]) -> list[Any]:
    """The cases whose name, which is their str(), holds every TEXT of --only. Exits with 2 where none does."""
    found = [case for case in cases if all(text in str(case) for text in only)]
    if not found:
        given.error(f"no case holds {' and '.join(only)}")
    return found


def device(given: argparse.ArgumentParser, find: Callable[[bool], Device], smoke: bool) -> Device:
    """What `find` gives. Exits with 2 where there is nothing to measure on."""
    try:
        return find(smoke)
    except RuntimeError as error:
        given.exit(2, f"{error}\n")
