"""Writes the results of a run of benchmarks.gpu_quick: the estimate's figures for its GPU model, and tables in docs/.

    python -m benchmarks.gpu_figures FOLDER    into csrc/cuda/figures.cuh, benchmarks/results and docs/
    python -m benchmarks.gpu_figures           docs/ again, from benchmarks/results
    python -m benchmarks.gpu_figures FOLDER --rehearsed ELSEWHERE    results of a rehearsal, into another folder

A rehearsal is rejected without --rehearsed, and so is a run in which a kernel was wrong. Figures that the run did not
measure are not changed. Lines outside of the tables that say what has run on a GPU are printed, to be corrected by
hand.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from benchmarks.lib import command
from benchmarks.lib.sheet import replaced
from benchmarks.quick import figures, report

ROOT = Path(__file__).parents[1]
HEADER = "csrc/cuda/figures.cuh"
RESULTS = "benchmarks/results"
DOCUMENTS = ("README.md", "docs/gpu.md", "docs/cuda.md")
BEGIN, END = "<!-- measured:begin -->", "<!-- measured:end -->"
BY_HAND = re.compile(r"run on a GPU|\*\*no\*\* \|$")  # the latter: rows of the table in docs/status.md


def runs(root: Path) -> list[list[report.Line]]:
    """Returns the runs that are checked in."""
    return [report.load(folder.parent) for folder in sorted((root / RESULTS).glob("gpu-*/results.jsonl"))]


def add(folder: Path, root: Path) -> str:
    """Adds a run to the header and the results. Returns a message about it."""
    lines = report.load(folder)
    name = re.sub(r"[^a-z0-9]+", "-", report.named(lines, "card", "device")["device"]["name"].lower()).strip("-")
    into = root / RESULTS / f"gpu-{name}"
    into.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "results.jsonl", into)
    if (device := report.named(lines, "card", "device")["device"]).get("cuda", "").startswith("ROCm"):
        return f"{HEADER} is unchanged: {device['name']} runs no CUDA kernels"
    header = root / HEADER
    text, kept = figures.updated(header.read_text(), lines)
    header.write_text(text)
    return f"{header}: a row for {name}; not measured, and unchanged: {', '.join(kept) or 'none'}"


def write_documents(root: Path) -> None:
    """Writes the tables between the markers of the documents."""
    body = figures.section(runs(root))
    for name in DOCUMENTS:
        path = root / name
        path.write_text(replaced(path.read_text(), BEGIN, END, body))


def by_hand(root: Path) -> list[str]:
    """Returns the lines of the documents outside of the markers that say what has run on a GPU, with their places."""
    found = []
    for path in [*(root / name for name in ("README.md", "CHANGELOG.md")), *sorted((root / "docs").glob("*.md"))]:
        generated = False
        for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
            generated = (generated or BEGIN in line) and END not in line
            if BY_HAND.search(line) and not generated:
                found.append(f"{path.relative_to(root)}:{number}: {line}")
    return found


def main() -> None:
    """Writes everything, or prints why it cannot and exits with 2."""
    parser = command.parser("gpu_figures", __doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="of a run of benchmarks.gpu_quick")
    parser.add_argument("--rehearsed", type=Path, metavar="ELSEWHERE", help="of a rehearsal: into this folder")
    options = parser.parse_args()
    root = ROOT
    if options.folder:
        lines = report.load(options.folder)
        if report.rehearsed(lines) != bool(options.rehearsed):
            what = "is a rehearsal, whose figures have no meaning" if report.rehearsed(lines) else "is no rehearsal"
            parser.error(f"{options.folder} {what}: {'give' if report.rehearsed(lines) else 'leave out'} --rehearsed")
        if why := figures.wrong(lines):
            parser.error(f"{options.folder} holds a wrong result, so its times are not used: {why}")
        if not report.named(lines, "card", "device"):
            parser.error(f"{options.folder} does not name the GPU on which it ran")
        if options.rehearsed:
            root = options.rehearsed
            for name in (HEADER, *DOCUMENTS):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        print(add(options.folder, root))
        print("\n".join(["Check these lines by hand:", *by_hand(root)]))
    elif options.rehearsed:
        parser.error("--rehearsed needs the folder of a rehearsal")
    write_documents(root)


if __name__ == "__main__":
    main()
