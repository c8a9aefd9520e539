"""Everything that needs a GPU, in one command and one report: `make gpu-check`.

    python -m benchmarks.gpu_check [--dry-run]

Runs the whole test suite on the GPU, tests/test_gpu.py included, the CUDA kernels under compute-sanitizer's four tools,
then benchmarks/gpu.py, and writes gpu-report-DEVICE.md and .json. Exits with 0 if all of it passed, 1 if not, and 2,
with an error message, where there is no GPU. --dry-run: on a CPU under TRITON_INTERPRET=1, tests/test_gpu.py alone and
one tiny case.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from xml.etree import ElementTree

import apet_kernels
from benchmarks.lib import command
from benchmarks.lib.device import find

ROOT = Path(__file__).parents[1]
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
WORKERS = 8  # of the tests: most of their time is the compiler's, on the CPU


@dataclass
class Suite:
    """What pytest said."""

    command: str
    passed: int
    skipped: int
    failed: list[str]  # names

    @property
    def right(self) -> bool:
        return self.passed > 0 and not self.failed


def run_tests(dry_run: bool, scratch: Path) -> Suite:
    """The suite in a process of its own, printing as it goes."""
    junit = scratch / "tests.xml"
    workers = min(WORKERS, os.cpu_count() or 1)
    arguments = ["tests/test_gpu.py", "-m", "gpu"] if dry_run else ["-n", str(workers), "-m", "not slow"]
    command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={junit}"]
    done = subprocess.run(command, cwd=ROOT, check=False)
    said = " ".join(["python", "-m", "pytest", *arguments])
    if not junit.exists():
        return Suite(said, 0, 0, [f"pytest ended with {done.returncode} and no results"])
    cases = list(ElementTree.parse(junit).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    names = [f"{case.get('classname')}::{case.get('name')}" for case in failed]
    return Suite(said, len(cases) - len(failed) - len(skipped), len(skipped), names)


@dataclass
class Sanitizer:
    """What one tool of compute-sanitizer said."""

    tool: str
    code: int | None  # None: not run
    said: str

    @property
    def right(self) -> bool:
        return self.code in (0, None)


def run_sanitizers() -> list[Sanitizer]:
    """benchmarks/sanitized.py under each tool; not run where the CUDA kernels or the tools are missing."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    why = apet_kernels.why_unavailable("cuda") or ("" if program else "there is no compute-sanitizer")
    if why:
        return [Sanitizer(tool, None, why) for tool in SANITIZERS]
    results = []
    # Every tensor its own allocation, so that memcheck sees the end of each.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in SANITIZERS:
        command = [str(program), "--tool", tool, "--error-exitcode", "99", sys.executable, "-m", "benchmarks.sanitized"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        summary = re.findall(r"^=+ (\w+ SUMMARY: .*)", done.stdout, re.MULTILINE)
        said = summary[-1] if summary else f"no summary: {(done.stdout + done.stderr).strip()[-300:]}"
        code = done.returncode if summary else done.returncode or 1
        results.append(Sanitizer(tool, code, said))
    return results


def run_benchmark(dry_run: bool, scratch: Path) -> tuple[int, str, dict]:
    """Its exit code, tables and figures; in a process of its own, so that a crash leaves what is written so far."""
    tables, figures = scratch / "tables.md", scratch / "figures.json"
    options = ["--dry-run", "--rounds", "1", "--only", "float32"] if dry_run else []
    command = [sys.executable, "-m", "benchmarks.gpu", *options, "--markdown", str(tables), "--json", str(figures)]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not figures.exists():
        return code or 1, f"The benchmark ended with {code} and no figures.\n", {}
    return code, tables.read_text(), json.loads(figures.read_text())


def right(tests: Suite, sanitizers: list[Sanitizer], code: int) -> bool:
    return tests.right and all(s.right for s in sanitizers) and code == 0


def report(tests: Suite, sanitizers: list[Sanitizer], code: int, tables: str, name: str) -> str:
    """The page."""
    verdict = "passed" if right(tests, sanitizers, code) else "FAILED"
    said = {None: "not run", 0: "passed"}
    lines = [
        f"# GPU check on {name}: {verdict}",
        f"`make gpu-check`, which is `{tests.command}`, `python -m benchmarks.sanitized` under compute-sanitizer and "
        "`python -m benchmarks.gpu`.",
        f"## Tests\n\n{tests.passed} passed, {len(tests.failed)} failed, {tests.skipped} skipped.",
        *(["\n".join(f"- FAILED {name}" for name in tests.failed)] if tests.failed else []),
        "## compute-sanitizer",
        "\n".join(f"- {s.tool}: {said.get(s.code, 'FAILED')}: {s.said}" for s in sanitizers),
        "## Benchmarks",
        tables if code == 0 else f"**Ended with {code}: a backend failed or was wrong (below).**\n\n{tables}",
    ]
    return "\n\n".join(lines)


def main() -> None:
    """Checks, writes the report, exits."""
    parser = command.parser("gpu_check", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny cases, Triton's interpreter")
    parser.add_argument("--directory", type=Path, default=ROOT, help="where the report goes (here)")
    options = parser.parse_args()
    try:
        name = find(options.dry_run).name
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    with tempfile.TemporaryDirectory() as scratch:
        tests = run_tests(options.dry_run, Path(scratch))
        sanitizers = run_sanitizers()
        code, tables, figures = run_benchmark(options.dry_run, Path(scratch))
    stem = options.directory / f"gpu-report-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
    page, data = stem.with_suffix(".md"), stem.with_suffix(".json")
    page.write_text(report(tests, sanitizers, code, tables, name))
    found = {"tests": asdict(tests), "sanitizers": [asdict(s) for s in sanitizers], "benchmark": figures}
    data.write_text(json.dumps(found, indent=1) + "\n")
    print(f"The report is {page}")
    sys.exit(0 if right(tests, sanitizers, code) else 1)


if __name__ == "__main__":
    main()
