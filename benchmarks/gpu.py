"""The GPU backends against the published formulation, eager torch (plain, tuned and compiled), and lower bounds at the
rates that the same run measures.

python -m benchmarks.gpu     (options: benchmarks/lib/suite.py)

Without a GPU it prints an error and exits with 2. With --smoke and TRITON_INTERPRET=1 it runs everything on a CPU, to
find mistakes before the first run on a GPU.

Every result, also from a graph, is compared with float64 (benchmarks/lib/check.py) before it is timed. Several calls
are timed together, each on the next input of a ring larger than the last cache; the time shown is that of one call. A
slow call gets fewer inputs, which may stay in the cache: reading x once is a small part of its time.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import apet_kernels
from apet_kernels import dispatch
from benchmarks import floors
from benchmarks.lib import baselines
from benchmarks.lib import device as devices
from benchmarks.lib import rates as ceilings
from benchmarks.lib.cases import Case, gpu_cases, tokens
from benchmarks.lib.check import judge
from benchmarks.lib.compare import Comparison, Row, Timed, ring
from benchmarks.lib.device import Device
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite

BASELINES = ("published", "eager", "compiled", "tuned")
BACKENDS = ("triton", "cuda")
BURST = 0.02  # seconds of calls that are timed together, if the ring has as many inputs
Compress = Callable[[Tensor], tuple[Tensor, Tensor]]


def compare(case: Case, device: Device) -> Comparison:
    """Checks and times everything that can run `case`. Failures are recorded, and the rest continues.

    Names: "triton host" is launched one by one; "triton graph" is replayed from a graph; "triton until s1_norms" is the
    call up to that kernel's last launch, from a graph.
    """
    inputs = ring(functools.partial(tokens, case), device)
    failed: dict[str, str] = {}
    shares: dict[str, float] = {}
    calls: dict[str, Callable[[Any], Timed]] = {}
    found = implementations(case, device)
    counts: dict[str, int] = {}  # calls in a sample, of the implementations with a right result
    with torch.inference_mode():
        for name, call in found.items():
            with _Noting(failed, name):
                share = judge(case, name, inputs[0], call(inputs[0]))
                once = device.seconds(functools.partial(call, inputs[0]))
                counts[name] = min(len(inputs), max(1, math.floor(BURST / once)))
                several = functools.partial(_burst, call, itertools.cycle(inputs), counts[name])
                shares[f"{name} host"] = share
                calls[f"{name} host"] = _sample(device, f"{name} host", several, counts[name])
        programs: dict[str, float] = {}
        if "triton" in counts:
            with _Noting(failed, "triton stages"):
                programs = {f"programs {kernel_name(one)}": one.programs for one in launches(case, inputs[0])}
                calls |= _prefixes(case, device, inputs)
        for name, count in counts.items():
            if name == "published":
                continue  # it waits for the host
            with _Noting(failed, f"{name} from a graph"):
                replay = device.graphed(functools.partial(_burst, found[name], inputs, count))
                shares[f"{name} graph"] = judge(case, name, inputs[count - 1], replay())
                calls[f"{name} graph"] = _sample(device, f"{name} graph", replay, count)
    base = next((f"{name} graph" for name in reversed(BACKENDS) if f"{name} graph" in calls), "none")
    return Comparison(device, case.fields(), calls, [None], shares, base=base, sums={}, counts=programs, failed=failed)


class _Noting:
    """Records the error of an implementation that fails, so that the others continue."""

    def __init__(self, failed: dict[str, str], name: str) -> None:
        self.failed, self.name = failed, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.failed[self.name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return True


def implementations(case: Case, device: Device) -> dict[str, Compress]:
    """Returns the backends first, then the baselines: the capture of a baseline may fail and disturb the calls after
    it. (So each case has a process of its own, below.)

    The backends are called as the op calls them: `backend=` of apet_kernels.compress asks first whether they can be
    used.
    """
    runs = {"triton": dispatch.run_triton, "cuda": dispatch.run_cuda}
    usable = [name for name in BACKENDS if name in apet_kernels.available_backends()]
    calls = {name: functools.partial(runs[name], "compress", **case.op_arguments) for name in usable}
    functions: dict[str, Callable] = {"tuned": baselines.tuned, "eager": baselines.eager}
    if floors.published_memory(case) < 0.75 * device.memory_bytes:
        functions["published"] = baselines.published
    functions["compiled"] = baselines.compiled()
    return {**calls, **{name: functools.partial(function, **case.arguments) for name, function in functions.items()}}


def _burst(call: Compress, inputs: Any, count: int) -> Any:
    """Makes `count` calls on as many inputs; returns the result of the last."""
    result = None
    for x in itertools.islice(inputs, count):
        result = call(x)
    return result


def launches(case: Case, x: Tensor) -> list[Any]:
    """Returns the launches of the Triton backend, not yet run."""
    from apet_kernels.triton_kernels import launch

    return launch.compress(x, **case.op_arguments).launches


def kernel_name(launched: Any) -> str:
    return launched.kernel.fn.__name__


def _sample(device: Device, name: str, call: Callable[[], object], count: int) -> Callable[[Any], Timed]:
    """Returns a function that gives the seconds of one of the `count` calls that `call` makes."""
    return lambda _: Timed({name: device.seconds(call) / count})


def _prefixes(case: Case, device: Device, inputs: list[Tensor]) -> dict[str, Callable[[Any], Timed]]:
    """Returns the call up to each kernel's last launch, from a graph.

    A kernel's time is a difference of two of these, so it is measured in its place, with the caches in the state that
    the launches before it leave.
    """
    calls = [launches(case, x) for x in inputs]
    ends = {kernel_name(launched): n for n, launched in enumerate(calls[0], 1)}  # the last of each name stays

    def run(end: int) -> None:
        for call in calls:
            for launched in call[:end]:
                launched.run()

    return {
        f"triton until {name}": _sample(
            device, f"triton until {name}", device.graphed(functools.partial(run, end)), len(inputs)
        )
        for name, end in ends.items()
    }


def sheets(results: Results) -> list[Sheet]:
    """Returns the tables of rates, of times from the host and from a graph, and of kernels."""
    rates, rows = floors.Rates(**results.rates), results.rows
    measured = Sheet(
        "Rates",
        f"{rates.source[0].upper()}{rates.source[1:]}. All bounds below are computed with these, by the formulas of "
        "benchmarks/floors.py.",
        [
            *("copy TB/s", "16-bit product TFLOP/s", "float32 product TFLOP/s", "L2 MB"),
            *("graph us/launch", "host us/launch"),
        ],
        [
            [
                *(f"{value / 1e12:.3g}" for value in (rates.bandwidth, rates.matrix, rates.float32)),
                *(f"{rates.cache / 1e6:.4g}", f"{1e6 * rates.gap:.3g}", f"{1e6 * rates.host:.3g}"),
            ]
        ],
        words=(),
    )
    host = _sheet(
        "Launched one by one",
        "Microseconds, medians. bound: computed, the M + 4 launches of the Triton backend one by one.",
        rows,
        BASELINES,
        lambda case: floors.ungraphed(floors.triton(case), rates),
        "host",
    )
    graph = _sheet(
        "Replayed from a graph",
        "Microseconds, medians. bound: computed, the M + 4 launches of the Triton backend; floor: computed, the time "
        "that no implementation can beat.",
        rows,
        BASELINES[1:],
        lambda case: floors.graphed(floors.triton(case), rates),
        "graph",
    )
    graph = graph._replace(
        columns=[*graph.columns, "floor"],
        lines=[
            [*line, _us(1e6 * floors.graphed(floors.floor(Case.of(row.case)), rates))]
            for line, row in zip(graph.lines, rows, strict=True)
        ],
    )
    stages = Sheet(
        "Kernels of the Triton backend",
        "Microseconds of a call, from a graph: differences of medians of the call up to this kernel. bound: computed.",
        ["shape", "dtype", "kernel", "launches", "programs", "us", "bound", "of bound"],
        [line for row in rows for line in _kernels(row, rates)],
        words=("shape", "dtype", "kernel"),
    )
    return [measured, host, graph, stages]


def _kernels(row: Row, rates: floors.Rates) -> list[list[str]]:
    """Returns a line for each kernel of the Triton backend."""
    case, before, lines = Case.of(row.case), 0.0, []
    for name in (label.removeprefix("triton until ") for label in row.ms if label.startswith("triton until ")):
        own = [work for work in floors.triton(case) if work.stage == name]
        until, bound = 1e3 * row.ms[f"triton until {name}"], 1e6 * sum(work.seconds(rates) for work in own)
        lines.append(
            [
                *(case.shape, case.dtype_name, name, str(len(own)), f"{row.counts[f'programs {name}']:.0f}"),
                *(_us(until - before), _us(bound), _ratio(bound, max(until - before, 0), "%")),
            ]
        )
        before = until
    return lines


def _sheet(
    title: str,
    note: str,
    rows: list[Row],
    others: tuple[str, ...],
    bound: Callable[[Case], float],
    mode: str,
) -> Sheet:
    kernels = [name for name in BACKENDS if any(f"{name} {mode}" in row.ms for row in rows)]
    ours = f"{kernels[0]} {mode}" if kernels else ""
    lines = []
    for row in rows:
        case, us = Case.of(row.case), {name: 1e3 * value for name, value in row.ms.items()}
        least = 1e6 * bound(case)
        lines.append(
            [
                *(case.shape, case.dtype_name),
                *(_us(us.get(f"{name} {mode}")) for name in (*others, *kernels)),
                *(_ratio(us.get(f"{name} {mode}"), us.get(ours), "x") for name in others),
                *(_us(least), _ratio(least, us.get(ours), "%")),
                *(_ratio(share.get(ours), 1.0, "%") for share in (row.noise, row.checked)),
            ]
        )
    return Sheet(
        title,
        f"{note} x: how many times faster {kernels[0] if kernels else 'nothing'} is. noise: interquartile range over "
        "median. checked: share of rows compared with float64 (the others are those that rounding decides). - where it "
        "does not run or fit.",
        [
            *("shape", "dtype", *others, *kernels, *(f"x {name}" for name in others)),
            *("bound", "of bound", "noise", "checked"),
        ],
        lines,
    )


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(a: float | None, b: float | None, form: str) -> str:
    if a is None or not b:
        return "-"
    return f"{a / b:.0%}" if form == "%" else f"{a / b:.1f}"


SUITE = Suite(
    "gpu",
    "The GPU backends against the published formulation, eager torch, plain, tuned and compiled, and lower bounds.",
    gpu_cases,
    compare,
    sheets,
    device=devices.gpu,
    rates=lambda device: dataclasses.asdict(ceilings.measure(device)),
    head=lambda rates: {},
    apart=True,
)

if __name__ == "__main__":
    SUITE.main()
