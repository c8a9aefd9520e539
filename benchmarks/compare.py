"""One measurement, used by the tables and by pytest-benchmark: a case, everything that can do it, in turns.

Each round calls every implementation once, so that whatever slows the machine down for a while slows all of them, and
ratios are medians of the ratios within a round. Every call gets the next of a ring of inputs, at least three and
together at least twice the last-level cache, so none finds its input in the cache because another has just read it. The
order rotates from round to round; the kernel is last.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

import apet_kernels
from benchmarks import baselines, ceilings
from benchmarks.cases import BASIS, RIDGE, SHAPES, Case, tokens
from benchmarks.check import FLOAT32_SIMILARITY, check
from benchmarks.machine import available_memory, last_level_cache

THREADS = 2
ROUNDS = 20
NOISE = 0.3  # interquartile range over median of a time: above, the machine was busy and nothing counts
SECONDS = 60.0  # an implementation that has used this up sits out the remaining rounds, but not before the third
RIVALS = ("published", "eager", "compiled", "tuned", "tuned compiled")


def goals(case: Case) -> dict[str, float]:
    """How many times faster than each rival the kernel should be, and ("floor") how many floors it may take.

    None for the tuned ones: they take 1.2 to 2.1 floors in float32 and 2.7 to 6.2 in bfloat16, so that the goals of
    4 and 6.5 would ask for less than the floor of most shapes.
    """
    if case.dtype is torch.float16 or (case.B, case.N, case.D, case.keep) not in SHAPES:
        return {}
    if case.dtype is torch.bfloat16:
        return {"published": 75, "eager": 6.5, "compiled": 3.2, "floor": 1.4}
    return {"published": 75, "eager": 2.5 if case.N >= 5120 else 4, "compiled": 1.6, "floor": 1.4}


@dataclass
class Row:
    """What was measured of one case."""

    shape: str
    dtype: str
    layout: str
    ms: dict[str, float]  # median per implementation, and of "floor" = "product" + "sweeps"
    rounds: dict[str, int]
    faster: dict[str, float]  # median over rounds of rival / kernel
    floors: float  # median over rounds of kernel / floor
    gflops: float  # of the kernel, by ceilings.flops
    sweep_gbytes: float  # per second, what the "sweeps" of the floor reached
    noise: float  # interquartile range over median: the worst of the kernel and the floor
    judged: dict[str, float]  # share of rows whose values were checked, per implementation
    seconds: dict[str, list[float]]  # every call
    goals: dict[str, float]
    missed: list[str] = field(init=False)

    def __post_init__(self) -> None:
        reached = {**self.faster, "floor": self.floors}
        self.missed = [
            f"{name} {reached[name]:.2f}x, goal {goal:g}x"
            for name, goal in self.goals.items()
            if name in reached and (reached[name] > goal if name == "floor" else reached[name] < goal)
        ]
        if self.goals and self.noise > NOISE:
            self.missed.append(f"noise {self.noise:.0%}, measure again on an idle machine")


class Comparison:
    """Builds, checks and times everything that can do `case`."""

    def __init__(self, case: Case, rounds: int = ROUNDS) -> None:
        self.case, self.rounds = case, rounds
        bytes_each = case.B * case.N * case.D * case.itemsize
        buffers = [tokens(case, seed) for seed in range(max(3, math.ceil(2 * last_level_cache() / bytes_each)))]
        self._inputs = itertools.cycle(buffers)
        results = _implementations(case)
        with torch.inference_mode():
            self.judged = {name: _checked(case, name, call, buffers[0]) for name, call in results.items()}
        floor = {"product": ceilings.product(case), "sweeps": ceilings.sweeps(case)}
        self._calls: dict[str, Callable[[Tensor], object]] = {**floor, **results}
        self._seconds: dict[str, list[float]] = {name: [] for name in self._calls}
        self._others = [name for name in self._calls if name != "kernel"]
        with torch.inference_mode():
            for call in floor.values():
                call(buffers[0])

    def time_others(self) -> None:
        """One round of everything but the kernel."""
        turn = len(self._seconds["kernel"]) % len(self._others)
        for name in self._others[turn:] + self._others[:turn]:
            spent = self._seconds[name]
            if len(spent) < 3 or sum(spent) < SECONDS:
                self._time(name)

    def time_kernel(self) -> None:
        """The kernel's turn in this round."""
        self._time("kernel")

    def run(self) -> Row:
        """All rounds."""
        for _ in range(self.rounds):
            self.time_others()
            self.time_kernel()
        return self.row()

    def row(self) -> Row:
        """What the rounds so far say."""
        seconds = dict(self._seconds)
        seconds["floor"] = [sum(pair) for pair in zip(seconds["product"], seconds["sweeps"], strict=False)]
        kernel = seconds["kernel"]
        ratio = {
            name: statistics.median(theirs / ours for theirs, ours in zip(spent, kernel, strict=False))
            for name, spent in seconds.items()
        }
        median = {name: statistics.median(spent) for name, spent in seconds.items()}
        return Row(
            shape=self.case.shape,
            dtype=self.case.dtype_name,
            layout=self.case.layout,
            ms={name: 1e3 * value for name, value in median.items()},
            rounds={name: len(spent) for name, spent in seconds.items()},
            faster={name: ratio[name] for name in RIVALS if name in ratio},
            floors=1 / ratio["floor"],
            gflops=ceilings.flops(self.case) / median["kernel"] / 1e9,
            sweep_gbytes=ceilings.swept_bytes(self.case) / median["sweeps"] / 1e9,
            noise=max(spread(kernel), spread(seconds["floor"])),
            judged=self.judged,
            seconds=self._seconds,
            goals=goals(self.case),
        )

    def _time(self, name: str) -> None:
        x, call = next(self._inputs), self._calls[name]
        with torch.inference_mode():
            begin = time.perf_counter()
            call(x)
            self._seconds[name].append(time.perf_counter() - begin)


