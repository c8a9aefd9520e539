"""How time and memory grow with tokens, features, images, tokens kept and basis tokens.

python -m benchmarks.growth     (options: benchmarks/lib/suite.py)

One of N, D, B, K and M varies; the others stay at one image of 1024 tokens of 1024 features, 10 % kept, M = 10.
Measured exponents are slopes of a least-squares fit to the logarithms; predicted ones are those of the same fit to a
cost model:

    seconds = call + memory bytes / read bandwidth + cache bytes / cached bandwidth + product / rate of torch.mm
    product = B 2 ((N - K) K + M N) D      floating-point operations of the similarity, s5, and of s1
    bytes   = B (4 N D + K D) s            norms, first basis token, the others, means; s bytes a number
              + B (4 M + 32) N             dot products and ranks
    memory  = outputs + I (4 N (M + 1) + D min(4 K, (4 - s) K + 324)), at most: benchmarks/lib/memory.py

The rates are those that the same run measures. If an image fits half the last-level cache, only its first pass counts
as memory bytes. So for any D, the product dominates if 2 ((N - K) K + M N) / rate > 4 N s / bandwidth: with many tokens
of which many are kept. s1 also reads some tokens again, to find the next basis token; their number depends on the data,
so the model leaves them out.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.lib import baselines, ceilings
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.check import checked
from benchmarks.lib.compare import Comparison, Row, ring
from benchmarks.lib.device import Device
from benchmarks.lib.memory import measured_growth, output_bytes, workspace_bound
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite

SHARE = 0.1
PAGE = 4096  # the resolution of memory in bytes: a call that fits into memory which its process has already shows 0
EAGER = 10**11  # operations of the product up to which `eager` is run
PUBLISHED = 5 * 2**28  # bytes of the broadcast up to which `published` is run
BASELINES = ("eager", "published")
AXES = {"N": "tokens", "D": "features", "B": "images", "keep": "tokens kept", "basis": "basis tokens"}


@dataclass(frozen=True)
class Point:
    """A case, and the name of the size that varies."""

    axis: str
    case: Case

    @property
    def value(self) -> int:
        return getattr(self.case, self.axis)

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds."""
        return {"axis": self.axis, **self.case.fields()}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Point:
        """Returns the point that has these `fields`."""
        return cls(fields["axis"], Case.of(fields))

    def __str__(self) -> str:
        return f"{self.axis} {self.case}"


def points(smoke: bool) -> list[Point]:
    """Returns the points of every axis in float32 and bfloat16, from small to large."""
    tokens_, features = (128, 64) if smoke else (1024, 1024)

    def powers(low: int, high: int) -> list[int]:
        return [2**n for n in range(int(math.log2(low)), int(math.log2(min(high, 4 * low) if smoke else high)) + 1)]

    shares = (0.1, 0.25, 0.5) if smoke else (0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9)
    values = {
        "N": powers(64, 65536),
        "D": powers(64, 8192),
        "B": powers(1, 64),
        "keep": [round(share * tokens_) for share in shares],
        "basis": powers(1, 64),
    }
    found = []
    for dtype, axis in itertools.product((torch.float32, torch.bfloat16), AXES):
        base = Case(1, tokens_, features, round(SHARE * tokens_), dtype, "inplace")
        for value in values[axis]:
            kept = round(SHARE * value) if axis == "N" else base.keep
            found.append(Point(axis, dataclasses.replace(base, **{"keep": kept, axis: value})))
    return found


def baseline_cases(case: Case) -> dict[str, Case]:
    """Returns the baselines that are run (in float32 only, and up to a size), and the case of each."""
    chosen = {}
    if case.dtype is torch.float32 and _product(case) <= EAGER:
        chosen["eager"] = case
    broadcast = baselines.published_bytes(case.N, case.D, case.keep, case.basis, case.itemsize)
    if case.dtype is torch.float32 and case.keep > case.basis and case.B * broadcast <= PUBLISHED:
        chosen["published"] = dataclasses.replace(case, layout="overwrite")
    return chosen


def compare(point: Point, device: Device) -> Comparison:
    """Checks and times the kernel and the baselines."""
    case = point.case
    inputs, calls, shares = ring(functools.partial(tokens, case), device), {}, {}
    for name, its in {**baseline_cases(case), "kernel": case}.items():
        if name == "kernel":
            calls[name] = functools.partial(torch.ops.apet.compress, **its.op_arguments)
        else:
            calls[name] = functools.partial(getattr(baselines, name), **its.arguments)
        shares[name] = checked(its, name, calls[name], inputs[0])
    return Comparison(device, point.fields(), {**ceilings.reference_cost(case), **calls}, inputs, shares)


