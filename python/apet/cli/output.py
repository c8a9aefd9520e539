"""The output of commands: tables, percentages, file names, pictures, progress."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from apet import ApetError, Notice

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.progress import Progress

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def printable(path: Path | str) -> str:
    """Returns a file name for display: bytes that are not UTF-8 become the replacement character."""
    return os.fsencode(path).decode("utf-8", "replace")


def percent(share: float, digits: int) -> str:
    """Formats a share: 0.256 -> '25.6%'; a share that rounds to zero has no sign."""
    return f"{round(share, digits + 2) + 0.0:.{digits}%}"


def table(*headings: str) -> Table:
    """Returns a table whose first column is a file name and whose other columns are numbers."""
    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    made.add_column("", overflow="fold")  # a long name is broken before any number is
    for heading in headings:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def note(messages: Iterable[str], quiet: bool) -> None:
    """Prints notes about the files that were read as lines on stderr."""
    for message in () if quiet else messages:
        print(f"apet: {printable(message)}", file=sys.stderr)


def hush(quiet: bool) -> None:
    """With `quiet`, suppresses notices of the hooks for the rest of the command."""
    if quiet:
        warnings.simplefilter("ignore", Notice)


def progress(quiet: bool = False) -> Progress:
    """Returns a progress bar on stderr that disappears at the end; it shows nothing if stderr is not a terminal."""
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
        disable=quiet or not console.is_terminal,
    )


def picture_paths(files: Sequence[str], out: Path | None) -> list[Path]:
    """Returns the path of each picture, checked before any work is done.

    Raises: ApetError, if a picture could not be written, or would replace one of the photos.
    """
    from apet.media import stem

    if out is not None and len(files) == 1 and not out.is_dir():
        if out.suffix.lower() not in PICTURES:
            raise ApetError(
                f"cannot write a picture as {out.name!r}: the name must end in one of {', '.join(PICTURES)}"
            )
        paths = [out]
    else:
        folder = out or Path()
        if folder.exists() and not folder.is_dir():
            raise ApetError(f"{folder} is a file, but several pictures need a folder")
        if len(files) > 1 and folder.suffix.lower() in PICTURES and not folder.exists():
            raise ApetError(f"{folder} names one picture, but several files need a folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ApetError(f"cannot make the folder {folder}: {error.strerror}") from error
        paths = []
        for file in files:
            name, n = f"{stem(file)}.apet.png", 2
            while folder / name in paths:
                name, n = f"{stem(file)}-{n}.apet.png", n + 1
            paths.append(folder / name)
    photos = _paths(files)
    for path in paths:
        if not path.parent.is_dir():
            raise ApetError(f"no such folder: {path.parent}")
        if path.resolve() in photos:
            raise ApetError(f"the picture would replace the photo {path}")
    return paths


def _paths(files: Sequence[str]) -> list[Path]:
    """Returns the paths of the sources that are files."""
    from apet.media import is_address

    return [Path(file).resolve() for file in files if file != "-" and not is_address(file)]


def check_report(report: Path, files: Sequence[str]) -> None:
    """Raises: ApetError, if a report could not be written there, or would replace one of the files."""
    if report.suffix.lower() not in (".html", ".htm"):
        raise ApetError(f"cannot write a report as {report.name!r}: the name must end in .html")
    if not report.parent.is_dir():
        raise ApetError(f"no such folder: {report.parent}")
    if report.resolve() in _paths(files):
        raise ApetError(f"the report would replace the photo {report}")


def save(figure: Figure, path: Path) -> None:
    """Writes a picture. Raises: ApetError, if it cannot be written."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the font may lack a character of a file name
            figure.savefig(path)
    except OSError as error:
        raise ApetError(f"cannot write the picture {path}: {error.strerror or error}") from error
