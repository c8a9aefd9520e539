"""`apet compress --report`: one self-contained HTML file about many photos and clips; it only links to files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from apet import ApetError, media
from apet.explore import svg, view
from apet.explore.svg import Shown

PIXELS = 14  # to an edge of a patch in a thumbnail
COLUMNS = (("tokens_in", "in", "d"), ("tokens_out", "out", "d"), ("residual_kept", "residual kept", ".1%"))
COLUMNS += (("explained", "variance explained", ".1%"),)
STYLE = """
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 1200px; padding: 24px; background: var(--paper); }
a { color: inherit; }
h1 { font-size: 1.5rem; } h2 { font-size: 1rem; overflow-wrap: anywhere; }
table { border-collapse: collapse; display: block; overflow-x: auto; }
th, td { padding: 4px 12px 4px 0; text-align: right; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
th { color: var(--faint); font-weight: 500; } tr { border-bottom: 1px solid var(--line); }
.cards { display: grid; gap: 24px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 540px), 1fr)); }
article { content-visibility: auto; contain-intrinsic-size: auto 340px; min-width: 0; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 8px; }
.patches { display: block; width: 100%; height: auto; border-radius: 4px; }
.photo { position: absolute; }
.faint { color: var(--faint); }
"""


@dataclass(frozen=True)
class Entry:
    """The entry of one file: its first frame, drawn, and the numbers of all frames, as `apet compress --json` prints
    them."""

    shown: Shown
    source: str  # a path, "-" or an address
    picture: Path
    numbers: dict[str, Any]


def write(entries: Sequence[Entry], path: Path, subtitle: str) -> None:
    """Writes the report. Raises: ApetError, if the file cannot be written."""
    try:
        path.write_text(document(entries, path.parent, subtitle), encoding="utf-8")
    except OSError as error:
        raise ApetError(f"cannot write the report {path}: {error.strerror or error}") from error


def document(entries: Sequence[Entry], folder: Path, subtitle: str) -> str:
    """Returns the HTML of the report. folder: the folder it will be in; its links are relative to that."""
    heads = "".join(f"<th scope=col>{name}</th>" for _, name, _ in COLUMNS)
    rows = "".join(
        f'<tr><td><a href="#{one.shown.id}">{escape(one.shown.name)}</a></td>{_cells(one)}</tr>' for one in entries
    )
    files = "1 file" if len(entries) == 1 else f"{len(entries)} files"
    dark = view.STYLE.replace(".dark .apet, .apet.dark", "body.apet")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width, initial-scale=1"><title>apet compress: {files}</title>'
        f"<style>{view.STYLE}@media (prefers-color-scheme: dark) {{ {dark} }}{STYLE}</style></head>"
        f'<body class="apet"><h1>{files}, compressed</h1><p class="faint">{escape(subtitle)}</p>'
        f"<table><thead><tr><th scope=col>file</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
        f'<div class="cards">{"".join(_card(one, folder) for one in entries)}</div></body></html>'
    )


def _cells(one: Entry) -> str:
    return "".join(f"<td>{one.numbers[key]:{form}}</td>" for key, _, form in COLUMNS)


def _card(one: Entry, folder: Path) -> str:
    shown, frames = one.shown, one.numbers["images"]
    pictures = "".join(svg.panel(shown, kind, 1.0) for kind in ("clear", "rebuilt"))
    clip = f", each of {frames} frames; the first is shown" if frames > 1 else ""
    links = f'<a href="{_address(one.picture, folder)}">picture</a>'
    if media.is_address(one.source):
        links += f' · <a href="{escape(media.shown(one.source))}">original</a>'
    elif one.source != "-":
        links += f' · <a href="{_address(Path(one.source), folder)}">original</a>'
    return (
        f'<article id="{shown.id}"><h2>{escape(shown.name)}</h2><p class="faint">{view.heading(shown)}{clip} · '
        f'{links}</p>{svg.photo(shown)}<div class="pair">{pictures}</div></article>'
    )


def _address(path: Path, folder: Path) -> str:
    """Returns the path relative to the report. It is quoted byte by byte, so that any file name gives a valid link."""
    return quote(os.fsencode(os.path.relpath(path.absolute(), folder.absolute())))
