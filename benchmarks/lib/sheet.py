"""A table that can be printed or written as markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console


class Sheet(NamedTuple):
    """Title, headings and lines; `words` names the columns that are not numbers."""

    title: str
    note: str  # explains the columns; one bullet per sentence below a markdown table
    columns: list[str]
    lines: list[list[str]]
    words: tuple[str, ...] = ("shape", "dtype", "layout", "goals")


def markdown(sheet: Sheet) -> str:
    """Returns title, table and note as markdown."""
    rule = ["---"] * len(sheet.columns)
    table = "\n".join("| " + " | ".join(line) + " |" for line in [sheet.columns, rule, *sheet.lines])
    note = "\n".join(f"- {part}" for part in re.split(r"(?<=\.) ", sheet.note))
    return f"### {sheet.title}\n\n{table}\n\n{note}"


def document(head: dict[str, str], sheets: list[Sheet]) -> str:
    """Returns head and tables as markdown, in the form of docs/."""
    parts = ["\n".join(f"- {key}: {value}" for key, value in head.items()), *map(markdown, sheets)]
    return "\n\n".join(parts) + "\n"


def replaced(text: str, begin: str, end: str, body: str) -> str:
    """Returns `text` with the part between its two markers replaced. Raises ValueError if one is missing."""
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"there is no {end if found else begin}")
    return f"{before}{begin}\n{body}{end}{after}"


def show(console: Console, head: dict[str, str], sheets: list[Sheet]) -> None:
    """Prints head and tables on a terminal."""
    from rich.table import Table  # imported here, so that the GPU check runs without it

    for key, value in head.items():
        console.print(f"[bold]{key}[/bold] {value}", highlight=False, soft_wrap=True)
    for sheet in sheets:
        table = Table(title=sheet.title, caption=sheet.note, caption_justify="left")
        for column in sheet.columns:
            table.add_column(column, justify="left" if column in sheet.words else "right")
        for line in sheet.lines:
            table.add_row(*line)
        console.print(table)
