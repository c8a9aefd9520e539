"""Writes docs/quality.md, its plots and its pictures from the raw results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from apet import encoders, outcome, pictures
from matplotlib.figure import Figure

import apet_kernels
from apet_kernels.options import PAPER
from benchmarks.lib.sheet import Sheet, markdown
from benchmarks.quality import features, intrinsic, methods, scenes
from benchmarks.quality.counting import Interval, answers, best
from benchmarks.quality.texts import (
    AGREEMENT,
    BEGIN,
    END,
    INTRINSIC,
    INTRODUCTION,
    KEPT,
    PUBLISHED,
    REPRODUCE,
    TASK,
    VARIANTS,
)

MIDDLE = 8  # the layer whose tables are shown in full
FEWEST = 5  # sources of pictures that an interval can be made of
SHOWN = ("apet", "apet overwrite", "tome", "divprune", "visionzip", "fastv", "fps", "norm", "uniform", "random")


def write(results: Path, docs: Path) -> None:
    """Writes quality.md, quality-task.png and quality-intrinsic.png into `docs`, from the files in `results`."""
    with np.load(results / "task-pictures.npz") as stored:
        numbers = {"train": int(stored["train"]), "epochs": int(stored["epochs"])}
        numbers |= {name: len(stored[f"{name}/source"]) for name in ("val", "test")}
        numbers["photographs"] = len(stored["test/names"])
    numbers["resamples"] = len(answers(results, MIDDLE, "test").weights)
    with np.load(results / "intrinsic.npz") as stored:
        source = stored["source"]
    filmed = np.isin(source, intrinsic.CLIPS)
    differences = sum(len(methods.VARIANTS) + 3 for _ in methods.VARIANT_BUDGETS) * len(features.LAYERS)
    parts = [
        INTRODUCTION.format(**numbers, vlm=_of_model(docs / "quality.md")),
        _verdict(results),
        "![retained accuracy against tokens kept](quality-task.png)",
        TASK.format(**numbers),
        _head(results),
        markdown(_full(results)),
        *(markdown(_retained(results, layer)) for layer in features.LAYERS),
        *(markdown(_kinds(results, budget)) for budget in methods.VARIANT_BUDGETS),
        VARIANTS.format(tests=differences, chance=differences / 20),
        *(markdown(_variants(results, budget)) for budget in methods.VARIANT_BUDGETS),
        INTRINSIC.format(
            photos=(~filmed).sum(),
            sources=len(set(source[~filmed])),
            frames=filmed.sum(),
            head="commit {commit}, {date}".format(**_head_of(results / "intrinsic.npz")),
        ),
        "![what is lost, against tokens kept](quality-intrinsic.png)",
        *(
            markdown(_losses(results, measure, chosen, words))
            for measure in intrinsic.MEASURES
            for chosen, words in ((~filmed, "photographs"), (filmed, "video frames"))
        ),
        KEPT,
        AGREEMENT,
        markdown(_agreement(results)),
        PUBLISHED,
        REPRODUCE,
    ]
    (docs / "quality.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _task_plot(results).savefig(docs / "quality-task.png", dpi=90)
    _intrinsic_plot(results).savefig(docs / "quality-intrinsic.png", dpi=90)


def draw(docs: Path) -> None:
    """Draws quality-kept.png: one photograph of scikit-image at five budgets."""
    encoder = encoders.load()
    photo = scenes.sources("test")[1].frames[0]  # the cup of coffee
    square = photo.crop((100, 0, 500, 400))
    x = encoder.encode([encoder.view(square)])  # [1, 576, 384]
    view = np.asarray(encoder.view(square, pictures.PATCH), np.float64) / 255
    residual, basis = apet_kernels.score(x)
    panels = []
    for keep in (288, 144, 72, 36, 17):
        kept = apet_kernels.compress(x, keep, **PAPER)[1]
        frame = outcome.frame(x[0], kept[0], residual[0], basis[0], "inplace")
        panels.append(pictures.Panel(view, frame, encoder.grid(*square.size), f"{keep} of 576 tokens"))
    figure = pictures.clip_figure(panels, "What is kept, and where the rest goes", "DINOv2-S/14, layer 8")
    figure.savefig(docs / "quality-kept.png", dpi=55)


# ---- the summary


def _of_model(page: Path) -> str:
    """Returns the section that `benchmarks.vlm write` wrote into the page, between its markers."""
    _, _, rest = (page.read_text() if page.exists() else "").partition(BEGIN)
    section, closed, _ = rest.partition(END)
    return BEGIN + (section if closed else "\n") + END


def _verdict(results: Path) -> str:
    """Returns the paper's rule against each other method, and whether it is the best variant of ApET."""
    lines = ["## Summary", "", markdown(_wins(results)), "", "### The best variant of ApET", ""]
    for budget in methods.VARIANT_BUDGETS:
        names = ["apet", "apet overwrite", "apet append", "apet unmerged", *methods.VARIANTS]
        chosen = best(results, budget, names)
        if chosen == methods.DEFAULT:
            lines.append(f"- Of all variants of ApET the paper's rule is the best on validation at {budget} tokens.")
            continue
        gains = "; ".join(
            f"layer {layer} {_signed(answers(results, layer, 'test').ahead(budget, chosen, methods.DEFAULT))}"
            for layer in features.LAYERS
        )
        blocks = "; ".join(
            f"layer {layer} {_signed(answers(results, layer, 'test').ahead(budget, chosen, methods.DEFAULT, True))}"
            for layer in features.LAYERS
        )
        lines.append(
            f"- Of all variants of ApET, `{chosen}` is the best on validation at {budget} tokens. On test it is ahead "
            f"of the paper's rule by (points, 95 % over pictures) {gains}; with whole photographs resampled: {blocks}."
        )
        if _standing(results, budget, chosen) == "better":
            lines.append(
                f"- So the paper's rule is not the best at {budget} tokens. (The default, a basis of all kept tokens,"
                " came later: [vlm.md](vlm.md#the-rule-for-the-default).)"
            )
    return "\n".join(lines)


