"""The shared parts of the benchmarks' command lines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # benchmarks/gpu_quick.py must run even if torch is broken
    from benchmarks.lib.device import Device


def parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m benchmarks.NAME`, described by that module's docstring."""
    summary, _, usage = (doc or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawTextHelpFormatter,
    )


def add_only(given: argparse.ArgumentParser) -> None:
    """Adds the option --only TEXT ..."""
    given.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose name holds every TEXT")


def chosen(given: argparse.ArgumentParser, cases: list[Any], only: list[str]) -> list[Any]:
    """Returns the cases whose name, which is their str(), holds every TEXT of --only. Exits with 2 if there is none."""
    found = [case for case in cases if all(text in str(case) for text in only)]
    if not found:
        given.error(f"no case holds {' and '.join(only)}")
    return found


def device(given: argparse.ArgumentParser, find: Callable[[bool], Device], smoke: bool) -> Device:
    """Returns the device that `find` gives. Exits with 2 if there is nothing to measure on."""
    try:
        return find(smoke)
    except RuntimeError as error:
        given.exit(2, f"{error}\n")
