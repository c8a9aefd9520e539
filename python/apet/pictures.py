"""Draws the picture of a compressed photo or clip: kept tokens, merge targets and the residual.

It uses matplotlib's figure objects, not pyplot, so that no global state changes and no display is needed.
"""

from __future__ import annotations

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke

from apet.outcome import Frame

PATCH = 28  # pixels drawn to an edge of a patch; `Encoder.view` makes photos of this scale
INK, FAINT, BASIS = "#1b1d22", "#666c75", "#ffd23f"
HEAT = "inferno"


@dataclass
class Panel:
    """One image to draw. photo: [rows * PATCH, cols * PATCH, 3] in 0..1."""

    photo: np.ndarray
    frame: Frame
    grid: tuple[int, int]
    label: str = ""


def photo_figure(panel: Panel, title: str, subtitle: str) -> Figure:
    """Draws kept tokens, merges and residual of one photo, side by side, or one below the other if the photo is
    wide."""
    rows, cols = panel.grid
    frame = panel.frame
    cells = [
        (_kept, panel, f"{len(frame.kept)} tokens kept"),
        (_merged, panel, f"{moved(frame)} merged: a colour and a dot for each merge target"),
        (_residual, panel, "residual $e^2$"),
    ]
    if cols > 2.2 * rows:
        return _sheet([[cell] for cell in cells], _cell(rows, cols, 11.0), title, subtitle)
    return _sheet([cells], _cell(rows, cols, 5.6), title, subtitle)


