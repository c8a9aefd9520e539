"""The measurement of one case, used by the tables and by pytest-benchmark: times all implementations in turns.

Each round calls every implementation once, so that a temporary slowdown of the machine affects all of them. Ratios are
medians of the ratios within a round. Every call gets the next input of a ring that is at least twice as large as the
last-level cache, so that its input is not in the cache because another call has just read it. The order rotates from
round to round; the base of the comparison, for an op the kernel, is last.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

import apet_kernels
from apet_kernels import testing
from benchmarks.lib.device import Device

THREADS = 2
ROUNDS = 20
NOISE = 0.3  # interquartile range over median of a time: above this the machine was busy and the row does not count
SECONDS = 20.0  # an implementation that has used this up is left out of the remaining rounds, after the third
COST = {"reference cost": ("product", "sweeps")}  # benchmarks/lib/ceilings.py
OURS = ("kernel", "score", "merge", "apet", "triton", "cuda")  # the names of this project's code begin with these
Input, Result = TypeVar("Input"), TypeVar("Result")


class Timed(dict[str, float]):
    """The result of a call that measures itself: seconds by name, used instead of the time of the call."""


@dataclass
class Row:
    """The measurements of one case; every dict except the first is by implementation."""

    case: dict[str, Any]  # its fields
    ms: dict[str, float]  # median
    rounds: dict[str, int]
    faster: dict[str, float]  # median over rounds of its time over that of `base`
    noise: dict[str, float]  # interquartile range over median
    checked: dict[str, float]  # share of rows compared with float64
    seconds: dict[str, list[float]]  # every call
    memory: dict[str, int] = field(default_factory=dict)  # bytes that a call needs at its peak, where that was measured
    base: str = "kernel"
    counts: dict[str, float] = field(default_factory=dict)  # values that are counted, not timed
    failed: dict[str, str] = field(default_factory=dict)  # the error of each that did not run or was wrong

    @property
    def costs(self) -> float:
        """The kernel's time in reference costs."""
        return 1 / self.faster["reference cost"]

    @property
    def worst_noise(self) -> float:
        """The larger noise of the base and of the reference cost, if that was measured."""
        return max(self.noise[name] for name in (self.base, "reference cost") if name in self.noise)

    @property
    def ours_failed(self) -> list[str]:
        """This project's implementations that did not run or were wrong."""
        return [f"{name}: {why}" for name, why in self.failed.items() if ours(name)]


def ours(name: str) -> bool:
    """Returns whether a name is of this project's code, not of a baseline or a bound."""
    return name.split()[0] in OURS


class Comparison:
    """Times calls that take one input each, `base` among them, on a ring of inputs, by the clock of a device.

    `sums` names times that are the sum of several calls within a round. Calls that were not `checked` are made once to
    warm them up.
    """

    def __init__(
        self,
        device: Device,
        case: dict[str, Any],
        calls: Mapping[str, Callable[[Any], object]],
        ring: Sequence[Any],
        checked: dict[str, float],
        *,
        base: str = "kernel",
        sums: Mapping[str, tuple[str, ...]] = COST,
        counts: dict[str, float] | None = None,
        failed: dict[str, str] | None = None,
    ) -> None:
        self._device, self._case, self._calls, self._checked = device, case, calls, checked
        self._base, self._sums, self._counts, self._failed = base, sums, counts or {}, failed or {}
        self._inputs = itertools.cycle(ring)
        self._seconds: dict[str, list[float]] = {}
        self._others = [name for name in calls if name != base]
        self._round = 0
        with torch.inference_mode():
            for name in calls:
                if name not in checked:
                    calls[name](ring[0])

    def time_others(self) -> None:
        """Times one round of everything except the base."""
        for name in rotated(self._others, self._round):
            spent = self._seconds.get(name, ())
            if len(spent) < 3 or sum(spent) < SECONDS:
                self._time(name)

    def time_base(self) -> None:
        """Times the base, which ends this round."""
        if self._base in self._calls:
            self._time(self._base)
        self._round += 1

    def run(self, rounds: int) -> Row:
        """Times all rounds."""
        for _ in range(rounds):
            self.time_others()
            self.time_base()
        return self.row()

    def row(self) -> Row:
        """Returns the row of the rounds so far."""
        seconds = {name: self._seconds[name] for name in sorted(self._seconds, key=self._place)}
        for name, parts in self._sums.items():
            seconds[name] = [sum(times) for times in zip(*(self._seconds[part] for part in parts), strict=False)]
        base = seconds.get(self._base, [])
        return Row(
            case=self._case,
            ms={name: 1e3 * statistics.median(spent) for name, spent in seconds.items()},
            rounds={name: len(spent) for name, spent in seconds.items()},
            faster={
                name: paired(spent[: len(base)], base[: len(spent)])
                for name, spent in seconds.items()
                if base and name != self._base
            },
            noise={name: spread(spent) for name, spent in seconds.items()},
            checked=self._checked,
            seconds={name: spent for name, spent in seconds.items() if name not in self._sums},
            base=self._base,
            counts=self._counts,
            failed=self._failed,
        )

    def _place(self, name: str) -> int:
        """Returns the place of a name in a row: that of its call; names that a call times in addition follow it."""
        return next((n for n, call in enumerate(self._calls) if name == call or name.startswith(f"{call} ")), 0)

    def _time(self, name: str) -> None:
        x, call = next(self._inputs), self._calls[name]
        result: object = None

        def run() -> None:
            nonlocal result
            result = call(x)

        with torch.inference_mode():
            seconds = self._device.seconds(run)
        for part, spent in (result if isinstance(result, Timed) else {name: seconds}).items():
            self._seconds.setdefault(part, []).append(spent)


def rotated(names: Sequence[Input], turn: int) -> list[Input]:
    """Returns the order of one round: it begins one place later in every round, so that no name always follows the same
    one."""
    start = turn % len(names) if names else 0
    return [*names[start:], *names[:start]]


def paired(over: Sequence[float], under: Sequence[float]) -> float:
    """Returns the median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def spread(values: list[float]) -> float:
    """Returns interquartile range over median; 0 for a single value."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle


def ring(make: Callable[[int], Tensor], device: Device) -> list[Tensor]:
    """Returns make(seed) for three seeds, on the device, and copies of these until they are twice its last cache."""
    different = [make(seed).to(device.type) for seed in range(3)]
    copies = math.ceil(2 * device.cache_bytes / different[0].nbytes) - 3
    return different + [different[n % 3].clone() for n in range(copies)]


def on_each_isa(name: str, call: Callable[[Input], Result]) -> dict[str, Callable[[Input], Result]]:
    """Returns `call`, which runs the CPU kernel, as `name`, and before it on every lesser instruction set of this
    machine, as "name generic" and the like. Raises RuntimeError if there is no such kernel."""
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
