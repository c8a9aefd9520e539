"""Writes the tables and pictures of docs/ from the results in benchmarks/results.

    python -m benchmarks.report [--results FOLDER] [--docs FOLDER]

It replaces the text between the markers of the pages, a section for each file of results, and nothing else. A section
without results says "Not measured yet". Pictures are written next to the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks import cpu, gpu, growth, hooks, kept, plots, ragged, serving, stages
from benchmarks.lib import command
from benchmarks.lib.sheet import document, replaced
from benchmarks.lib.suite import Results, Suite, load, noisy, number

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"
SUITES_OF_OPS = tuple(module.SUITE for module in (kept, growth, stages, ragged, cpu, gpu))
NONE = "Not measured yet.\n"


@dataclass(frozen=True)
class Section:
    """The section of a page that is made from one file of results."""

    file: str  # without .json; the marker has the same name
    suite: Suite
    draw: Callable[[Results, Path], None] | None = None
    conclusions: Callable[[Results], list[str]] = lambda results: []
    page: str = "benchmarks.md"

    def picture(self, docs: Path) -> Path:
        """Returns the path of its picture."""
        return docs / f"{Path(self.page).stem}-{self.file}.png"


def kept_conclusions(results: Results) -> list[str]:
    """Returns the conclusions from the curves, and where the kernel loses."""
    rows = [row for row in results.rows if not noisy(row)]
    lines = []
    if len(rows) < len(results.rows):
        lines.append(f"Of {len(rows)} of {len(results.rows)} cases; in the others the machine was too busy.")
    for name in (*kept.SAME, *kept.OTHERS):
        ratios = [row.faster[name] for row in rows if name in row.faster]
        if not ratios:
            continue
        slower = sum(ratio < 1 for ratio in ratios)
        where = f", and less than the kernel in {slower} of {len(ratios)} cases" if slower else ""
        lines.append(
            f"{plots.LABELS[name]}: {number(min(ratios))} to {number(max(ratios))} times the time of the kernel{where}."
        )
    costs = [row.costs for row in rows]
    copies = [1 / row.faster["copy"] for row in rows]
    if not rows:
        return [*lines, "No case counts: measure again on an idle machine."]
    lines.append(
        f"The kernel takes {min(costs):.2f} to {max(costs):.2f} reference costs, and {number(min(copies))} to "
        f"{number(max(copies))} times as long as one copy of the tokens."
    )
    return lines


def growth_conclusions(results: Results) -> list[str]:
    """Returns the size from which on the product takes most time, by the cost model at the measured rates."""
    lines = []
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        rate, bandwidth = results.rates[f"{dtype} GFLOP/s"], results.rates["read GB/s"]
        kept_of_dropped = 2 * growth.SHARE * (1 - growth.SHARE)
        tokens = 4 * itemsize * rate / bandwidth / kept_of_dropped
        lines.append(
            f"{dtype}: with {growth.SHARE:.0%} kept, the similarity takes longer than reading the tokens four times "
            f"from about {tokens:.0f} tokens on, if they are read from memory at {bandwidth:.0f} GB/s."
        )
    return lines


def serving_conclusions(results: Results) -> list[str]:
    """Returns the gains of each budget, also against the same number of rows chosen in other ways."""
    lines = []
    for media in dict.fromkeys(row.case["media"] for row in results.rows):
        rows = [row for row in results.rows if row.case["media"] == media]
        for budget in dict.fromkeys(b for row in rows for b in serving.measured(row, "apet") if b != "all"):
            ours = f"apet {budget}"
            faster, sooner = zip(*(serving.gains(row, ours) for row in rows if ours in row.ms), strict=True)
            line = (
                f"{media}, {budget} kept: {min(faster):.2f} to {max(faster):.2f} times the requests/s of all tokens, "
                f"first tokens {min(sooner):.2f} to {max(sooner):.2f} times sooner"
            )
            for other, what in (("random", "with random rows"), ("evs", "with EVS")):
                theirs = f"{other} {budget}"
                found = [
                    serving.gains(row, ours)[0] / serving.gains(row, theirs)[0] for row in rows if theirs in row.ms
                ]
                if found:
                    line += f"; {min(found):.2f} to {max(found):.2f} times the requests/s {what}"
            lines.append(f"{line}.")
    return lines


SECTIONS = (
    Section("kept", kept.SUITE, plots.draw_kept, kept_conclusions),
    Section("growth", growth.SUITE, plots.draw_growth, growth_conclusions),
    Section("stages", stages.SUITE),
    Section("ragged", ragged.SUITE),
    Section("cpu-overwrite", cpu.SUITE),
    Section("cpu-inplace", cpu.SUITE),
    Section("hooks", hooks.SUITE),
    Section("serving", serving.SUITE, plots.draw_serving, serving_conclusions, page="engines.md"),
    Section("gpu", gpu.SUITE, page="gpu.md"),
)
PAGES = tuple(dict.fromkeys(section.page for section in SECTIONS))


def body(section: Section, results: Path) -> str:
    """Returns the text between the section's markers."""
    file = results / f"{section.file}.json"
    if not file.exists():
        return NONE
    found = load(file)
    if found.suite != section.suite.name:
        raise ValueError(f"{file} has results of {found.suite}, not of {section.suite.name}")
    parts = []
    if section.draw:
        parts.append(f"![{section.suite.about}]({section.picture(DOCS).name})")
    if said := section.conclusions(found):
        parts += ["Conclusions:", "\n".join(f"- {line}" for line in said), "How it was measured:"]
    return "\n\n".join([*parts, document(found.head, section.suite.sheets(found))])


def text(page: Path, results: Path) -> str:
    """Returns the whole page with its sections written anew."""
    written = page.read_text()
    for section in SECTIONS:
        if section.page == page.name:
            begin, end = (f"<!-- {section.file}:{place} -->" for place in ("begin", "end"))
            written = replaced(written, begin, end, body(section, results))
    return written


def main() -> None:
    """Writes pages and pictures."""
    parser = command.parser("report", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where the results are")
    parser.add_argument("--docs", type=Path, default=DOCS, metavar="FOLDER", help="where the pages are")
    options = parser.parse_args()
    for page in (options.docs / name for name in PAGES):
        page.write_text(text(page, options.results))
    for section in SECTIONS:
        file = options.results / f"{section.file}.json"
        if section.draw and file.exists():
            section.draw(load(file), section.picture(options.docs))


if __name__ == "__main__":
    main()