def _wins(results: Path) -> Sheet:
    """Returns a row for each other method: whether the paper's rule wins at each budget."""
    retained = [
        [answers(results, layer, "test").retained(budget, methods.DEFAULT).value for layer in features.LAYERS]
        for budget in methods.BUDGETS
    ]
    lines = [["*the paper's rule retains, %*", *(", ".join(f"{share:.1f}" for share in shares) for shares in retained)]]
    outcome = {"worse": "win", "even": "tie", "better": "**loss**"}
    for name in methods.MAIN:
        if name != methods.DEFAULT:
            lines.append([name, *(outcome[_standing(results, budget, name)] for budget in methods.BUDGETS)])
    columns = [[line[1 + at] for line in lines[1:]] for at in range(len(methods.BUDGETS))]
    lines.append(["*wins, ties, losses*", *(", ".join(str(c.count(o)) for o in outcome.values()) for c in columns)])
    return Sheet(
        "The paper's rule against each other method",
        f"Tokens kept of {methods.FULL}; retained accuracy in layers {', '.join(map(str, features.LAYERS))}. "
        "Win, loss: the difference lies beyond its 95 % interval in at least two of the three layers, and in none the "
        "other way. Tie: all other cases.",
        ["tokens kept", *map(str, methods.BUDGETS)],
        lines,
    )


def _standing(results: Path, budget: int, name: str) -> str:
    """Returns whether a way is "better" or "worse" than the paper's rule beyond the intervals, or "even"."""
    leads = [answers(results, layer, "test").ahead(budget, name, methods.DEFAULT) for layer in features.LAYERS]
    signs = [(lead.value > 0) - (lead.value < 0) for lead in leads if lead.beyond]
    if len(signs) >= 2 and len(set(signs)) == 1:
        return "better" if signs[0] > 0 else "worse"
    return "even"


def _head(results: Path) -> str:
    """Returns how the raw results were made: the values of the first file, and all commits."""
    heads = [head for path in sorted(results.glob("task-*.npz")) if (head := _head_of(path))]
    shared = {key: value for key, value in heads[0].items() if key not in ("load", "commit", "date", "command")}
    commits = ", ".join(sorted({head["commit"] for head in heads}))
    dates = sorted(head["date"] for head in heads)
    lines = [f"- {key}: {value}" for key, value in shared.items()]
    lines += ["- command: python -m benchmarks.quality task", f"- date: {dates[0]} to {dates[-1]}"]
    return "\n".join([*lines, f"- commits of the parts (+: with changes that were not committed): {commits}"])


def _head_of(path: Path) -> dict[str, str]:
    """Returns how a file of raw results was made."""
    with np.load(path) as stored:
        return {key.removeprefix("head/"): str(stored[key]) for key in stored.files if key.startswith("head/")}


# ---- tables


def _full(results: Path) -> Sheet:
    chances = [100 / number for number in scenes.KINDS.values()]
    lines = [["guessing", *(f"{c:.0f}" for c in chances), f"{np.mean(chances):.0f}"]]
    for layer in features.LAYERS:
        all_of = answers(results, layer, "test")
        row = [all_of.accuracy(kind) for kind in (*range(len(scenes.KINDS)), None)]
        lines.append([f"layer {layer}", *(f"{a:.1f}" for a in row)])
    return Sheet("Accuracy on all 256 tokens, %", "Mean of three readers.", ["", *scenes.KINDS, "all"], lines)


def _retained(results: Path, layer: int) -> Sheet:
    found = answers(results, layer, "test")
    lines = [[name, *(_bracketed(found.retained(b, name)) for b in methods.BUDGETS)] for name in methods.MAIN]
    note = f"Percent of the accuracy on all tokens, {found.accuracy():.1f} %."
    return Sheet(f"Layer {layer}: retained accuracy", note, ["tokens kept", *map(str, methods.BUDGETS)], lines)


def _kinds(results: Path, budget: int) -> Sheet:
    found = answers(results, MIDDLE, "test")
    lines = [
        [name, *(_bracketed(found.retained(budget, name, kind)) for kind in range(len(scenes.KINDS)))]
        for name in methods.MAIN
    ]
    return Sheet(
        f"Layer {MIDDLE}, {budget} tokens: retained accuracy by question", "Percent.", ["", *scenes.KINDS], lines
    )


