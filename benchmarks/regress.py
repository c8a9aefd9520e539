"""Whether the kernel has become slower or needs more memory, in ratios: compares two result files of a suite.

    python -m benchmarks.regress BASELINE NEW [--allow 0.25]

Times vary between machines and over time. The ratio of the kernel's time to the times measured in turns with it (the
reference cost, its terms, the other implementations) hardly varies. Each ratio of a case is divided by its earlier
value. The median of these quotients is the slowdown of the kernel, so a single implementation that became faster has no
effect. If the suite times them, the kernel's halves and lesser instruction sets are compared likewise, and its memory
in bytes. A value that is worse by more than --allow is a regression. Exits with 1 for a regression or a missing case;
with 2 if nothing can be compared.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console

from benchmarks.lib import command
from benchmarks.lib.compare import NOISE, Row, ours
from benchmarks.lib.sheet import Sheet, show
from benchmarks.lib.suite import Results, load, named

ALLOW = 0.25


@dataclass
class Outcome:
    """The result of a comparison: case, quantity, and how many times worse it is."""

    changes: list[tuple[str, str, float]] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)  # cases that only the baseline has
    noisy: list[str] = field(default_factory=list)  # cases not compared, because the machine was too busy

    def regressed(self, allow: float) -> list[tuple[str, str, float]]:
        """Returns the changes that count as regressions."""
        return [change for change in self.changes if change[2] > 1 + allow]


def compare(baseline: Results, new: Results) -> Outcome:
    """Compares case by case. Raises ValueError if the suites differ or nothing can be compared."""
    if baseline.suite != new.suite:
        raise ValueError(f"the baseline has results of {baseline.suite}, the other file of {new.suite}")
    after = {named(row.case): row for row in new.rows}
    outcome = Outcome()
    for row in baseline.rows:
        name = named(row.case)
        if name not in after or after[name].base != row.base:
            outcome.gone.append(name)
        elif max(one.noise.get(row.base, 0.0) for one in (row, after[name])) > NOISE:
            outcome.noisy.append(name)
        else:
            outcome.changes += [(name, what, worse) for what, worse in _changes(row, after[name]).items()]
    if not outcome.changes:
        raise ValueError(f"nothing to compare: {len(outcome.gone)} cases are gone, {len(outcome.noisy)} too noisy")
    return outcome


def _changes(before: Row, after: Row) -> dict[str, float]:
    """Returns how many times worse each of our times is."""
    both = [before.base, *(name for name in before.faster if name in after.faster)]
    theirs = [name for name in both if not ours(name)]

    def ratio(row: Row, one: str, other: str) -> float:
        return row.faster.get(one, 1.0) / row.faster.get(other, 1.0)  # the base's own is 1

    found = {
        one: median(ratio(after, one, other) / ratio(before, one, other) for other in theirs)
        for one in both
        if ours(one)
    }
    if "kernel" in before.memory and "kernel" in after.memory:
        found["memory"] = after.memory["kernel"] / before.memory["kernel"]
    return found


def main() -> None:
    """Compares, prints and exits."""
    parser = command.parser("regress", __doc__)
    parser.add_argument("baseline", type=Path, help="earlier results")
    parser.add_argument("new", type=Path, help="results as they are")
    parser.add_argument("--allow", type=float, default=ALLOW, help=f"how much worse is no regression ({ALLOW})")
    options = parser.parse_args()
    try:
        before, after = load(options.baseline), load(options.new)
        outcome = compare(before, after)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    worse = outcome.regressed(options.allow)
    head = {"baseline": f"{options.baseline}, {_of(before)}", "new": f"{options.new}, {_of(after)}"}
    lines = [[case, what, f"{times:.2f}"] for case, what, times in worse]
    note = f"Of {len(outcome.changes)} ratios, {len(worse)} are more than {1 + options.allow:g} times what they were."
    show(Console(), head, [Sheet("Regressions", note, ["case", "what", "times"], lines, words=("case", "what"))])
    for name in outcome.gone:
        print(f"gone: {name}")
    for name in outcome.noisy:
        print(f"too noisy to compare: {name}")
    sys.exit(bool(worse or outcome.gone))


def _of(results: Results) -> str:
    return f"{results.suite}, commit {results.head['commit']}, {results.head['date']}"


if __name__ == "__main__":
    main()
