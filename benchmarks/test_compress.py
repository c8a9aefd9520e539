"""compress against everything else: pytest-benchmark times the kernel, with one round of the others as its set-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case
from benchmarks.compare import ROUNDS, Comparison


def test_compress(benchmark: BenchmarkFixture, case: Case, smoke: bool, say: Callable[[str], None]) -> None:
    """Checked, timed in turns, and no goal missed. The whole row goes into extra_info."""
    comparison = Comparison(case)
    benchmark.group = f"{case.dtype_name} {case.layout}"
    benchmark.pedantic(comparison.time_kernel, setup=comparison.time_others, rounds=3 if smoke else ROUNDS)
    row = comparison.row()
    benchmark.extra_info.update(dataclasses.asdict(row))
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in row.ms.items())
    say(f"{case}: {times} ms; kernel / floor {row.floors:.2f}")
    assert not row.missed, "; ".join(row.missed)
