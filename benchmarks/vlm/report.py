"""Writes docs/vlm.md, and the first section of docs/quality.md, from the raw answers and the log of the training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apet_kernels.budgets import LIMIT
from benchmarks.lib.sheet import Sheet, markdown, replaced
from benchmarks.quality.counting import Interval
from benchmarks.quality.texts import BEGIN, END
from benchmarks.vlm import arms, evaluation, features, guard, llava, scenes, sources, texts, training
from benchmarks.vlm.evaluation import Answers
from benchmarks.vlm.questions import KINDS

BY_KIND = 64  # tokens kept, of the table by kind
ALONE = (*arms.ARMS, *arms.STAGED)  # positions are counted anew
IN_PLACE = tuple(arms.IN_PLACE)
DISTINCT = "qr refine 0 distinct 2"  # the rule that may be recommended with positions kept
HEIGHTS = (range(1, 10), range(10, 16), range(16, 24), range(24, 200))  # pixels of a word's capitals
SECOND = "seed-1"  # the folder of the second model's answers, and of its log


def write(results: Path, model: Path, docs: Path) -> None:
    """Writes vlm.md: the description of the study, and the tables if there are answers."""
    test = sources.load("test").photographs
    introduction = texts.INTRODUCTION.format(
        tower=llava.LAYERS,
        trained=llava.TRAINED,
        layers=llava.DECODER["num_hidden_layers"],
        width=llava.DECODER["hidden_size"],
        smallest=scenes.SMALLEST,
        largest=scenes.LARGEST,
        regions=len(test),
        photographs=len({part.name for part in test}),
        at_once=training.Plan.questions,
    )
    answered = (results / evaluation.QUESTIONS).exists()
    parts = [introduction, texts.COMPARED.format(batch=evaluation.AT_ONCE), texts.RULE]
    second = results / SECOND
    if answered:
        found = Answers(results)
        other = Answers(second) if (second / evaluation.QUESTIONS).exists() else None
        parts += [decision(found), texts.AMENDED, recommended(found, other)]
    if (model / "log.jsonl").exists():
        parts.append(f"{markdown(curve(model / 'log.jsonl'))}\n")
    if answered:
        parts += [f"{markdown(sheet)}\n" for sheet in sheets(found)]
        if measured_in_place(found):
            parts += positions(found)
        parts += [texts.ONE_SEED] if other is None else another(found, other, model)
        parts.append(texts.BEFORE)
    else:
        parts.append(texts.NO_ANSWERS)
    names = " ".join(f'"{name}"' if " " in name else name for name in again())
    (docs / "vlm.md").write_text("\n".join([*parts, texts.REPRODUCE.format(arms=names)]))
    if answered and (docs / "quality.md").exists():
        page = docs / "quality.md"
        page.write_text(replaced(page.read_text(), BEGIN, END, summary(found, other)))


def sheets(found: Answers) -> list[Sheet]:
    """Returns the tables of the answers."""
    there = [whole(found), budgets(found), ahead(found), by_kind(found), reading(found)]
    if (guard.ARM, arms.BUDGETS[0]) in found.stored():
        there.append(foretold(found))
    if all(evaluation.path_of(found.folder, arms.GUARDED, keep).exists() for keep in arms.BUDGETS):
        there.append(guards(found))
    return there


def deciding() -> list[str]:
    """Returns the arms that `RULE` looks at: its three candidates, then all others without attention and question."""
    others = [name for name in arms.OTHERS if name not in arms.NEED_ATTENTION | arms.BY_QUESTION]
    return ["paper", "qr refine 2", "qr refine 0", *others]


def decision(found: Answers) -> str:
    """Applies `RULE`. Returns what follows from it, with the figures that decide."""
    there = found.stored()
    others = [name for name in deciding() if name in arms.OTHERS]
    missing = {name for name in deciding() if any((name, keep) not in there for keep in arms.BUDGETS)}
    if missing:
        return f"Not decided: not measured with each budget: {', '.join(sorted(missing))}.\n"

    lines, fit = [], {}
    for name in ("qr refine 2", "qr refine 0"):
        gains = {keep: lead(found, name, "paper", [keep]) for keep in (64, 32)}
        against = {other: lead(found, name, other) for other in others}
        behind = {other: one for other, one in against.items() if one.high < 0}
        fit[name] = all(gain.low > 0 for gain in gains.values()) and not behind
        figures = " and ".join(f"{said(gain)} at {keep}" for keep, gain in gains.items())
        last = ", ".join(f"`{other}` ({said(one)})" for other, one in behind.items())
        lines.append(
            f"- `{name}` is ahead of the paper's rule by {figures} tokens, and in the mean of the budgets behind "
            f"{last or 'no other method without attention'}."
        )
    more = {keep: lead(found, "qr refine 2", "qr refine 0", [keep]) for keep in (32, 16)}
    figures = " and ".join(f"{said(gain)} at {keep}" for keep, gain in more.items())
    lines.append(f"- `qr refine 2` is ahead of `qr refine 0` by {figures} tokens.")
    candidate = "qr refine 2" if any(gain.low > 0 for gain in more.values()) else "qr refine 0"
    given = candidate if fit[candidate] else "paper"
    same = f"**So `{given}` is the default.**"
    end = same if given == arms.DEFAULT else texts.NOT_CONFIRMED.format(given, arms.DEFAULT)
    return "\n".join([*lines, "", end]) + "\n"


def plan_of(log: Path) -> dict[str, Any]:
    """Returns the plan of the last run in a log of a training, with its machine."""
    told = [json.loads(line) for line in log.read_text().splitlines()]
    last: dict[str, Any] = [line for line in told if "plan" in line][-1]
    return last


def again() -> list[str]:
    """Returns the arms that the second model answers with: those of `RULE`, `DISTINCT`, and some in place."""
    some = ("paper", arms.DEFAULT, DISTINCT, "cen-prune", "cen-prune + merge", "spare", "divprune", "tome")
    return [*deciding(), DISTINCT, *(f"{name} in place" for name in some)]


def measured_in_place(found: Answers) -> bool:
    """Returns whether all arms with positions kept have answers with each budget."""
    return len(found.stored(IN_PLACE)) == len(IN_PLACE) * len(arms.BUDGETS)


def recommended(found: Answers, other: Answers | None) -> str:
    """Applies `AMENDED` to the answers of the first model and of the second one. Returns what follows, with figures."""
    models = [found] if other is None else [found, other]
    default, weighted = f"{arms.DEFAULT} in place", f"{DISTINCT} in place"
    needed = [(n, k) for n in ("paper", arms.DEFAULT, default, weighted) for k in arms.BUDGETS]
    if other is None or any((n, k) not in m.stored((*ALONE, *IN_PLACE)) for n, k in needed for m in models):
        return "Not decided: not measured with both seeds.\n"
    ahead_of = [[lead(m, arms.DEFAULT, "paper", [keep]) for keep in (64, 32)] for m in models]
    stays = all(one.low > 0 for some in ahead_of for one in some)
    figures = "; ".join(" and ".join(map(said, some)) for some in ahead_of)
    lines = [
        f"- `{arms.DEFAULT}` is ahead of the paper's rule at 64 and at 32 tokens by {figures} (first; second seed):"
        f" **so `{arms.DEFAULT if stays else 'paper'}` is the default.**"
    ]
    for what, name, base in (('positions="keep"', default, arms.DEFAULT), ("distinct=2", weighted, default)):
        gains = [lead(m, name, base) for m in models]
        fit = all(one.low > 0 for one in gains)
        lines.append(
            f"- `{name}` is ahead of `{base}` by {'; '.join(map(said, gains))} in the mean of the budgets:"
            f" **`{what}` is {'' if fit else 'not '}recommended.**"
        )
    return "\n".join(lines) + "\n"


def another(found: Answers, other: Answers, model: Path) -> list[str]:
    """Returns the section of the second model, with its answers and its log; model: the folder of the first one."""
    folder = other.folder
    if other.asked != found.asked:
        raise ValueError(f"{folder} has answers to other questions than {found.folder}")
    tables = [both_seeds(found, other, names, base) for names, base in ((ALONE, "paper"), (IN_PLACE, "paper in place"))]
    sees = whole(other)._replace(title="Does the second one see?")
    steps, first = (plan_of(log)["plan"]["steps"] for log in (folder / "log.jsonl", model / "log.jsonl"))
    text = texts.ANOTHER.format(steps=steps, first=first)
    trained = curve(folder / "log.jsonl")._replace(title="Training of the second one")
    sheets = (trained, sees, *(table for table in tables if table.lines))
    return [text, decision(other), *(f"{markdown(sheet)}\n" for sheet in sheets)]


def both_seeds(found: Answers, other: Answers, names: Sequence[str], base: str) -> Sheet:
    """Returns the table of how far the arms among `names` are ahead of `base` with the first and the second model."""
    both = [arm for arm in other.stored(names) if arm in found.stored(names) and arm[0] != base]
    gains = {arm: [gain(answers, *arm, base) for answers in (found, other)] for arm in both}
    apart = {arm: found.interval(first - second) for arm, (first, second) in gains.items()}
    measured = sorted({keep for _, keep in both}, reverse=True)
    lines = []
    for name in dict.fromkeys(name for name, _ in both):
        cells = []
        for keep in measured:
            values = [found.interval(one).value for one in gains.get((name, keep), ())]
            text = ", ".join(f"{value:+.1f}" for value in values)
            cells.append(f"**{text}**" if values and apart[name, keep].beyond else text)
        lines.append([name, *cells])
    same = sum(not one.beyond for one in apart.values())
    note = (
        f"Percentage points ahead of `{base}`: of the first model, of the second one. Bold: they differ beyond"
        f" the 95 % interval, paired by question and resampled by photograph. {same} of {len(apart)} do not differ."
    )
    return Sheet(f"Ahead of `{base}`, with both seeds", note, ["tokens kept", *map(str, measured)], lines)


def gain(found: Answers, name: str, keep: int, base: str = "paper") -> np.ndarray:
    """Returns how much an arm is ahead of `base` in each answer, [q] of -1, 0 and 1."""
    return found.right(name, keep).astype(float) - found.right(base, keep)


def lead(found: Answers, name: str, base: str, budgets: Sequence[int] = arms.BUDGETS) -> Interval:
    """Returns how much an arm is ahead of `base` in the mean of some budgets."""
    return found.interval(np.mean([gain(found, name, keep, base) for keep in budgets], 0))


def beside(found: Answers, name: str, others: Sequence[str]) -> tuple[str, str]:
    """Returns which of the others are ahead of an arm in the mean of the budgets beyond the interval, and which are
    level with it, as text."""
    leads = {other: lead(found, other, name) for other in others}
    ahead_of = ", ".join(f"`{other}` ({said(one)})" for other, one in leads.items() if one.low > 0)
    level = ", ".join(f"`{other}` ({said(one)})" for other, one in leads.items() if one.low <= 0 <= one.high)
    return ahead_of or "none", level or "none"


def positions(found: Answers) -> list[str]:
    """Returns the section of the arms with positions kept."""
    default, weighted = f"{arms.DEFAULT} in place", f"{DISTINCT} in place"
    gains = [f"{said(found.interval(gain(found, default, k, arms.DEFAULT)))} at {k}" for k in arms.BUDGETS]
    others = [f"{name} in place" for name in deciding() if name in arms.OTHERS]
    ahead_default, level_default = beside(found, default, others)
    ahead_weighted, level_weighted = beside(found, weighted, others)
    text = texts.POSITIONS.format(
        gains=", ".join(gains),
        default=default,
        ahead_default=ahead_default,
        level_default=level_default,
        weighted=weighted,
        lead=said(lead(found, weighted, default)),
        ahead_weighted=ahead_weighted,
        level_weighted=level_weighted,
        lost=said(lead(found, weighted, f"{DISTINCT} without merge in place")),
    )
    accuracy = budgets(found, IN_PLACE)._replace(title="Accuracy with positions kept")
    against = ahead(found, default, IN_PLACE)._replace(title="Ahead of the default, positions kept")
    return [text, *(f"{markdown(sheet)}\n" for sheet in (accuracy, against))]


def summary(found: Answers, other: Answers | None) -> str:
    """Returns the section of quality.md: what all tokens give, what is recommended, how the default stands, and
    reading."""
    full, none = (said(found.interval(found.right(name, features.TOKENS))) for name in (arms.FULL, arms.NONE))
    text = (
        f"A small model of the LLaVA architecture, trained here on full sets of tokens, answers {len(found.asked)}"
        f" questions about held-out photographs and pages: {full} % right with all 256 tokens, {none} % without the"
        " picture. Model, training, every method and all intervals: [vlm.md](vlm.md)."
    )
    verdict = decision(found).rpartition("\n\n")[2].strip()
    verdict += ' `apet.patch(model, keep=64, basis=10, select="fps")` asks for the rule of the paper.'
    sheets = [standing(found)]
    if measured_in_place(found):
        title = 'The default with `positions="keep"` against each other method with positions kept'
        sheets.append(standing(found, f"{arms.DEFAULT} in place", IN_PLACE)._replace(title=title))
    tables = (markdown(sheet).strip() for sheet in sheets)
    return "\n\n".join([text, verdict, recommended(found, other).strip(), *tables, markdown(reading(found))])


def standing(found: Answers, of: str = arms.DEFAULT, names: Sequence[str] = ALONE) -> Sheet:
    """Returns the table of how an arm compares with every other one among `names`, in words."""

    def cell(name: str, keep: int) -> str:
        if name == of:
            return f"{found.interval(found.right(name, keep)).value:.1f}"
        ahead_by = found.interval(gain(found, of, keep, name))
        return "win" if ahead_by.low > 0 else "**loss**" if ahead_by.high < 0 else "tie"

    lines = sorted(table(found, cell, names), key=lambda line: line[0] != of)
    lines[0][0] = "*this rule, % right*"
    note = (
        "Win, loss: the rule is ahead or behind beyond the 95 % interval, paired, by photograph. Tie: all other cases."
    )
    return Sheet("The default against each other method", note, ["tokens kept", *map(str, arms.BUDGETS)], lines)


def whole(found: Answers) -> Sheet:
    """Returns the table of accuracy by kind, with all tokens and without."""
    lines = []
    for name in arms.WHOLE:
        right = found.right(name, features.TOKENS)
        cells = [said(found.interval(right, found.where(kind))) for kind in KINDS]
        lines.append([name, *cells, said(found.interval(right))])
    note = (
        f"{len(found.asked)} questions; percent right. Guesses: brightest 25, exists and relation 50. Another picture:"
        " the tokens of one of the other test pictures."
    )
    return Sheet("Does it see?", note, ["tokens", *KINDS, "all"], lines)


def curve(log: Path) -> Sheet:
    """Returns the table of accuracy on validation in the course of training, at ten points."""
    told = [json.loads(line) for line in log.read_text().splitlines()]
    points = [line for line in told if "accuracy" in line]
    some = [points[i] for i in sorted({round(v) for v in np.linspace(0, len(points) - 1, 10)})]
    lines = [[str(p["step"]), *(f"{p['accuracy'].get(kind, 0):.0f}" for kind in (*KINDS, "all"))] for p in some]
    last = plan_of(log)
    plan = ", ".join(f"{name} {value}" for name, value in last["plan"].items())
    note = (
        f"Percent right on validation, with all tokens. Of the last run: {plan}. {last['machine']['machine']}, a shared"
        " machine."
    )
    return Sheet("Training", note, ["step", *KINDS, "all"], lines)


def budgets(found: Answers, names: Sequence[str] = ALONE) -> Sheet:
    """Returns the table of accuracy of the arms among `names` at every budget."""
    full = said(found.interval(found.right(arms.FULL, features.TOKENS)))
    return Sheet(
        "Accuracy on compressed tokens",
        f"Percent right of all questions, with the 95 % interval. With all 256 tokens {full}.",
        ["tokens kept", *map(str, arms.BUDGETS)],
        table(found, lambda name, keep: said(found.interval(found.right(name, keep))), names),
    )


def ahead(found: Answers, base: str = "paper", names: Sequence[str] = ALONE) -> Sheet:
    """Returns the table of the arms among `names` against `base`, paired."""

    def cell(name: str, keep: int) -> str:
        found_interval = found.interval(gain(found, name, keep, base))
        text = f"{found_interval.value:+.1f} [{found_interval.low:+.1f}, {found_interval.high:+.1f}]"
        return f"**{text}**" if found_interval.beyond else text

    lines = [line for line in table(found, cell, names) if line[0] != base]
    note = "Percentage points, paired. Bold: 0 lies outside of the 95 % interval."
    return Sheet("Ahead of the paper's rule", note, ["tokens kept", *map(str, arms.BUDGETS)], lines)


def by_kind(found: Answers) -> Sheet:
    """Returns the table of accuracy of every arm by kind of question, at one budget."""
    names = [(arms.FULL, features.TOKENS), *((name, keep) for name, keep in found.stored() if keep == BY_KIND)]
    lines = []
    for name, keep in names:
        right = found.right(name, keep)
        lines.append([name, *(f"{found.interval(right, found.where(kind)).value:.0f}" for kind in KINDS)])
    return Sheet(f"By kind of question, with {BY_KIND} tokens", "Percent right.", ["", *KINDS], lines)


def foretold(found: Answers) -> Sheet:
    """Returns the table of how well each signal foretells losses."""
    full, kinds = found.right(arms.FULL, features.TOKENS), found.where("read") | found.where("beside")
    lines = []
    for name in found.signals(arms.BUDGETS[0]):
        for said_of, some in (("all", np.ones(len(full), bool)), ("read, beside", kinds)):
            cells = []
            for keep in arms.BUDGETS:
                among = full & some
                right = found.right(guard.ARM, keep)
                there = (among & right).any() and (among & ~right).any()
                cells.append(said(found.foretold(found.signals(keep)[name], right, among)) if there else "")
            lines.append([name, said_of, *cells])
    note = (
        "Area under the ROC curve, in percent: how often a signal of the picture (benchmarks/vlm/guard.py) is larger"
        f" for a question that `{guard.ARM}` loses than for one that it keeps, among those that are answered right with"
        " all tokens. 50 is chance."
    )
    return Sheet("Can a loss be foretold?", note, ["signal", "questions", *map(str, arms.BUDGETS)], lines)


def guards(found: Answers) -> Sheet:
    """Returns the table of what the guard of `apet.patch` finds, and of what keeping more gives."""
    full, kinds = found.right(arms.FULL, features.TOKENS), found.where("read") | found.where("beside")
    lines = []
    for keep in arms.BUDGETS:
        counts, lost = found.needed(keep), ~found.right(arms.DEFAULT, keep)
        little = (counts > keep)[found.picture]  # [q]

        def cell(among: np.ndarray, lost: np.ndarray = lost) -> str:
            return said(found.interval(lost, among)) if among.any() else ""

        line = [str(keep), f"{100 * (counts > keep).mean():.0f}"]
        line += [cell(full & some & where) for some in (np.ones(len(full), bool), kinds) for where in (little, ~little)]
        line.append(f"{counts.mean():.1f}")
        line += [said(found.interval(found.right(name, keep))) for name in (arms.DEFAULT, arms.GUARDED)]
        lines.append(line)
    note = (
        f"The guard finds that K is little where a dropped token has a squared residual above {LIMIT} of the mean"
        " square. Percent: pictures of which it says so; answers lost of those that are right with all tokens, where it"
        ' says so and elsewhere; right with K, and with as many tokens as guard="keep" gives, whose mean is beside it.'
    )
    columns = ["K", "little", "lost there", "lost elsewhere", "read, beside: there", "elsewhere"]
    return Sheet("The guard", note, [*columns, "mean tokens", "right with K", "right, guarded"], lines)


def reading(found: Answers) -> Sheet:
    """Returns the table of words read, by their height; with positions kept, of some of the rules."""
    names = [f"{h.start} to {h.stop - 1} px" if h.stop < 100 else f"{h.start} px and up" for h in HEIGHTS]
    lines = []
    in_place = [f"{name} in place" for name in ("paper", arms.DEFAULT, DISTINCT)]
    for name, keep in [(arms.FULL, features.TOKENS), *found.stored((*ALONE, *in_place))]:
        right = found.right(name, keep)
        asked = [found.where("read", heights) for heights in HEIGHTS]
        lines.append([name, str(keep), *(said(found.interval(right, some)) if some.any() else "" for some in asked)])
    return Sheet("Reading, by the height of the words", "Percent right.", ["", "tokens kept", *names], lines)


def table(found: Answers, cell: Callable[[str, int], str], names: Sequence[str] = ALONE) -> list[list[str]]:
    """Returns a line for each arm among `names` with answers, with a column for each budget."""
    there = found.stored(names)
    some = list(dict.fromkeys(name for name, _ in there))
    return [[name, *(cell(name, keep) if (name, keep) in there else "" for keep in arms.BUDGETS)] for name in some]


def said(interval: Interval) -> str:
    """Formats an interval as "71.2 [70.1, 72.3]"."""
    return f"{interval.value:.1f} [{interval.low:.1f}, {interval.high:.1f}]"
