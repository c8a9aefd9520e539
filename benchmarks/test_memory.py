"""Tests that a call's extra memory stays within O(N (M + 1) + K D)."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.lib.cases import Case
from benchmarks.lib.memory import measured_growth, output_bytes, planned_workspace, workspace_bound

FACTOR = 1.5  # of the bound: padding of rows to whole vectors and panels
FIXED = 2**20  # stacks, tiles, allocator: does not grow with the problem


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
def test_memory(benchmark: BenchmarkFixture, case: Case, say: Callable[[str], None]) -> None:
    bound, outputs, workspace = workspace_bound(case), output_bytes(case), planned_workspace(case)
    grown = benchmark.pedantic(measured_growth, args=(case,), rounds=1)
    benchmark.extra_info.update(bound=bound, outputs=outputs, workspace=workspace, grown=grown)
    kib = " ".join(
        f"{name} {value / 1024:.0f}"
        for name, value in {"workspace": workspace, "bound": bound, "outputs": outputs, "grown by": grown}.items()
    )
    say(f"{case}, KiB: {kib}")
    assert workspace <= FACTOR * bound + FIXED, f"a workspace of {workspace} bytes exceeds {FACTOR} x {bound} + {FIXED}"
    limit = FACTOR * (bound + outputs) + FIXED
    assert grown <= limit, f"the process grew by {grown} bytes, more than {limit:.0f}"
