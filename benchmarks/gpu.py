"""The GPU backends against the published formulation, eager torch, plain, tuned and compiled, and floors at the rates
that the same run measures.

    python -m benchmarks.gpu [--dry-run] [--rounds 20] [--only TEXT ...] [--json FILE] [--markdown FILE]

Without a GPU it prints an error and exits with 2. --dry-run runs everything on a CPU, with tiny cases under
TRITON_INTERPRET=1, to find mistakes before the first run on a GPU. --only keeps the cases whose name (such as
"1x576x1024 keep 96 bfloat16 overwrite") holds every TEXT given.

Every result is judged against float64 (benchmarks/lib/check.py) before it is timed, from a graph too. In a round each
implementation is timed once, over several calls on the next inputs of a ring larger than the last cache; the order
rotates from round to round, and times are medians over the rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import apet_kernels
from benchmarks import floors
from benchmarks.lib import baselines, command
from benchmarks.lib import rates as ceilings
from benchmarks.lib.cases import Case, gpu_cases, tokens
from benchmarks.lib.check import judge
from benchmarks.lib.compare import ROUNDS, rotated, spread
from benchmarks.lib.device import Device, describe, find
from benchmarks.lib.sheet import Sheet, document, show

BASELINES = ("published", "eager", "compiled", "tuned")
BACKENDS = ("triton", "cuda")
BURST = 0.02  # seconds of calls that are timed at once, if the ring has as many inputs
Compress = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass
class Stage:
    """One kernel of a call, all its launches."""

    kernel: str
    launches: int
    programs: int  # of one launch
    us: float
    floor_us: float  # floors.triton at the measured rates


@dataclass
class Row:
    """What was measured of one case, in microseconds a call."""

    shape: str
    dtype: str
    launches: int
    floor_us: float  # of any implementation: floors.floor at the measured rates
    graph_floor_us: float  # of the Triton backend's launches: floors.triton
    host_floor_us: float
    host_us: dict[str, float] = field(default_factory=dict)  # medians, launched one by one
    graph_us: dict[str, float] = field(default_factory=dict)  # medians, replayed from a graph
    noise: dict[str, float] = field(default_factory=dict)  # interquartile range over median, of "graph triton", ...
    judged: dict[str, float] = field(default_factory=dict)  # share of rows whose values were checked
    stages: list[Stage] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # what did not run or was wrong, and its error
    seconds: dict[str, list[float]] = field(default_factory=dict)  # every sample, a call


def measure(case: Case, device: Device, rates: floors.Rates, rounds: int) -> Row:
    """Checks and times everything that can do `case`; failures are recorded in the row, and the rest continues."""
    design = floors.triton(case)
    row = Row(
        case.shape,
        case.dtype_name,
        sum(work.launches for work in design),
        floor_us=1e6 * floors.graphed(floors.floor(case), rates),
        graph_floor_us=1e6 * floors.graphed(design, rates),
        host_floor_us=1e6 * floors.ungraphed(design, rates),
    )
    ring = inputs_of(case, device)
    contest: dict[str, Callable[[], float]] = {}  # "host triton" and the like -> seconds of a call
    calls = _implementations(case, device)
    with torch.inference_mode():
        counts: dict[str, int] = {}  # calls in a sample, of what is right
        for name, call in calls.items():
            with _Noting(row, name):
                row.judged[name] = judge(case, name, ring[0], call(ring[0]))
                once = device.seconds(functools.partial(call, ring[0]))
                counts[name] = min(len(ring), max(1, math.floor(BURST / once)))
                contest[f"host {name}"] = _sample(
                    device, functools.partial(_burst, call, itertools.cycle(ring), counts[name]), counts[name]
                )
        if "triton" in counts:
            with _Noting(row, "stages"):
                contest |= _prefixes(case, device, ring)
        for name, count in counts.items():
            if name == "published":
                continue  # it waits for the host
            with _Noting(row, f"{name} from a graph"):
                replay = device.graphed(functools.partial(_burst, calls[name], ring, count))
                judge(case, name, ring[count - 1], replay())
                contest[f"graph {name}"] = _sample(device, replay, count)
        order = list(contest)
        row.seconds = {name: [] for name in order}
        for number in range(rounds):
            for name in rotated(order, number):
                row.seconds[name].append(contest[name]())
    _summarise(row, case, design, rates)
    return row


class _Noting:
    """Records the error of an implementation that fails; the others continue."""

    def __init__(self, row: Row, name: str) -> None:
        self.row, self.name = row, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):
            return False
        self.row.failed[self.name] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        return True


def inputs_of(case: Case, device: Device) -> list[Tensor]:
    """A ring of inputs, together at least twice the last cache: two different ones, and copies of them."""
    different = [tokens(case, seed).to(device.type) for seed in range(2)]
    copies = math.ceil(2 * device.cache_bytes / different[0].nbytes) - 2
    return different + [different[n % 2].clone() for n in range(copies)]


def _implementations(case: Case, device: Device) -> dict[str, Compress]:
    """The backends first, then the baselines: the capture of a baseline may fail and disturb the calls after it."""
    usable = [name for name in BACKENDS if name in apet_kernels.available_backends()]
    calls = {name: functools.partial(apet_kernels.compress, **case.arguments, backend=name) for name in usable}
    functions: dict[str, Callable] = {"tuned": baselines.tuned, "eager": baselines.eager}
    if floors.published_memory(case) < 0.75 * device.memory_bytes:
        functions["published"] = baselines.published
    functions["compiled"] = baselines.compiled()
    return {**calls, **{name: functools.partial(function, **case.arguments) for name, function in functions.items()}}


def _burst(call: Compress, inputs: Any, count: int) -> Any:
    """`count` calls on as many inputs; the result of the last."""
    result = None
    for x in itertools.islice(inputs, count):
        result = call(x)
    return result


def launches(case: Case, x: Tensor) -> list[Any]:
    """Of the Triton backend, not yet run."""
    from apet_kernels.triton_kernels import launch

    return launch.compress(x, **case.arguments).launches


def kernel_name(launched: Any) -> str:
    return launched.kernel.fn.__name__


def _sample(device: Device, call: Callable[[], object], count: int) -> Callable[[], float]:
    """Seconds of one of the `count` calls that `call` makes."""
    return lambda: device.seconds(call) / count


def _prefixes(case: Case, device: Device, ring: list[Tensor]) -> dict[str, Callable[[], float]]:
    """ "until s1_norms", "until s1_s3_sweep", ...: the call up to that kernel's last launch, from a graph.

    A kernel's time is a difference of two of these, so it is measured where it runs: with the caches as the launches
    before leave them.
    """
    calls = [launches(case, x) for x in ring]
    ends = {kernel_name(launched): n for n, launched in enumerate(calls[0], 1)}  # the last of each name stays

    def run(end: int) -> None:
        for call in calls:
            for launched in call[:end]:
                launched.run()

    return {
        f"until {name}": _sample(device, device.graphed(functools.partial(run, end)), len(ring))
        for name, end in ends.items()
    }


def _summarise(row: Row, case: Case, design: list[floors.Work], rates: floors.Rates) -> None:
    """Medians and noise from the samples."""
    before = 0.0
    programs = {
        kernel_name(n): n.programs for n in launches(case, torch.empty(case.B, case.N, case.D, dtype=case.dtype))
    }
    for label, samples in row.seconds.items():
        mode, _, name = label.partition(" ")
        us = 1e6 * statistics.median(samples)
        row.noise[label] = spread(samples)
        if mode == "host":
            row.host_us[name] = us
        elif mode == "graph":
            row.graph_us[name] = us
        else:
            own = [work for work in design if work.stage == name]
            floor_us = 1e6 * sum(work.seconds(rates) for work in own)
            row.stages.append(Stage(name, len(own), programs[name], us - before, floor_us))
            before = us


def sheets(rates: floors.Rates, rows: list[Row]) -> list[Sheet]:
    """Rates, times from the host and from a graph, and kernels."""
    kernels = [name for name in BACKENDS if any(name in row.host_us for row in rows)]
    measured = Sheet(
        "Rates",
        f"{rates.source[0].upper()}{rates.source[1:]}. What all floors below are computed with, by the formulas of "
        "benchmarks/floors.py.",
        [
            "copy TB/s",
            "16-bit product TFLOP/s",
            "float32 product TFLOP/s",
            "L2 MB",
            "graph us/launch",
            "host us/launch",
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
        "Microseconds, medians. floor: computed, the M + 4 launches of the Triton backend one by one.",
        rows,
        kernels,
        BASELINES,
        lambda row: row.host_us,
        lambda row: row.host_floor_us,
        "host",
    )
    graph = _sheet(
        "Replayed from a graph",
        "Microseconds, medians. floor: computed, the M + 4 launches of the Triton backend; ideal: computed, one launch "
        "that reads the tokens once.",
        rows,
        kernels,
        BASELINES[1:],
        lambda row: row.graph_us,
        lambda row: row.graph_floor_us,
        "graph",
    )
    graph = graph._replace(
        columns=[*graph.columns, "ideal"],
        lines=[[*line, _us(row.floor_us)] for line, row in zip(graph.lines, rows, strict=True)],
    )
    stages = Sheet(
        "Kernels of the Triton backend",
        "Microseconds of a call, from a graph: differences of medians of the call up to this kernel. floor: computed.",
        ["shape", "dtype", "kernel", "launches", "programs", "us", "floor", "of floor"],
        [
            [
                *(row.shape, row.dtype, stage.kernel, str(stage.launches), str(stage.programs)),
                *(_us(stage.us), _us(stage.floor_us), _ratio(stage.floor_us, max(stage.us, 0), "%")),
            ]
            for row in rows
            for stage in row.stages
        ],
        words=("shape", "dtype", "kernel"),
    )
    return [measured, host, graph, stages]


def _sheet(
    title: str,
    note: str,
    rows: list[Row],
    kernels: list[str],
    others: tuple[str, ...],
    times: Callable[[Row], dict[str, float]],
    floor: Callable[[Row], float],
    mode: str,
) -> Sheet:
    return Sheet(
        title,
        f"{note} x: how many times faster {kernels[0] if kernels else 'nothing'} is. noise: interquartile range over "
        "median. judged: rows whose values were checked (less than 100 % where rounding decides). - where it does not "
        "run or fit.",
        [
            *("shape", "dtype", *others, *kernels),
            *(f"x {name}" for name in others),
            *("floor", "of floor", "noise", "judged"),
        ],
        [
            [
                *(row.shape, row.dtype),
                *(_us(times(row).get(name)) for name in (*others, *kernels)),
                *(_ratio(times(row).get(name), times(row).get(kernels[0]), "x") for name in others),
                _us(floor(row)),
                _ratio(floor(row), times(row).get(kernels[0]), "%"),
                _ratio(row.noise.get(f"{mode} {kernels[0]}"), 1.0, "%"),
                _ratio(row.judged.get(kernels[0]), 1.0, "%"),
            ]
            for row in rows
            if kernels
        ],
    )


def _us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(a: float | None, b: float | None, form: str) -> str:
    if a is None or not b:
        return "-"
    return f"{a / b:.0%}" if form == "%" else f"{a / b:.1f}"


def failures(rows: list[Row]) -> list[str]:
    """What did not run or was wrong, each with its error."""
    return [f"{name}, {row.shape} {row.dtype}: {why}" for row in rows for name, why in row.failed.items()]


def backends_failed(row: Row) -> bool:
    """Whether a backend did not run or was wrong. A baseline may fail, in its capture for example."""
    return any(name.split()[0] in (*BACKENDS, "stages") for name in row.failed)


def main() -> None:
    """Measures, prints, writes. Exits with 1 if a backend failed, 2 if there is nothing to measure on."""
    parser = command.parser("gpu", __doc__)
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny cases, Triton's interpreter")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"samples of each implementation ({ROUNDS})")
    command.add_only(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    options = parser.parse_args()
    chosen = command.chosen(parser, gpu_cases(options.dry_run), options.only)
    try:
        device = find(options.dry_run)
    except RuntimeError as error:
        sys.exit(_say(str(error)))
    head, rates = describe(device), ceilings.measure(device)
    console, rows = Console(width=None if sys.stdout.isatty() else 220), []
    for number, case in enumerate(chosen, 1):
        with console.status(f"{number} of {len(chosen)}: {case}"):
            rows.append(measure(case, device, rates, options.rounds))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        report = {"head": head, "rates": dataclasses.asdict(rates), "rows": [dataclasses.asdict(row) for row in rows]}
        if options.json:  # after every case, so that a run cut short leaves what it has
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        if options.markdown:
            options.markdown.write_text(_markdown(head, rates, rows))
    show(console, head, sheets(rates, rows))
    for line in failures(rows):
        console.print(f"failed: {line}", highlight=False, markup=False)
    sys.exit(any(map(backends_failed, rows)))


def _markdown(head: dict[str, str], rates: floors.Rates, rows: list[Row]) -> str:
    text = document(head, sheets(rates, rows))
    failed = failures(rows)
    return text + ("\n### Failed\n\n" + "".join(f"- {line}\n" for line in failed) if failed else "")


def _say(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
