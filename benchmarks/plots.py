"""Draws the pictures of docs/benchmarks.md and docs/engines.md."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import growth, kept, serving
from benchmarks.lib.cases import Case
from benchmarks.lib.suite import Results

# Our kernels stand out, other implementations of ApET have warm colours, other methods cool ones, ceilings grey.
STYLES = {
    "kernel": {"color": "black", "linewidth": 2.4, "marker": "o", "zorder": 5},
    "published": {"color": "tab:red", "marker": "v"},
    "eager": {"color": "tab:orange", "marker": "s"},
    "tuned": {"color": "goldenrod", "marker": "D"},
    "tome": {"color": "tab:blue", "marker": "^"},
    "divprune": {"color": "tab:cyan", "marker": "P"},
    "fps": {"color": "tab:green", "marker": "X"},
    "visionzip": {"color": "tab:purple", "marker": "<"},
    "fastv": {"color": "tab:pink", "marker": ">"},
    "norm": {"color": "tab:olive", "marker": "."},
    "random": {"color": "tab:brown", "marker": "."},
    "uniform": {"color": "silver", "marker": "."},
    "copy": {"color": "grey", "linestyle": ":"},
    "reference cost": {"color": "grey", "linestyle": "--"},
    "predicted": {"color": "grey", "linestyle": "--"},
}
LABELS = {
    "kernel": "this kernel",
    "published": "published formulation",
    "eager": "eager torch",
    "tuned": "tuned eager torch",
    "tome": "ToMe",
    "divprune": "DivPrune",
    "fps": "FPS alone",
    "visionzip": "VisionZip (attention given)",
    "fastv": "FastV (attention given)",
    "norm": "norm",
    "random": "random",
    "uniform": "uniform grid",
    "copy": "one copy of x",
    "reference cost": "reference cost: product + sweeps",
    "predicted": "cost model",
}
SIZE = {"markersize": 4, "linewidth": 1.3}


def draw_kept(results: Results, path: Path) -> None:
    """Draws time against tokens kept, a panel for each shape."""
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in results.rows:
        case = Case.of(row.case)
        panel = panels.setdefault(f"[{case.B}, {case.N}, {case.D}] {case.dtype_name}", {})
        for name in ("kernel", *kept.SAME, *kept.OTHERS, "copy", "reference cost"):
            if name in row.ms:
                panel.setdefault(name, []).append((case.keep, row.ms[name]))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(3.6 * len(panels), 5), squeeze=False, sharey=True)
    for place, (title, lines) in zip(axes[0], panels.items(), strict=True):
        for name, pairs in lines.items():
            place.plot(*zip(*sorted(pairs), strict=True), label=LABELS[name], **(SIZE | STYLES[name]))
        _axis(place, title, "tokens kept of each image", ticks={keep for pairs in lines.values() for keep, _ in pairs})
    axes[0][0].set_ylabel("milliseconds")
    _finish(figure, axes[0], path)


def draw_growth(results: Results, path: Path) -> None:
    """Draws time above, memory below, a column for each axis; markers are filled in float32, open in bfloat16."""
    figure, axes = pyplot.subplots(2, len(growth.AXES), figsize=(14, 6), squeeze=False)
    for line, (cost, unit) in zip(axes, (("time", 1.0), ("memory", 2.0**20)), strict=True):
        found = growth.curves(results, cost)
        for place, (axis, what) in zip(line, growth.AXES.items(), strict=True):
            for curve in found:
                if curve.axis == axis:
                    label = f"{LABELS[curve.name]}, {curve.dtype}"
                    style = SIZE | STYLES[curve.name]
                    if curve.dtype == "bfloat16":
                        style |= {"linestyle": ":"} if curve.name == "predicted" else {"markerfacecolor": "white"}
                    place.plot(curve.values, [c / unit for c in curve.costs], label=label, **style)
            _axis(
                place, what if cost == "time" else "", "", ticks={v for c in found if c.axis == axis for v in c.values}
            )
    axes[0][0].set_ylabel("milliseconds")
    axes[1][0].set_ylabel("MiB beyond the input")
    _finish(figure, axes.flat, path)


def draw_serving(results: Results, path: Path) -> None:
    """Draws requests per second above, times to the first token below, against all tokens: a column for each medium and
    length of text, a colour for each number of clients."""
    columns = list(dict.fromkeys((row.case["media"], row.case["text"]) for row in results.rows))
    loads = list(dict.fromkeys(row.case["concurrency"] for row in results.rows))
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4 * len(columns), 6), squeeze=False, sharey="row")
    for number, column in enumerate(columns):
        for row in (row for row in results.rows if (row.case["media"], row.case["text"]) == column):
            for method, style in (
                ("apet", {"marker": "o"}),
                ("random", {"linestyle": ":"}),
                ("evs", {"linestyle": "--"}),
            ):
                found = {b: serving.gains(row, name) for b, name in serving.measured(row, method).items() if b != "all"}
                clients = row.case["concurrency"]
                for place, gain in zip(axes[:, number], range(2), strict=True) if found else ():
                    place.plot(
                        [float(Fraction(budget)) for budget in found],
                        [gains[gain] for gains in found.values()],
                        label=f"{method}, {clients} clients",
                        **(SIZE | style | {"color": f"C{loads.index(clients)}"}),
                    )
        for place in axes[:, number]:
            place.axhline(1, color="grey", linewidth=0.8)
            place.set(xscale="log")
            place.minorticks_off()
            budgets = {b for row in results.rows for b in serving.measured(row, "apet") if b != "all"}
            place.set_xticks([float(Fraction(b)) for b in budgets], list(budgets), fontsize=7)
            place.grid(alpha=0.3)
        axes[0][number].set_title(f"{column[0]}, {column[1]} text", fontsize=9)
        axes[1][number].set_xlabel("share of the visual tokens kept")
    axes[0][0].set_ylabel("requests/s, times those of all tokens")
    axes[1][0].set_ylabel("first token, times sooner")
    _finish(figure, axes.flat, path)


def _axis(place: Axes, title: str, below: str, ticks: set[int]) -> None:
    place.set(xscale="log", yscale="log", title=title, xlabel=below)
    place.minorticks_off()
    place.set_xticks(sorted(ticks), [str(tick) for tick in sorted(ticks)], fontsize=6, rotation=45)
    place.title.set_fontsize(9)
    place.grid(alpha=0.3)


def _finish(figure: Figure, axes: object, path: Path) -> None:
    """Adds one legend for all panels, below them, and writes the picture."""
    entries = {}
    for place in axes:
        handles, labels = place.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries.keys(), loc="upper center", bbox_to_anchor=(0.5, 0), ncols=5, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80, bbox_inches="tight")
    pyplot.close(figure)
