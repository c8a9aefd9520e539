"""The shared parts of the suites: the command line, the file of results, and a head that describes the machine.

    python -m benchmarks.SUITE [--smoke] [--rounds N] [--only TEXT ...] [--minutes M] [--json FILE]

--only keeps the cases whose name, such as "1x576x1024 keep 64 float32 overwrite", holds every TEXT given; after
--minutes no further case begins. Results are written after every case, one to a line, with every call;
`python -m benchmarks.report` makes docs/benchmarks.md from them, `python -m benchmarks.regress` compares two.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.lib import ceilings, command
from benchmarks.lib import device as devices
from benchmarks.lib.compare import NOISE, ROUNDS, THREADS, Comparison, Row
from benchmarks.lib.device import Device
from benchmarks.lib.machine import describe
from benchmarks.lib.sheet import Sheet, show

SMOKE_ROUNDS = 3


@dataclass
class Results:
    """The results in a file. `rates`: those of the device, measured in the same run."""

    suite: str
    head: dict[str, str]
    rates: dict[str, Any]
    rows: list[Row]


@dataclass(frozen=True)
class Suite:
    """A suite: its cases, the measurement of each, and its tables."""

    name: str
    about: str  # one line
    cases: Callable[[bool], list[Any]]  # given --smoke; str() of each is its name
    compare: Callable[[Any, Device], Comparison]
    sheets: Callable[[Results], list[Sheet]]
    rounds: int = ROUNDS
    memory: Callable[[Any], dict[str, int]] = lambda case: {}
    missed: Callable[[Row], list[str]] = lambda row: []  # the goals that were missed, and by how much
    device: Callable[[bool], Device] = devices.cpu  # given --smoke; raises RuntimeError where there is none
    rates: Callable[[Device], dict[str, Any]] = lambda device: ceilings.measure()
    head: Callable[[dict[str, Any]], dict[str, str]] = lambda rates: {"ceilings": said(rates)}
    apart: bool = False  # each case in a process of its own: a capture that fails may disturb what comes after it

    def measure(self, case: Any, device: Device, rounds: int) -> Row:
        """Measures time and, if the suite has it, memory."""
        return dataclasses.replace(self.compare(case, device).run(rounds), memory=self.memory(case))

    def measure_apart(self, case: Any, device: Device, rounds: int, smoke: bool) -> Row:
        """Measures in another process. If that leaves no row, the row has the last line of its errors."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "results.json")
            words = [sys.executable, "-m", f"benchmarks.{self.name}", "--here", *(["--smoke"] if smoke else [])]
            words += ["--rounds", str(rounds), "--json", str(file), "--only", str(case)]
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            found = [row for row in load(file).rows if row.case == case.fields()] if file.exists() else []
        if found:
            return found[0]
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        failed = {"apet process": f"it ended with {done.returncode}: {last}"}
        return Comparison(device, case.fields(), {}, [], {}, base="none", sums={}, failed=failed).row()

    def main(self) -> None:
        """Measures, shows and writes what the command line says."""
        parser = self.parser()
        self.run(parser, parser.parse_args())

    def parser(self) -> argparse.ArgumentParser:
        """Returns the parser of the command line."""
        parser = command.parser(self.name, self.about)
        parser.add_argument("--smoke", action="store_true", help=f"tiny cases and {SMOKE_ROUNDS} rounds")
        parser.add_argument("--rounds", type=int, default=self.rounds, help=f"calls of each ({self.rounds})")
        command.add_only(parser)
        parser.add_argument(
            "--minutes", type=float, default=math.inf, metavar="M", help="begin no further case after this time"
        )
        parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
        if self.apart:
            parser.add_argument("--here", action="store_true", help="all cases in this process")
        return parser

    def run(self, parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
        """Measures, shows and writes. Exits with 1 if code of this project failed, with 2 if there is no device."""
        begin = time.monotonic()
        device = command.device(parser, self.device, options.smoke)
        console = Console(width=None if sys.stdout.isatty() else 220)
        with contextlib.closing(device):
            if device.type == "cpu":
                torch.set_num_threads(THREADS)
            cases = command.chosen(parser, self.cases(options.smoke), options.only)
            rates = self.rates(device)
            results = Results(self.name, {**device.describe(), **describe(), **self.head(rates)}, rates, [])
            for number, case in enumerate(cases, 1):
                late = time.monotonic() - begin > 60 * options.minutes
                if late:
                    results.head["left out"] = f"{len(cases) - number + 1} of {len(cases)} cases, for lack of time"
                else:
                    with console.status(f"{number} of {len(cases)}: {case}"):
                        rounds = SMOKE_ROUNDS if options.smoke else options.rounds
                        if self.apart and not options.here:
                            row = self.measure_apart(case, device, rounds, options.smoke)
                        else:
                            row = self.measure(case, device, rounds)
                        results.rows.append(row)
                    device.release()
                if options.json:  # after every case, so that an interrupted run leaves its results
                    save(results, options.json)
                if late:
                    break
        show(console, results.head, self.sheets(results))
        for line in failures(results):
            console.print(f"failed: {line}", highlight=False, markup=False)
        if any(row.ours_failed for row in results.rows):
            sys.exit(1)


def failures(results: Results) -> list[str]:
    """Returns what did not run or was wrong, each with its error."""
    return [f"{named(row.case)}: {name}: {why}" for row in results.rows for name, why in row.failed.items()]


def said(rates: dict[str, float]) -> str:
    """Returns the measured ceilings, for the head of a table."""
    products = ", ".join(f"{name} {rates[f'{name} GFLOP/s']:.0f} GFLOP/s" for name in ("float32", "bfloat16"))
    return (
        f"torch.mm of 2048^3 {products}, the fastest product {rates['peak GFLOP/s']:.0f} GFLOP/s; "
        f"copying 256 MiB {rates['copy GB/s']:.0f} GB/s, reading them {rates['read GB/s']:.0f} GB/s, "
        f"reading 4 MiB again {rates['cached GB/s']:.0f} GB/s; a call with 16 tokens {rates['call us']:.1f} us"
    )


def save(results: Results, path: Path) -> None:
    """Writes JSON with four digits of every number, a row to a line."""
    rows = ",\n".join(json.dumps(_short(dataclasses.asdict(row))) for row in results.rows)
    head = json.dumps({"suite": results.suite, "head": results.head, "rates": _short(results.rates)}, indent=1)
    path.write_text(f'{head[:-2]},\n "rows": [\n{rows}\n]}}\n')


def load(path: Path) -> Results:
    """Reads a file that `save` wrote."""
    found = json.loads(path.read_text())
    return Results(found["suite"], found["head"], found["rates"], [Row(**row) for row in found["rows"]])


def named(case: dict[str, Any]) -> str:
    """Returns a case's fields in a line."""
    return ", ".join(f"{name} {value}" for name, value in case.items())


def noisy(row: Row) -> list[str]:
    """Returns a remark if the machine was too busy for the row to count."""
    return [f"noise {row.worst_noise:.0%}, measure again on an idle machine"] if row.worst_noise > NOISE else []


def noise(row: Row) -> str:
    """Formats the noise of a row, with the remark of `noisy` if it does not count."""
    return "; ".join(noisy(row)) or f"{row.worst_noise:.0%}"


def ms(row: Row, name: str) -> str:
    """Formats milliseconds; (n) after fewer rounds than the base's; - if it was not measured."""
    if name not in row.ms:
        return "-"
    few = f" ({row.rounds[name]})" if row.rounds[name] < row.rounds[row.base] else ""
    return f"{number(row.ms[name])}{few}"


def number(value: float) -> str:
    """Formats a number with three digits and no exponent."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_short(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
