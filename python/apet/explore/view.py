"""The pages of a result: the HTML of the page's view, a complete SVG document for the PNG and the README, and JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import matplotlib
import numpy as np

from apet.explore.svg import CAPTIONS, Shown, panel, photo
from apet.pictures import HEAT

STYLE = (files(__package__) / "view.css").read_text(encoding="utf-8")
README = ("photo", "clear", "rebuilt")
ALL = ("kept", "merged", "rebuilt", "residual")


def page(shown: Sequence[Shown], query: str = "") -> str:
    """Returns the HTML of one or two settings of one photo. query: the address of the page that shows them."""
    most = heat_of(shown)
    letters = "AB" if len(shown) > 1 else " "
    sections = "".join(_section(one, most, letter.strip()) for one, letter in zip(shown, letters, strict=True))
    time = "" if shown[0].time is None else f"Frame at {shown[0].time:.2f} s. "
    return (
        f'<div class="apet" data-count="{len(shown)}" data-query="{escape(query)}">{photo(shown[0])}'
        f'<p class="where" role="status">{time}Point at a patch, tap it, or move with the arrow keys to see where it '
        f'went.</p><div class="settings">{sections}</div></div>'
    )


def message(words: str, error: bool = True) -> str:
    """Returns the HTML of a message in place of the pictures."""
    role = ' role="alert"' if error else ""
    return f'<div class="apet"><p class="message"{role}>{escape(words)}</p></div>'


def poster(shown: Sequence[Shown], kinds: Sequence[str] = ALL, dark: bool = False) -> str:
    """Returns a complete SVG document with a line of pictures for each setting."""
    width, side, gap, head, line = 1280, 28, 44, 46, 30
    most = heat_of(shown)
    rows, cols = shown[0].grid
    wide = (width - 2 * side - (len(kinds) - 1) * gap) / len(kinds)
    high = min(rows / cols, 1.5) * wide
    x_of = [side + i * (wide + gap) for i in range(len(kinds))]
    y, parts = float(side), []
    for one in shown:
        if kinds == ALL:
            y += head
            parts.append(
                _text(side, y - 16, heading(one), "title") + _text(width - side, y - 16, facts(one), "facts", "end")
            )
        for i, kind in enumerate(kinds):
            large = kinds == README
            parts.append(_text(x_of[i], y + line - 12, CAPTIONS[kind](one, large), "large" if large else "caption"))
            place = f'x="{x_of[i]:.1f}" y="{y + line:.1f}" width="{wide:.1f}" height="{high:.1f}"'
            parts.append(panel(one, kind, most, place))
            if large and i:
                parts.append(_arrow(x_of[i] - gap / 2, y + line + high / 2))
        y += line + high + side / 2
    height = y + side / 2
    names = escape("; ".join(f"{one.name}: {heading(one)}" for one in shown))
    theme = " dark" if dark else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="apet poster{theme}" width="{width}" height="{height:.0f}" '
        f'viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{names}"><style>{STYLE}</style>'
        f'<rect class="paper" width="100%" height="100%"/>{photo(shown[0])}{"".join(parts)}</svg>'
    )


def numbers(one: Shown) -> dict[str, Any]:
    """Returns all numbers of a result, for JSON: positions count row by row; e^2 that is not finite is null."""
    frame, measure = one.frame, one.measure
    finite = np.isfinite(frame.residual)
    return {
        "file": one.name,
        "seconds": one.time,
        "grid": list(one.grid),
        **vars(one.settings),
        "tokens_in": measure.tokens_in,
        "tokens_out": measure.tokens_out,
        "residual_kept": measure.residual_kept,
        "explained": measure.explained,
        "kept": frame.kept.tolist(),
        "basis_positions": frame.basis.tolist(),
        "overwritten": frame.overwritten.tolist(),
        "merged_into": frame.target_position.tolist(),
        "residual": [float(e) if ok else None for e, ok in zip(frame.residual, finite, strict=True)],
        "rank": ranks(np.where(finite, frame.residual, np.inf)).tolist(),
    }


def ranks(residual: np.ndarray) -> np.ndarray:
    """Returns the rank of each residual [N]: 1 + the number of larger ones."""
    ascending = np.sort(residual)
    return 1 + len(residual) - np.searchsorted(ascending, residual, side="right")


def heading(one: Shown) -> str:
    return f"{one.measure.tokens_in} → {one.measure.tokens_out} tokens"


def facts(one: Shown) -> str:
    """Returns one line about a setting and what it keeps."""
    measure = one.measure
    return (
        f"{one.settings}   ·   {measure.residual_kept:.0%} of the residual   ·   "
        f"{max(round(measure.explained, 2), 0):.0%} of the variance"
    )


def heat_of(shown: Sequence[Shown]) -> float:
    """Returns the largest finite e^2, the top of the common colour scale."""
    finite = np.concatenate([one.frame.residual[np.isfinite(one.frame.residual)] for one in shown])
    return max(float(finite.max(initial=0.0)), 1e-12)


# --- a section of the page ---


@functools.lru_cache(maxsize=16)
def _section(one: Shown, most: float, letter: str) -> str:
    """Returns the pictures of one setting, with the positions that page.js needs."""
    frame = one.frame
    data = {
        "grid": one.grid,
        "target": frame.target_position.tolist(),
        "kept": frame.kept.tolist(),
        "retained": np.flatnonzero(frame.retained).tolist(),
        "basis": frame.basis.tolist(),
        "residual": [float(f"{e:.4g}") if np.isfinite(e) else None for e in frame.residual],
    }
    figures = ""
    for kind in ALL:
        picture = panel(one, kind, most, keys=kind == "kept") + (_scale(most) if kind == "residual" else "")
        figures += f"<figure><figcaption>{escape(CAPTIONS[kind](one, False))}</figcaption>{picture}</figure>"
    label = f"<span>{letter}</span> " if letter else ""
    before, _, after = heading(one).partition(" → ")
    return (
        f'<section aria-label="{escape(f"Setting {letter}: {one.settings}")}" data-view="{escape(json.dumps(data))}">'
        f"<header><h2>{label}{before} → <b>{after}</b></h2><p>{escape(facts(one))}</p></header>"
        f'<div class="panels">{figures}</div></section>'
    )


def _scale(most: float) -> str:
    colours = ", ".join(matplotlib.colors.to_hex(matplotlib.colormaps[HEAT](i / 8)) for i in range(9))
    return (
        f'<p class="scale"><span>0</span><i style="background: linear-gradient(90deg, {colours})"></i>'
        f"<span>{most:.3g}</span></p>"
    )


def _text(x: float, y: float, words: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _arrow(x: float, y: float) -> str:
    return f'<path class="arrow" d="M{x - 11:.1f} {y:.1f}h20m-8 -8l8 8l-8 8"/>'