def clip_figure(panels: list[Panel], title: str, subtitle: str) -> Figure:
    """Draws a contact sheet: for each frame the kept tokens, below them the merges, and below those the residual."""
    across = -(-len(panels) // -(-len(panels) // 4))  # at most 4, lines as even as can be
    lines: list[list[_Cell]] = []
    for begin in range(0, len(panels), across):
        some = panels[begin : begin + across]
        lines.append([(_kept, p, p.label) for p in some])
        lines += [[(painter, p, "") for p in some] for painter in (_merged, _residual)]
    rows, cols = panels[0].grid
    return _sheet(lines, _cell(rows, cols, 3.6), title, subtitle)


_Cell = tuple[Callable[[Axes, Panel, Normalize], None], Panel, str]


def _cell(rows: int, cols: int, long: float) -> tuple[float, float]:
    """Returns the inches (width, height) of a panel whose longer side is `long`; very narrow panels are widened."""
    scale = long / max(rows, cols)
    return max(cols * scale, 0.8), max(rows * scale, 0.4)


def _sheet(lines: list[list[_Cell]], cell: tuple[float, float], title: str, subtitle: str) -> Figure:
    """Draws panels in lines, a heading above each, the title at the top and the key at the bottom. Lengths are
    inches."""
    w, h = cell
    side, top, key, gap, bar = 0.35, 0.82, 0.58, 0.16, 0.85
    heads = [0.34 if line[0][2] else 0.1 for line in lines]
    across = max(len(line) for line in lines)
    width = max(2 * side + across * w + (across - 1) * gap + bar, 7.6)
    height = top + sum(heads) + len(lines) * h + key
    figure = Figure(figsize=(width, height), dpi=110, facecolor="white")
    place = np.array([width, height, width, height])
    panels = [panel for line in lines for _, panel, _ in line]
    heat = _heat(panels)
    y, residual_at = height - top, 0.0
    for line, head in zip(lines, heads, strict=True):
        y -= head + h
        for i, (paint, panel, heading) in enumerate(line):
            axes = figure.add_axes(tuple(np.array([side + i * (w + gap), y, w, h]) / place))
            _blank(axes, panel)
            axes.set_title(heading, loc="left", fontsize=11, color=INK, pad=6)
            paint(axes, panel, heat)
            residual_at = y
    x = side + across * w + (across - 1) * gap + 0.12
    colours = figure.add_axes(tuple(np.array([x, residual_at, 0.14, h]) / place))
    scale = figure.colorbar(ScalarMappable(heat, HEAT), cax=colours)
    scale.outline.set_visible(False)
    colours.tick_params(labelsize=8, length=2, colors=FAINT)
    # A file name may have dollar signs.
    figure.text(
        side / width, (height - 0.42) / height, title, parse_math=False, fontsize=17, color=INK, fontweight="bold"
    )
    figure.text(side / width, (height - 0.72) / height, subtitle, parse_math=False, fontsize=10.5, color=FAINT)
    _key(figure, side, width, height, any(len(p.frame.overwritten) for p in panels))
    return figure


def _blank(axes: Axes, panel: Panel) -> None:
    """Sets up axes that count patches: column c, row r is the square [c, c+1] x [r, r+1]."""
    rows, cols = panel.grid
    axes.set(xlim=(0, cols), ylim=(rows, 0), xticks=[], yticks=[], aspect="auto")
    axes.spines[:].set_visible(False)


def _kept(axes: Axes, panel: Panel, heat: Normalize) -> None:
    """Draws the photo with dropped patches dimmed, retained ones clear, basis tokens outlined and numbered."""
    clear = panel.frame.retained
    dim = 0.10 + 0.36 * (0.75 * _grey(panel.photo) + 0.25 * panel.photo)
    _image(axes, np.where(_enlarge(clear, panel), panel.photo, dim), panel)
    axes.add_collection(LineCollection(borders_of(clear, panel.grid), colors="white", linewidths=0.7, alpha=0.9))
    _outline_basis(axes, panel)


def _merged(axes: Axes, panel: Panel, heat: Normalize) -> None:
    """Draws each group of merged tokens in its own colour, with a line from each token to the one it was merged
    into."""
    rows, cols = panel.grid
    target, kept = panel.frame.target_position, panel.frame.kept
    colours = group_colours(target)  # [N, 3]
    strong = np.isin(np.arange(rows * cols), kept)
    weight = np.where(strong, 0.35, 0.62) * (target >= 0)  # a kept patch shows more of its photo
    share = _enlarge(weight, panel)
    tint = _enlarge(colours, panel)
    _image(axes, (1 - share) * (0.15 + 0.75 * _grey(panel.photo)) + share * tint, panel)
    axes.add_collection(LineCollection(borders_of(target, panel.grid), colors="white", linewidths=0.8, alpha=0.9))
    moved = np.flatnonzero((target >= 0) & (target != np.arange(rows * cols)))
    ends = np.stack([_centres(moved, cols), _centres(target[moved], cols)], axis=1)  # [moved, 2, 2]
    axes.add_collection(LineCollection(ends, colors=colours[moved] * 0.55, linewidths=0.55, alpha=0.55))
    taken = np.unique(target[moved])
    x, y = _centres(taken, cols).T
    area = _points(axes, panel, 0.34) ** 2
    axes.scatter(x, y, s=area, color=colours[taken], edgecolors="white", linewidths=0.9, zorder=3)


def _residual(axes: Axes, panel: Panel, heat: Normalize) -> None:
    """Draws e^2 of every token, with the outlines of the kept ones."""
    rows, cols = panel.grid
    axes.imshow(
        panel.frame.residual.reshape(rows, cols),
        cmap=HEAT,
        norm=heat,
        extent=(0, cols, rows, 0),
        interpolation="nearest",
        aspect="auto",
    )
    borders = borders_of(panel.frame.retained, panel.grid)
    axes.add_collection(LineCollection(borders, colors="white", linewidths=0.7, alpha=0.6))
    _outline_basis(axes, panel)


def _image(axes: Axes, pixels: np.ndarray, panel: Panel) -> None:
    rows, cols = panel.grid
    axes.imshow(np.clip(pixels, 0, 1), extent=(0, cols, rows, 0), interpolation="antialiased", aspect="auto")


def _outline_basis(axes: Axes, panel: Panel) -> None:
    """Outlines basis tokens at their own positions, numbered in picking order; the kept tokens whose rows they took are
    dotted."""
    cols = panel.grid[1]
    size = min(_points(axes, panel, 0.5), 12.0)
    for order, position in enumerate(panel.frame.basis, start=1):
        r, c = divmod(int(position), cols)
        axes.add_patch(
            Rectangle((c, r), 1, 1, fill=False, edgecolor=BASIS, linewidth=min(0.13 * size + 0.6, 1.8), zorder=4)
        )
        if size < 4.5:  # the number would be too small to read
            continue
        axes.text(
            c + 0.5,
            r + 0.54,
            str(order),
            ha="center",
            va="center",
            fontsize=size,
            color=BASIS,
            fontweight="bold",
            zorder=5,
            path_effects=[withStroke(linewidth=1.8, foreground=INK)],
        )
    for position in panel.frame.overwritten:
        r, c = divmod(int(position), cols)
        axes.add_patch(Rectangle((c, r), 1, 1, fill=False, edgecolor=BASIS, linewidth=1.4, linestyle=":", zorder=4))


def _key(figure: Figure, side: float, width: float, height: float, overwritten: bool) -> None:
    """Draws one line below the panels that explains the marks."""
    y = 0.24
    place = np.array([width, height, width, height])
    axes = figure.add_axes(tuple(np.array([side, y - 0.06, 0.2, 0.2]) / place))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    axes.add_patch(Rectangle((0.08, 0.08), 0.84, 0.84, facecolor="#8a8f98", edgecolor=BASIS, linewidth=1.8))
    words = "basis token, numbered in picking order"
    if overwritten:
        words += " (dotted: a kept token whose row a basis token took)"
    words += "   ·   white lines: around kept tokens, or between groups merged into different ones"
    figure.text((side + 0.3) / width, y / height, words, fontsize=9, color=FAINT)


def _heat(panels: list[Panel]) -> Normalize:
    """Returns one colour scale for all panels: 0 to the largest finite e^2."""
    finite = np.concatenate([p.frame.residual for p in panels])
    finite = finite[np.isfinite(finite)]
    return Normalize(0, max(float(finite.max()) if len(finite) else 0.0, 1e-12))


def moved(frame: Frame) -> int:
    """Returns how many tokens were merged into another one."""
    target = frame.target_position
    return int(((target >= 0) & (target != np.arange(len(target)))).sum())


def group_colours(target_position: np.ndarray) -> np.ndarray:
    """Returns the colour of every token's group, [N, 3]. Large groups get hues far apart; tokens without a target get
    grey."""
    targets, counts = np.unique(target_position[target_position >= 0], return_counts=True)
    table = np.full((len(target_position) + 1, 3), 0.5)  # the last row is for target -1
    for i, target in enumerate(targets[np.argsort(-counts, kind="stable")]):
        hue = (0.58 + i * 0.618034) % 1  # golden ratio: any run of hues is spread evenly
        table[target] = colorsys.hls_to_rgb(hue, (0.55, 0.42, 0.68)[i % 3], (0.75, 0.65, 0.85)[i % 3])
    return table[target_position]


def borders_of(groups: np.ndarray, grid: tuple[int, int]) -> list[list[tuple[int, int]]]:
    """Returns the edges between neighbouring patches of different groups [N]."""
    g = groups.reshape(grid)
    upright = [[(c + 1, r), (c + 1, r + 1)] for r, c in np.argwhere(g[:, 1:] != g[:, :-1])]
    level = [[(c, r + 1), (c + 1, r + 1)] for r, c in np.argwhere(g[1:] != g[:-1])]
    return upright + level


def _enlarge(values: np.ndarray, panel: Panel) -> np.ndarray:
    """Repeats values per patch, [N] or [N, 3], for its pixels: [rows * PATCH, cols * PATCH, 1 or 3]."""
    rows, cols = panel.grid
    return values.reshape(rows, cols, -1).repeat(PATCH, 0).repeat(PATCH, 1)


def _grey(photo: np.ndarray) -> np.ndarray:
    """Returns the luminance [H, W, 1] of a photo [H, W, 3]."""
    return photo @ np.array([[0.299], [0.587], [0.114]])


def _centres(positions: np.ndarray, cols: int) -> np.ndarray:
    """Returns x and y of the centres of patches [T], as [T, 2]."""
    return np.stack([positions % cols + 0.5, positions // cols + 0.5], axis=1)


def _points(axes: Axes, panel: Panel, share: float) -> float:
    """Returns `share` of a patch's edge, in points."""
    box = axes.get_window_extent()
    return share * min(box.height / panel.grid[0], box.width / panel.grid[1]) * 72 / axes.figure.dpi