def _variants(results: Path, budget: int) -> Sheet:
    names = [name for name in methods.MAIN if name.startswith("apet ")] + list(methods.VARIANTS)
    lines = []
    for name in names:
        leads = [answers(results, layer, "test").ahead(budget, name, methods.DEFAULT) for layer in features.LAYERS]
        lines.append([name, *map(_signed, leads)])
    return Sheet(
        f"{budget} tokens: ahead of the paper's rule",
        "Percentage points.",
        ["", *(f"layer {la}" for la in features.LAYERS)],
        lines,
    )


def _losses(results: Path, measure: str, chosen: np.ndarray, words: str) -> Sheet:
    """Returns the table of losses for layer 8; the other layers are in the raw results."""
    at = intrinsic.MEASURES.index(measure)
    with np.load(results / "intrinsic.npz") as stored:
        source = stored["source"][chosen]
        values = {
            (name, b): stored[f"{MIDDLE}/{b}/{name}"][at][chosen] for name in methods.MAIN for b in methods.BUDGETS
        }
    several = len(np.unique(source)) >= FEWEST
    lines = []
    for name in methods.MAIN:
        row = [name]
        for budget in methods.BUDGETS:
            text = f"{100 * values[name, budget].mean():.1f}"
            ahead = several and _by_source(values[name, budget] - values[methods.DEFAULT, budget], source).high < 0
            row.append(f"**{text}**" if ahead else text)
        lines.append(row)
    bold = " Bold: less than the paper's rule beyond the 95 % interval, paired and by photograph." if several else ""
    note = f"Percent lost, layer {MIDDLE}.{bold}"
    return Sheet(f"{measure.capitalize()}, {words}", note, ["tokens kept", *map(str, methods.BUDGETS)], lines)


def _agreement(results: Path) -> Sheet:
    stored = json.loads((results / "agreement.json").read_text())
    lines = [
        [
            line["tokens"],
            line["dtype"],
            str(line["keep"]),
            str(line["images"]),
            *(f"{100 * line[key]:.1f}" for key in ("same", "common", "same_basis")),
        ]
        for line in stored["lines"]
    ]
    columns = ["tokens", "dtype", "keep", "images", "same set, %", "in common, %", "same basis, %"]
    return Sheet("Kept sets", f"Commit {stored['head']['commit']}.", columns, lines)


def _by_source(difference: np.ndarray, source: np.ndarray) -> Interval:
    """Returns the mean of a difference [n] of pictures, with the interval over resampled sources [n], each with all of
    its pictures."""
    _, number = np.unique(source, return_inverse=True)
    sums, sizes = np.bincount(number, difference), np.bincount(number)
    weights = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), 2000)
    low, high = np.quantile(weights @ sums / (weights @ sizes), (0.025, 0.975))
    return Interval(float(difference.mean()), float(low), float(high))


def _bracketed(found: Interval) -> str:
    return f"{found.value:.1f} [{found.low:.1f}, {found.high:.1f}]"


def _signed(found: Interval) -> str:
    text = f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
    return f"**{text}**" if found.beyond else text


# ---- plots


def _task_plot(results: Path) -> Figure:
    def retained(layer: int, name: str) -> list[float]:
        return [answers(results, layer, "test").retained(b, name).value for b in methods.BUDGETS]

    return _curves(retained, [f"layer {layer}" for layer in features.LAYERS], features.LAYERS, "accuracy retained, %")


def _intrinsic_plot(results: Path) -> Figure:
    with np.load(results / "intrinsic.npz") as stored:
        losses = {key: stored[key].mean(1) for key in stored.files if key[0].isdigit()}

    def lost(measure: int, name: str) -> list[float]:
        return [100 * float(losses[f"{MIDDLE}/{b}/{name}"][measure]) for b in methods.BUDGETS]

    panels = [f"{m}, layer {MIDDLE}, all pictures" for m in intrinsic.MEASURES]
    return _curves(lost, panels, tuple(range(len(panels))), "energy lost, %")


def _curves(values: Callable[[int, str], list[float]], titles: list[str], keys: tuple[int, ...], label: str) -> Figure:
    """Draws a panel for each key, a line for each of SHOWN, tokens kept on a logarithmic axis."""
    figure = Figure(figsize=(4.6 * len(keys), 4.4), layout="constrained")
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key, title in zip(panels, keys, titles, strict=True):
        for i, name in enumerate(SHOWN):
            mine = name.startswith("apet")
            style = {
                "color": "black" if mine else f"C{i}",
                "linewidth": 2.2 if mine else 1.1,
                "marker": "o",
                "markersize": 3,
            }
            axes.plot(methods.BUDGETS, values(key, name), label=name, linestyle="--" if " " in name else "-", **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(methods.BUDGETS, [str(b) for b in methods.BUDGETS])
        axes.set(title=title, xlabel="tokens kept of 256")
        axes.grid(alpha=0.25)
    panels[0].set_ylabel(label)
    panels[-1].legend(fontsize=8)
    return figure
