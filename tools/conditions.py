"""Runs the tests under conditions that must not change their results: another processor, BLAS, test order, or folder.

    python -m tools.conditions                    every condition, one after another
    python -m tools.conditions order one-thread   these conditions
    python -m tools.conditions avx2 -- -n 2 tests/test_op.py    arguments after -- are passed to pytest
    python -m tools.conditions --list

Each condition is an environment and arguments of pytest; --list prints the commands, to be run by hand. The exit code
is 1 if the tests fail under any condition. Without arguments for pytest it runs the tests of `make test`.
docs/development.md has the outcomes.

An instruction set that is "absent" is hidden from torch (ATEN_CPU_CAPABILITY), oneDNN, MKL and, by tests/conftest.py,
from this project's kernels in the process of the tests; no setting can hide it from the processes that tests start.
"""

from __future__ import annotations

import getpass
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
EVERYTHING = ["tests", "--ignore", "tests/vllm"]
AWKWARD = "a folder, with spaces & ünïcode"


@dataclass(frozen=True)
class Condition:
    """Environment variables and arguments of pytest. `elsewhere`: temporary files and HOME are in a folder with an odd
    name."""

    about: str
    environment: dict[str, str] = field(default_factory=dict)
    arguments: tuple[str, ...] = ()
    elsewhere: bool = False


CONDITIONS = {
    "blas": Condition("sums as MKL's oldest code path orders them", {"MKL_CBWR": "COMPATIBLE", "OMP_NUM_THREADS": "1"}),
    "one-thread": Condition("no second thread", {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}),
    "threads": Condition("more threads than cores", {"OMP_NUM_THREADS": "7"}),
    "order": Condition("another order", {}, ("--shuffle", "1")),
    "hashes": Condition("another order of sets, and again of tests", {"PYTHONHASHSEED": "7"}, ("--shuffle", "7")),
    "no-amx": Condition(
        "a processor without AMX", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "APET_TESTS_WITHOUT": "amx"}
    ),
    "no-avx512": Condition(
        "a processor without AVX-512",
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "APET_TESTS_WITHOUT": "avx512"}
        | {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    ),
    "no-avx2": Condition(
        "a processor without AVX2",
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "APET_TESTS_WITHOUT": "avx2"}
        | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    ),
    "terminal": Condition("a narrow terminal without colours", {"COLUMNS": "40", "TERM": "dumb", "NO_COLOR": "1"}),
    "colours": Condition("a terminal that is said to have colours", {"FORCE_COLOR": "1", "COLUMNS": "200"}),
    "locale": Condition("the locale C, and another time zone", {"LC_ALL": "C", "TZ": "Pacific/Chatham"}),
    "bytecode": Condition(
        "bytecode beside the sources, and buffered output: what Python does where nothing is set",
        {"PYTHONDONTWRITEBYTECODE": "", "PYTHONUNBUFFERED": ""},
    ),
    "no-bytecode": Condition("no bytecode", {"PYTHONDONTWRITEBYTECODE": "1"}),
    "place": Condition("temporary files and HOME in a folder of odd name", elsewhere=True),
}


def environment(condition: Condition, folder: str) -> dict[str, str]:
    """Returns the environment of a run under the condition, with an empty folder for files that it writes elsewhere."""
    if not condition.elsewhere:
        return condition.environment
    place = Path(folder, AWKWARD)
    place.mkdir()
    return {"TMPDIR": str(place), "HOME": str(place), "USER": getpass.getuser()} | condition.environment


def run(name: str, arguments: list[str]) -> int:
    """Runs the tests under the condition; returns their exit code."""
    condition = CONDITIONS[name]
    with tempfile.TemporaryDirectory() as folder:
        settings = environment(condition, folder)
        command = [sys.executable, "-m", "pytest", "-q", *condition.arguments, *(arguments or EVERYTHING)]
        words = [*(f"{key}={value}" for key, value in settings.items()), *command]
        print(f"== {name}: {condition.about}\n{shlex.join(words)}", flush=True)
        return subprocess.call(command, cwd=ROOT, env={**os.environ, **settings})


def main(words: list[str]) -> int:
    at = words.index("--") if "--" in words else len(words)
    names, rest = words[:at], words[at + 1 :]
    if names == ["--list"]:
        for name, condition in CONDITIONS.items():
            settings = [f"{key}={value}" for key, value in condition.environment.items()]
            print(f"{name}: {condition.about}\n  {shlex.join([*settings, 'pytest', *condition.arguments])}")
        return 0
    if unknown := [name for name in names if name not in CONDITIONS]:
        print(f"no condition {', '.join(unknown)}; there are {', '.join(CONDITIONS)}", file=sys.stderr)
        return 2
    failed = [name for name in names or CONDITIONS if run(name, rest)]
    print(f"failed under: {', '.join(failed)}" if failed else "passed under each condition")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
