"""Searches the tiles of apet_kernels/triton_kernels/configs.py on this GPU.

    python -m benchmarks.tune [--smoke] [--only TEXT ...]

Cases whose channels round up to the same power of 2, with elements of the same size, share an entry. Each group of
kernels is tuned alone, with the present tiles of the others. The result of a candidate is first checked against float64
(benchmarks/lib/check.py), then its kernels are timed from a graph on every case of the entry, over inputs larger than
the last cache. The candidate with the smallest product of times wins. Candidates that do not compile or fit are
skipped. The winners together are checked on every case, and printed in the form of configs.py. --smoke and --only are
those of benchmarks.gpu.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from torch import Tensor

import apet_kernels
from benchmarks.gpu import kernel_name, launches
from benchmarks.lib import command
from benchmarks.lib import device as devices
from benchmarks.lib.cases import Case, gpu_cases, tokens
from benchmarks.lib.check import judge
from benchmarks.lib.compare import ring
from benchmarks.lib.device import Device
from benchmarks.lib.machine import describe
from benchmarks.lib.sheet import Sheet, show

SAMPLES = 5
Values = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Kernels that share fields of Tiles, and the candidates for channels rounded up to `wide` and an element size."""

    kernels: tuple[str, ...]
    fields: tuple[str, ...]
    candidates: Callable[[int, int], Iterator[Values]]


def _sweeps(wide: int, element: int) -> Iterator[Values]:
    """Yields tokens, channels, warps: 4 to 64 float32 sums a thread, or fewer if a tile has no more."""
    for n, d, warps in itertools.product((4, 8, 16, 32), (128, 256, 512, 1024), (2, 4, 8)):
        if d <= wide and 4 <= n * d / (32 * warps) <= 64:
            yield n, d, warps


def _topk(wide: int, element: int) -> Iterator[Values]:
    """Yields tokens at once, warps."""
    yield from itertools.product((1024, 2048, 4096), (4, 8, 16))


def _assign(wide: int, element: int) -> Iterator[Values]:
    """Yields dropped tokens, targets, channels, warps, stages. A float32 tile is multiplied in registers, so it is
    small."""
    sides = (16, 32, 64) if element == 4 else (32, 64, 128)
    for r, t, d, warps, stages in itertools.product(sides, sides, (32, 64, 128), (4, 8), (2, 3, 4)):
        if d <= wide and r * t <= 512 * 4 * warps:
            yield r, t, d, warps, stages


def _mean(wide: int, element: int) -> Iterator[Values]:
    """Yields targets at once, rows in flight, warps: 16-byte words of a row for every thread, at most 8."""
    for chunk, group, warps in itertools.product((512, 1024, 2048), (1, 2, 4, 8), (1, 2, 4, 8)):
        if 32 * warps * 16 <= wide * element <= 8 * 32 * warps * 16:
            yield chunk, group, warps


GROUPS = (
    Group(("s1_norms", "s1_s3_sweep"), ("sweep_n", "sweep_d", "sweep_warps"), _sweeps),
    Group(("s4_topk",), ("topk_chunk", "topk_warps"), _topk),
    Group(("s5_assign",), ("assign_r", "assign_t", "assign_d", "assign_warps", "assign_stages"), _assign),
    Group(("s5_mean",), ("mean_chunk", "mean_unroll", "mean_warps"), _mean),
)


@dataclass(frozen=True)
class Outcome:
    """The result for one group of one entry; microseconds of all its cases, in turn."""

    group: Group
    tried: int
    passed_over: int
    best: Values
    before: Values
    best_us: list[float]
    before_us: list[float]


def tune(group: Group, cases: list[Case], device: Device, tiles: Any, limit: int | None) -> Outcome:
    """Tries every candidate of the group in `tiles`. `limit`: how many to try."""
    wide, element = _key(cases[0])
    before = tuple(getattr(tiles, name) for name in group.fields)
    inputs = [inputs_of(case, device) for case in cases]
    times: dict[Values, list[float]] = {}
    candidates = list(dict.fromkeys([before, *itertools.islice(group.candidates(wide, element), limit)]))
    for values in candidates:
        changed = dataclasses.replace(tiles, **dict(zip(group.fields, values, strict=True)))
        try:
            with using(changed):
                judge_all(cases[:1], inputs[:1])
                times[values] = [_time(group, case, xs, device) for case, xs in zip(cases, inputs, strict=True)]
        except Exception as error:
            if values == before:
                raise RuntimeError(f"the tiles in use fail: {type(error).__name__}: {error}") from error
    best = min(times, key=lambda values: math.prod(times[values]))
    tried, passed_over = len(candidates), len(candidates) - len(times)
    return Outcome(group, tried, passed_over, best, before, _us(times[best]), _us(times[before]))


