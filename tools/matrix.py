"""Runs the tests of one session of noxfile.py's matrix, and stores the outcome for docs/compatibility.md.

    python -m tools.matrix PACKAGE TEST... [--docs FOLDER] [-- ARGUMENT...]    in the environment of the session

Arguments after -- are passed to pytest. The outcomes are in compatibility.json of that folder, one for each package and
version, and compatibility.md is made from them. This module imports nothing of the project, since its import may fail
in a session.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import TypedDict
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
WORKERS = os.environ.get("WORKERS", "2")  # as in the Makefile; 0: pytest's own process alone
RECORDED = ("torch", "triton", "transformers", "tokenizers", "huggingface-hub", "numpy")
# The files that the sessions write: their changes are not changes of the tested sources.
WRITTEN = ("docs/compatibility.json", "docs/compatibility.md", "python/apet/hooks/tested.json")
# The parts of the page, in order. The last two have one row each, without a version.
PARTS = {
    "transformers": "transformers: the hooks",
    "triton": "Triton: the kernels, interpreted, and compiled for GPUs",
    "torch": "torch: the ops, built beside it, and the hooks",
    "python": "Python: the ops and the hooks, everything as locked",
    "newest": "The newest version of everything: the ops and the hooks",
    "lowest": "The oldest version of everything but torch: a build, and the command line",
}
HEAD = """\
# Tested versions

`make matrix` generates this page; [development.md](development.md#the-matrix-of-versions) says what it runs. Each row
is one run; a version without a row was not run.
"""


class Outcome(TypedDict):
    package: str
    version: str
    passed: int
    failed: int
    skipped: int
    seconds: int
    date: str
    commit: str
    python: str
    versions: dict[str, str]


def installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def commit(repository: Path) -> str:
    """The commit, ending in -dirty if a tracked file has changed that the sessions do not write."""
    git = ["git", "-C", str(repository)]
    name = subprocess.check_output([*git, "rev-parse", "--short=10", "HEAD"], text=True).strip()
    others = [f":(top,exclude){file}" for file in WRITTEN]
    changed = subprocess.check_output([*git, "status", "--porcelain", "-uno", "--", ":/", *others], text=True)
    return f"{name}-dirty" if changed else name


def order(outcome: Outcome) -> tuple[int, list[int]]:
    numbers = outcome["version"].partition("+")[0].split(".")
    return list(PARTS).index(outcome["package"]), [int(part) for part in numbers if part.isdigit()]


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report; an error while collecting counts as failed."""
    suites = ElementTree.parse(report).getroot().findall("testsuite")
    total, failures, errors, skipped = (
        sum(int(suite.attrib[name]) for suite in suites) for name in ("tests", "failures", "errors", "skipped")
    )
    return total - failures - errors - skipped, failures + errors, skipped


def page(outcomes: list[Outcome]) -> str:
    text = HEAD
    for package, heading in PARTS.items():
        rows = [outcome for outcome in outcomes if outcome["package"] == package]
        if not rows:
            continue
        text += f"\n## {heading}\n\n"
        text += "| version | passed | failed | skipped | Python | torch | Triton | transformers | run |\n"
        text += "|---|---|---|---|---|---|---|---|---|\n"
        for row in rows:
            beside = [row["versions"][name] for name in ("torch", "triton", "transformers")]
            cells = [row["version"], row["passed"], row["failed"], row["skipped"], row["python"], *beside]
            text += f"| {' | '.join(map(str, cells))} | {row['date']}, {row['commit']} |\n"
    return text


def keep(outcome: Outcome, docs: Path) -> None:
    """Stores the outcome, and replaces an earlier one of the same version."""
    file = docs / "compatibility.json"
    outcomes: list[Outcome] = json.loads(file.read_text()) if file.exists() else []
    same = (outcome["package"], outcome["version"])
    outcomes = [other for other in outcomes if (other["package"], other["version"]) != same] + [outcome]
    outcomes.sort(key=order)
    file.write_text(json.dumps(outcomes, indent=1) + "\n")
    (docs / "compatibility.md").write_text(page(outcomes))


def run(package: str, tests: list[str], docs: Path, pytest: list[str]) -> int:
    """Runs the tests, and returns pytest's exit code. The outcome is stored, unless the run did not finish."""
    begun, tested = time.monotonic(), commit(docs)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-n", WORKERS, "--dist", "worksteal", f"--junitxml={report}"]
        code = subprocess.run([*command, "--continue-on-collection-errors", *pytest, *tests], cwd=ROOT).returncode
        if code not in (0, 1):  # neither passed nor failed: the run was interrupted, or did not start
            return code
        passed, failed, skipped = counts(report)
    python = platform.python_version()
    versions = {name: installed(name) for name in RECORDED}
    outcome = Outcome(
        package=package,
        version={**versions, "python": python}.get(package, "-"),
        passed=passed,
        failed=failed,
        skipped=skipped,
        seconds=round(time.monotonic() - begun),
        date=time.strftime("%Y-%m-%d"),
        commit=tested,
        python=python,
        versions=versions,
    )
    keep(outcome, docs)
    return code


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", choices=PARTS)
    parser.add_argument("tests", nargs="+")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    given = parser.parse_args(arguments[:cut])
    sys.exit(run(given.package, given.tests, given.docs, arguments[cut + 1 :]))
