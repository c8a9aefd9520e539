"""The GPU backends under pytest-benchmark: each case of benchmarks/gpu.py, every implementation in turns."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import gpu
from benchmarks.floors import Rates
from benchmarks.lib import rates as ceilings
from benchmarks.lib.cases import Case
from benchmarks.lib.compare import ROUNDS
from benchmarks.lib.device import Device, find
from benchmarks.lib.suite import SMOKE_ROUNDS


@pytest.fixture(scope="module")
def device() -> Device:
    try:
        return find(dry_run=False)
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def rates(device: Device) -> Rates:
    return ceilings.measure(device)


def test_gpu(
    benchmark: BenchmarkFixture, gpu_case: Case, device: Device, rates: Rates, smoke: bool, say: Callable[[str], None]
) -> None:
    """All that can do the case is right, and timed; what pytest-benchmark times is the measurement, and the row that it
    gives goes into extra_info."""
    row = benchmark.pedantic(gpu.measure, args=(gpu_case, device, rates, SMOKE_ROUNDS if smoke else ROUNDS), rounds=1)
    benchmark.extra_info.update(dataclasses.asdict(row))
    us = ", ".join(f"{name} {value:.3g}" for name, value in (row.graph_us or row.host_us).items())
    say(f"{gpu_case}: {us} us")
    assert not gpu.backends_failed(row), "; ".join(gpu.failures([row]))