def inputs_of(case: Case, device: Device) -> list[Tensor]:
    """Returns a ring of inputs that exceeds the last cache."""
    return ring(functools.partial(tokens, case), device)


def using(tiles: Any) -> Any:
    """Makes every call in this context use these tiles."""
    from apet_kernels.triton_kernels import configs

    return mock.patch.object(configs, "tiles", return_value=tiles)


def judge_all(cases: list[Case], inputs: list[list[Tensor]]) -> None:
    """Raises AssertionError if a result is not the reference's."""
    for case, xs in zip(cases, inputs, strict=True):
        judge(case, "triton", xs[0], apet_kernels.compress(xs[0], **case.op_arguments, backend="triton"))


def _time(group: Group, case: Case, inputs: list[Tensor], device: Device) -> float:
    """Returns the seconds of the group's launches in one call. Their results do not change when they are repeated."""
    calls = [launches(case, x) for x in inputs]
    for call in calls:
        for launch in call:
            launch.run()
    own = [launch for call in calls for launch in call if kernel_name(launch) in group.kernels]

    def run() -> None:
        for launch in own:
            launch.run()

    replay = device.graphed(run)
    return statistics.median(device.seconds(replay) for _ in range(SAMPLES)) / len(inputs)


def _us(seconds: list[float]) -> list[float]:
    return [1e6 * value for value in seconds]


def _key(case: Case) -> tuple[int, int]:
    """Returns the values by which an entry of configs.py is chosen, besides the device class."""
    from apet_kernels.triton_kernels import configs

    return configs.power_of_2(case.D), case.itemsize


def sheet(entry: tuple[str, int, int], cases: list[Case], outcomes: list[Outcome]) -> Sheet:
    """Returns the table of times before and after, a line for every group and case."""
    return Sheet(
        f"{entry[0]}, D up to {entry[1]}, {entry[2]} bytes an element",
        "Microseconds of a call, from a graph. (n): candidates passed over.",
        ["kernels", "shape", "tried", "tiles", "us", "tiles before", "us before"],
        [
            [
                *(", ".join(o.group.kernels), case.shape, f"{o.tried} ({o.passed_over})"),
                *(" ".join(map(str, o.best)), f"{best:.4g}", " ".join(map(str, o.before)), f"{before:.4g}"),
            ]
            for o in outcomes
            for case, best, before in zip(cases, o.best_us, o.before_us, strict=True)
        ],
        words=("kernels", "shape"),
    )


def main() -> None:
    """Tunes and prints. Exits with 2 if there is nothing to tune on."""
    parser = command.parser("tune", __doc__)
    parser.add_argument("--smoke", action="store_true", help="tiny cases, a candidate of each group")
    command.add_only(parser)
    options = parser.parse_args()
    chosen = command.chosen(parser, gpu_cases(options.smoke), options.only)
    device = command.device(parser, devices.gpu, options.smoke)
    from apet_kernels.triton_kernels import configs

    device_class = configs.device_class(torch.device(device.type))
    console, head, entries = (
        Console(width=None if sys.stdout.isatty() else 160),
        {**device.describe(), **describe()},
        [],
    )
    with torch.inference_mode():
        for key, group in itertools.groupby(sorted(chosen, key=_key), key=_key):
            cases = list(group)
            tiles = configs.tiles(device_class, cases[0].D, cases[0].itemsize)
            limit = 1 if options.smoke else None
            outcomes = [tune(kernels, cases, device, tiles, limit) for kernels in GROUPS]
            found = {name: value for o in outcomes for name, value in zip(o.group.fields, o.best, strict=True)}
            tiles = dataclasses.replace(tiles, **found)
            with using(tiles):
                judge_all(cases, [inputs_of(case, device)[:1] for case in cases])
            show(console, head if not entries else {}, [sheet((device_class, *key), cases, outcomes)])
            entries.append(f"({device_class!r}, {key[0]}, {key[1]}): {tiles},")
    print("\n".join(entries))


if __name__ == "__main__":
    main()
