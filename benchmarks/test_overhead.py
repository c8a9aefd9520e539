"""Measures the overhead of a call: the op on 16 tokens against an op of torch that does nothing."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.lib.device import Cpu

CALLS = 200  # in one measurement, since one call is near the clock's resolution
Op = Callable[[Tensor], object]


def microseconds(op: Op, x: Tensor) -> float:
    """Returns the microseconds per call."""

    def calls() -> None:
        for _ in range(CALLS):
            op(x)

    return Cpu().seconds(calls) / CALLS * 1e6


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda mode: mode.__name__)
def test_overhead(
    benchmark: BenchmarkFixture,
    mode: Callable[[], AbstractContextManager],
    smoke: bool,
    say: Callable[[str], None],
) -> None:
    """Times x [1, 16, 64], keep 8, in turns with aten::empty_like; the difference includes the op's arithmetic."""
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    times: dict[str, list[float]] = {"empty": [], "compress": []}

    def compress(x: Tensor) -> object:
        return torch.ops.apet.compress(x, 8)

    def do_nothing() -> None:
        times["empty"].append(microseconds(torch.ops.aten.empty_like, x))

    with mode():
        benchmark.pedantic(
            lambda: times["compress"].append(microseconds(compress, x)),
            setup=do_nothing,
            rounds=3 if smoke else 50,
        )
    median = {name: statistics.median(values) for name, values in times.items()}
    benchmark.extra_info.update({f"{name}_us": value for name, value in median.items()})
    us = ", ".join(f"{name} {value:.2f} us" for name, value in median.items())
    say(f"[1, 16, 64] keep 8, {mode.__name__}: {us}, difference {median['compress'] - median['empty']:.2f} us")
