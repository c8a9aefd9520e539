"""One measurement, used by the tables and by pytest-benchmark: everything that can do a case, in turns.

Each round calls every implementation once, so that a temporary slowdown of the machine affects all of them. Ratios are
medians of the ratios within a round. Every call gets the next of a ring of inputs, together at least twice
the last-level cache, so none finds its input in the cache because another has just read it. The order rotates from
round to round; the kernel is last.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import apet_kernels
from apet_kernels import testing
from benchmarks.lib.machine import last_level_cache

THREADS = 2
ROUNDS = 20
NOISE = 0.3  # interquartile range over median of a time: above, the machine was busy and nothing counts
SECONDS = 20.0  # an implementation that has used this up sits out the remaining rounds, but not before the third
COST = {"reference cost": ("product", "sweeps")}  # benchmarks/lib/ceilings.py
Input, Result = TypeVar("Input"), TypeVar("Result")


@dataclass
class Row:
    """What was measured of one case; every dict but the first by implementation."""

    case: dict[str, Any]  # its fields
    ms: dict[str, float]  # median
    rounds: dict[str, int]
    faster: dict[str, float]  # median over rounds of its time over the kernel's
    noise: dict[str, float]  # interquartile range over median
    judged: dict[str, float]  # share of rows whose values were checked
    seconds: dict[str, list[float]]  # every call
    memory: dict[str, int] = field(default_factory=dict)  # bytes that a call needs at its peak, where that was measured

    @property
    def costs(self) -> float:
        """The kernel's time in reference costs."""
        return 1 / self.faster["reference cost"]

    @property
    def worst_noise(self) -> float:
        """Of the kernel and the reference cost."""
        return max(self.noise["kernel"], self.noise["reference cost"])


class Comparison:
    """Times calls that take one input each, "kernel" among them, on a ring of inputs.

    `sums` names what is the sum of several calls within a round. What was not `judged` is called once to warm it up.
    """

    def __init__(
        self,
        case: dict[str, Any],
        calls: Mapping[str, Callable[[Any], object]],
        ring: Sequence[Any],
        judged: dict[str, float],
        sums: Mapping[str, tuple[str, ...]] = COST,
    ) -> None:
        self._case, self._calls, self._judged, self._sums = case, calls, judged, sums
        self._inputs = itertools.cycle(ring)
        self._seconds: dict[str, list[float]] = {name: [] for name in calls}
        self._others = [name for name in calls if name != "kernel"]
        with torch.inference_mode():
            for name in calls:
                if name not in judged:
                    calls[name](ring[0])

    def time_others(self) -> None:
        """One round of everything but the kernel."""
        for name in rotated(self._others, len(self._seconds["kernel"])):
            spent = self._seconds[name]
            if len(spent) < 3 or sum(spent) < SECONDS:
                self._time(name)

    def time_kernel(self) -> None:
        """The kernel's turn in this round."""
        self._time("kernel")

    def run(self, rounds: int) -> Row:
        """All rounds."""
        for _ in range(rounds):
            self.time_others()
            self.time_kernel()
        return self.row()

    def row(self) -> Row:
        """What the rounds so far say."""
        seconds = dict(self._seconds)
        for name, parts in self._sums.items():
            seconds[name] = [sum(times) for times in zip(*(self._seconds[part] for part in parts), strict=False)]
        kernel = seconds["kernel"]
        return Row(
            case=self._case,
            ms={name: 1e3 * statistics.median(spent) for name, spent in seconds.items()},
            rounds={name: len(spent) for name, spent in seconds.items()},
            faster={
                name: paired(spent[: len(kernel)], kernel[: len(spent)])
                for name, spent in seconds.items()
                if name != "kernel"
            },
            noise={name: spread(spent) for name, spent in seconds.items()},
            judged=self._judged,
            seconds=self._seconds,
        )

    def _time(self, name: str) -> None:
        x, call = next(self._inputs), self._calls[name]
        with torch.inference_mode():
            begin = time.perf_counter()
            call(x)
            self._seconds[name].append(time.perf_counter() - begin)


def rotated(names: Sequence[Input], turn: int) -> list[Input]:
    """The order of one round: it begins one place later in every round, so that no name always follows the same one."""
    start = turn % len(names)
    return [*names[start:], *names[:start]]


def paired(over: Sequence[float], under: Sequence[float]) -> float:
    """The median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: list[float]) -> float:
    """Interquartile range over median; 0 of a single value."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def ring(make: Callable[[int], Tensor]) -> list[Tensor]:
    """make(seed) for three seeds, and copies of these until they are twice the last-level cache."""
    different = [make(seed) for seed in range(3)]
    copies = math.ceil(2 * last_level_cache() / different[0].nbytes) - 3
    return different + [different[n % 3].clone() for n in range(copies)]


def on_each_isa(name: str, call: Callable[[Input], Result]) -> dict[str, Callable[[Input], Result]]:
    """`call`, which runs the CPU kernel, as `name`; and before it on every lesser instruction set of this machine, as
    "name generic" and the like. Raises RuntimeError where there is no such kernel."""
    reason = apet_kernels.why_unavailable("cpu")
    if reason is not None:
        raise RuntimeError(f"there is no CPU kernel to measure: {reason}")

    def pinned(isa: str) -> Callable[[Input], Result]:
        def run(x: Input) -> Result:
            testing.use_cpu_isa(isa)
            try:
                return call(x)
            finally:
                testing.use_cpu_isa(None)

        return run

    *lesser, _ = testing.cpu_isa()
    return {**{f"{name} {isa}": pinned(isa) for isa in lesser}, name: call}