def spread(values: list[float]) -> float:
    """Interquartile range over median; 0 of a single value."""
    if len(values) == 1:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle


def _implementations(case: Case) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Everything that computes the result: the rivals, the kernel, and the kernel on lesser instruction sets."""
    reason = apet_kernels.backends()["cpu"]
    if reason is not None:
        raise RuntimeError(f"there is no CPU kernel to measure: {reason}")
    arguments = {"keep": case.keep, "basis": BASIS, "layout": case.layout, "start": case.start, "ridge": RIDGE}
    rivals = {
        "eager": baselines.eager,
        "compiled": baselines.compiled(),
        "tuned": baselines.tuned,
        "tuned compiled": baselines.tuned_compiled(),
    }
    broadcast = baselines.published_bytes(case.N, case.D, case.keep, BASIS, case.itemsize)
    if case.layout == "overwrite" and broadcast < 0.75 * available_memory():
        rivals = {"published": baselines.published, **rivals}
    calls = {name: functools.partial(rival, **arguments) for name, rival in rivals.items()}
    kernel = functools.partial(torch.ops.apet.compress, **arguments)

    def pinned(x: Tensor, isa: str) -> tuple[Tensor, Tensor]:
        apet_kernels.use_cpu_isa(isa)
        try:
            return kernel(x)
        finally:
            apet_kernels.use_cpu_isa(None)

    *lesser, _ = apet_kernels.cpu_isa()
    return {**calls, **{f"kernel {isa}": functools.partial(pinned, isa=isa) for isa in lesser}, "kernel": kernel}


def _checked(case: Case, name: str, call: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> float:
    """The share of rows judged; also warms the implementation up. What published rounds in 16 bits is excused."""
    rounded = name == "published" and case.dtype is not torch.float32
    try:
        call(x)
        return check(case, x, *call(x), 2 * torch.finfo(case.dtype).eps if rounded else FLOAT32_SIMILARITY)
    except AssertionError as error:
        raise AssertionError(f"{name}, {case}: {error}") from None
