"""Draws one picture of a result as SVG: the photo, and which of its tokens were kept, merged or dropped.

Every picture counts in patches: column c, row r is the square [c, c+1] x [r, r+1] of the SVG. A document holds each
photo once, and its pictures refer to it; so the ids of the photos of one document must differ.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from apet.explore.files import SEEN, data_uri
from apet.explore.settings import Settings
from apet.outcome import Frame, Measure
from apet.pictures import HEAT, borders_of, group_colours, moved

HEAT_PIXELS = 8  # to an edge of a patch: with one pixel, viewers would blur it


@dataclass(frozen=True, eq=False)
class Shown:
    """A photo, or a frame of a clip, and the result of one setting for it."""

    id: str  # of the photo in the document: letters, digits and hyphens
    name: str
    photo: str  # data URI
    picture: Image.Image  # the same, best with SEEN pixels to an edge of a patch
    grid: tuple[int, int]
    settings: Settings
    frame: Frame
    measure: Measure
    time: float | None = None  # seconds into the clip


CAPTIONS: dict[str, Callable[[Shown, bool], str]] = {
    "photo": lambda one, large: f"{one.measure.tokens_in} tokens",
    "clear": lambda one, large: f"{one.measure.tokens_out} tokens",
    "kept": lambda one, large: f"Kept: {len(one.frame.kept)} patches",
    "merged": lambda one, large: f"Merged: {moved(one.frame)} patches, a colour per group",
    "rebuilt": lambda one, large: "what the model still sees" if large else "Rebuilt: the mean of each group",
    "residual": lambda one, large: "Residual e²: what the basis misses",
}


def panel(one: Shown, kind: str, most: float, place: str = "", keys: bool = False) -> str:
    """Returns one picture, of a kind in CAPTIONS. most: the top of the colour scale; place: attributes of the SVG
    element; keys: whether it handles the arrow keys."""
    rows, cols = one.grid
    says = f"{one.name}. {CAPTIONS[kind](one, False)}."
    role = 'role="img"'
    if keys:  # with the role application a screen reader passes the keys on
        role = 'role="application" tabindex="0"'
        says += " The arrow keys move from patch to patch."
    return (
        f'<svg class="patches {kind}" viewBox="0 0 {cols} {rows}" {role} aria-label="{escape(says)}" {place}>'
        f'{_MARKS[kind](one, most)}<g class="cursor"></g></svg>'
    )


def photo(one: Shown) -> str:
    """Returns the definition of the photo, to which the pictures refer."""
    image = _image(one.photo, one.grid, f"{one.id}-photo")
    return f'<svg class="photo" width="0" height="0" aria-hidden="true"><defs>{image}</defs></svg>'


def _image(uri: str, grid: tuple[int, int], id: str = "") -> str:
    rows, cols = grid
    name = f'id="{id}" ' if id else ""
    return f'<image {name}width="{cols}" height="{rows}" preserveAspectRatio="none" decoding="sync" href="{uri}"/>'


def _use(one: Shown) -> str:
    return f'<use href="#{one.id}-photo"/>'


def _draw_photo(one: Shown, most: float) -> str:
    rows, cols = one.grid
    lines = "".join(f"M{c} 0v{rows}" for c in range(1, cols)) + "".join(f"M0 {r}h{cols}" for r in range(1, rows))
    return f'{_use(one)}<path class="grid" d="{lines}"/>'


def _draw_clear(one: Shown, most: float) -> str:
    clear = one.frame.retained
    veil = _areas(clear, one.grid).get(False, "")
    return f'{_use(one)}<path class="veil" d="{veil}"/>{_edges(clear, one.grid)}'


def _draw_kept(one: Shown, most: float) -> str:
    return _draw_clear(one, most) + _basis(one)


def _draw_merged(one: Shown, most: float) -> str:
    """Draws each group of more than one token in its own colour, with a dot on the token that it was merged into."""
    target_position = one.frame.target_position
    colours = group_colours(target_position)  # [N, 3]
    targets, counts = np.unique(target_position[target_position >= 0], return_counts=True)
    areas = _areas(target_position, one.grid)
    parts = [f'<g class="grey">{_use(one)}</g>']
    dots = []
    for target in targets[counts > 1].tolist():
        colour = matplotlib.colors.to_hex(colours[target])
        parts.append(f'<path class="group" fill="{colour}" d="{areas[target]}"/>')
        row, col = divmod(target, one.grid[1])
        dots.append(f'<circle cx="{col + 0.5}" cy="{row + 0.5}" r="0.3" fill="{colour}"/>')
    return "".join(parts) + _edges(target_position, one.grid) + f'<g class="dots">{"".join(dots)}</g>'


def _draw_rebuilt(one: Shown, most: float) -> str:
    """Draws the reconstruction: each patch is replaced by the mean of the patches that were merged into the same token;
    it is black if its token was dropped without being merged."""
    rows, cols = one.grid
    pixels = np.asarray(one.picture.resize((cols * SEEN, rows * SEEN)), np.float32)
    patches = pixels.reshape(rows, SEEN, cols, SEEN, 3).swapaxes(1, 2).reshape(rows * cols, -1)  # [N, 3 SEEN^2]
    targets, group = np.unique(one.frame.target_position, return_inverse=True)  # [G], [N]
    sums = (np.arange(len(targets))[:, None] == group).astype(np.float32) @ patches  # [G, 3 SEEN^2]
    means = sums / np.bincount(group)[:, None] * (targets >= 0)[:, None]
    picture = means[group].reshape(rows, cols, SEEN, SEEN, 3).swapaxes(1, 2).reshape(rows * SEEN, cols * SEEN, 3)
    return _image(data_uri(Image.fromarray(picture.round().astype(np.uint8))), one.grid)


def _draw_residual(one: Shown, most: float) -> str:
    """Draws e^2 as heat, with the outlines of the kept tokens. Values that are not finite get the top of the scale."""
    heat = np.nan_to_num(one.frame.residual, nan=most, posinf=most) / most
    pixels = matplotlib.colormaps[HEAT](heat.reshape(one.grid), bytes=True)[..., :3]
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(HEAT_PIXELS, 0).repeat(HEAT_PIXELS, 1)).save(file, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return _image(uri, one.grid) + _edges(one.frame.retained, one.grid)


_MARKS: dict[str, Callable[[Shown, float], str]] = {
    "photo": _draw_photo,
    "clear": _draw_clear,
    "kept": _draw_kept,
    "merged": _draw_merged,
    "rebuilt": _draw_rebuilt,
    "residual": _draw_residual,
}


def _areas(groups: np.ndarray, grid: tuple[int, int]) -> dict[Any, str]:
    """Returns the path of the patches of each group [N], one rectangle for each run in a row."""
    cols = grid[1]
    begins = np.ones(len(groups), bool)
    begins[1:] = groups[1:] != groups[:-1]
    begins[::cols] = True
    at = np.flatnonzero(begins)
    runs = np.diff(at, append=len(groups))
    areas: dict[Any, str] = {}
    for group, start, run in zip(groups[at].tolist(), at.tolist(), runs.tolist(), strict=True):
        row, col = divmod(start, cols)
        areas[group] = areas.get(group, "") + f"M{col} {row}h{run}v1h{-run}z"
    return areas


def _edges(groups: np.ndarray, grid: tuple[int, int]) -> str:
    """Draws lines between neighbouring patches of different groups [N]."""
    lines = "".join(f"M{x} {y}L{u} {v}" for (x, y), (u, v) in borders_of(groups, grid))
    return f'<path class="edges" d="{lines}"/>'


def _basis(one: Shown) -> str:
    cols = one.grid[1]
    parts = []
    for order, position in enumerate(one.frame.basis.tolist(), start=1):
        row, col = divmod(position, cols)
        parts.append(f'<rect x="{col}" y="{row}" width="1" height="1"/>')
        parts.append(f'<text x="{col + 0.5}" y="{row + 0.69}">{order}</text>')
    return f'<g class="basis">{"".join(parts)}</g>'