def memory(point: Point) -> dict[str, int]:
    """Returns the memory peak of each implementation, in a fresh process."""
    cases = {**baseline_cases(point.case), "kernel": point.case}
    return {name: measured_growth(case, name) for name, case in cases.items()}


def predicted_ms(case: Case, rates: dict[str, float]) -> float:
    """Returns the milliseconds of the cost model above."""
    one, small = case.N * case.D * case.itemsize, (4 * case.basis + 32) * case.N
    passed = 3 * one + case.keep * case.D * case.itemsize + small
    again = "cached GB/s" if one <= rates["cache MiB"] * 2**20 / 2 else "read GB/s"
    rate = rates[f"{case.dtype_name} GFLOP/s"]
    moved = case.B * (one / rates["read GB/s"] + passed / rates[again])
    product = _product(case) + 2 * case.B * case.basis * case.N * case.D
    return rates["call us"] / 1e3 + (moved + product / rate) / 1e6


def predicted_bytes(case: Case) -> int:
    """Returns the bytes of memory of the model above."""
    return output_bytes(case) + workspace_bound(case)


def _product(case: Case) -> int:
    return 2 * case.B * (case.N - case.keep) * case.targets * case.D


def exponent(values: list[float], costs: list[float]) -> float:
    """Returns the exponent of the power law that fits best."""
    return statistics.linear_regression([math.log(v) for v in values], [math.log(c) for c in costs]).slope


@dataclass(frozen=True)
class Curve:
    """One implementation along one axis: the values of the axis, and the cost at each."""

    axis: str
    dtype: str
    name: str
    values: list[int]
    costs: list[float]

    def part(self, half: int) -> tuple[list[int], list[float]]:
        """Returns its first (0) or second (1) half; they share the point in the middle."""
        middle = len(self.values) // 2
        which = slice(None, middle + 1) if half == 0 else slice(middle, None)
        return self.values[which], self.costs[which]


def curves(results: Results, cost: str) -> list[Curve]:
    """Returns the curves of "time" in milliseconds or "memory" in bytes: one for each implementation, and
    "predicted"."""

    def model(point: Point) -> float:
        return predicted_ms(point.case, results.rates) if cost == "time" else predicted_bytes(point.case)

    def measured(row: Row) -> dict[str, float]:
        return row.ms if cost == "time" else {name: max(PAGE, size) for name, size in row.memory.items()}

    found: dict[tuple[str, str, str], list[tuple[int, float]]] = {}
    for row in results.rows:
        point, costs = Point.of(row.case), measured(row)
        for name in ("kernel", "predicted", *BASELINES):
            if name in costs or name == "predicted":
                key = point.axis, point.case.dtype_name, name
                found.setdefault(key, []).append((point.value, costs[name] if name in costs else model(point)))
    return [Curve(*key, *map(list, zip(*sorted(pairs), strict=True))) for key, pairs in found.items()]


def sheets(results: Results) -> list[Sheet]:
    """Returns the tables of exponents of time and of memory."""
    notes = {
        "time": "Exponents of the time of the kernel, and of the cost model (predicted). If the similarity takes most "
        "of the time, the exponent of N is 2 and that of K is 1; if reading X does, that of N is 1.",
        "memory": "Exponents of the peak of memory beyond the input. A page is 4 KiB, so that small calls seem flat.",
    }
    return [
        Sheet(
            f"How {cost} grows",
            f"{notes[cost]} `published` and `eager` were run up to a limit of size.",
            ["axis", "dtype", "from", "to", "kernel", "predicted", *BASELINES],
            _exponents(curves(results, cost)),
            words=("axis", "dtype"),
        )
        for cost in ("time", "memory")
    ]


def _exponents(found: list[Curve]) -> list[list[str]]:
    """Returns a line for each half of each axis."""
    by = {(curve.axis, curve.dtype, curve.name): curve for curve in found}
    lines = []
    for axis, dtype in dict.fromkeys((curve.axis, curve.dtype) for curve in found):
        for half in (0, 1):
            values, _ = by[axis, dtype, "kernel"].part(half)
            line = [AXES[axis], dtype, str(values[0]), str(values[-1])]
            for name in ("kernel", "predicted", *BASELINES):
                curve = by.get((axis, dtype, name))
                at = [(v, c) for v, c in zip(curve.values, curve.costs, strict=True) if v in values] if curve else []
                line.append(f"{exponent(*map(list, zip(*at, strict=True))):.2f}" if len(at) > 1 else "-")
            lines.append(line)
    return lines


SUITE = Suite(
    "growth",
    "How cost grows, in time and memory, with tokens, features, images, tokens kept and basis tokens.",
    points,
    compare,
    sheets,
    rounds=5,
    memory=memory,
)

if __name__ == "__main__":
    SUITE.main()
