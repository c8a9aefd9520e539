"""Runs every suite of an op under pytest-benchmark, which times the kernel. A round of the other implementations is run
as its set-up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.lib.suite import SMOKE_ROUNDS, Suite


def test_suite(
    benchmark: BenchmarkFixture, suite: Suite, suite_case: Any, smoke: bool, say: Callable[[str], None]
) -> None:
    """Checks that the result is right and no goal is missed, timed in turns. The whole row goes into extra_info."""
    try:
        device = suite.device(smoke)
    except RuntimeError as reason:
        pytest.skip(str(reason))
    comparison = suite.compare(suite_case, device)
    benchmark.group = suite.name
    rounds = SMOKE_ROUNDS if smoke else suite.rounds
    benchmark.pedantic(comparison.time_base, setup=comparison.time_others, rounds=rounds)
    row = comparison.row()
    device.release()
    benchmark.extra_info.update(dataclasses.asdict(row))
    times = ", ".join(f"{name} {ms:.3g}" for name, ms in row.ms.items())
    say(f"{suite.name}, {suite_case}: {times} ms")
    wrong = [*row.ours_failed, *suite.missed(row)]
    assert not wrong, "; ".join(wrong)
