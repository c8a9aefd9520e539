"""How the CPU kernel scales: stages, barriers and chunks counted, and teams of many threads simulated.

python -m benchmarks.threads [--threads N ...] [--rounds N] [--only TEXT ...]

benchmarks/chunks.cpp runs a call's chunks one after the other on one thread and times each, and the serial steps
between the stages. From these times a call on p threads is simulated, as csrc/cpu/plan.h divides it and
csrc/cpu/team.h runs it:

    call      the teams of the plan process one image after the other
    stage     a serial step, then a barrier, then chunks: first those of a thread's own slot, then those of the others
    barrier   an empty stage of csrc/cpu/team.h on so many threads, or on as many as this machine has cores

The simulation leaves out that threads share caches and memory bandwidth, and that a core slows down when others are
busy. If the machine has enough cores, the same call is also measured. It needs cmake and the sources.
"""

from __future__ import annotations

import argparse
import heapq
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import apet_kernels
from benchmarks.lib import command
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.device import Cpu
from benchmarks.lib.machine import describe
from benchmarks.lib.sheet import Sheet, document, show

ROOT = Path(__file__).parents[1]
SHAPES = ((16, 576, 1024, 64), (1, 576, 1024, 64), (8, 256, 4096, 22), (1, 1280, 3584, 384), (1, 5120, 3584, 512))
THREADS = (1, 2, 4, 8, 16, 32, 64)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # in the order of apet_dtype


@dataclass(frozen=True)
class Stage:
    """One stage of one image, in nanoseconds: the serial step before it, and its chunks."""

    name: str
    serial: int
    chunks: list[int]


@dataclass(frozen=True)
class Simulated:
    """The simulation of a call on some threads, in nanoseconds."""

    total: float
    path: float  # with a thread for every chunk: serial steps, barriers, and the longest chunk of each stage
    barriers: int  # the most of any image
    serial: dict[str, float]  # by stage, for the team with the longest time


def simulate(images: list[list[Stage]], teams: int, threads: int, barrier: float) -> Simulated:
    """Simulates teams of so many threads that take the images in order."""
    ready = [0.0] * teams
    serial: list[dict[str, float]] = [{} for _ in ready]
    path = [0.0] * teams
    for stages in images:
        team = ready.index(min(ready))
        for stage in stages:
            wait = barrier if threads > 1 else 0.0
            ready[team] += stage.serial + wait + greedy(stage.chunks, threads)
            path[team] += stage.serial + wait + max(stage.chunks, default=0)
            serial[team][stage.name] = serial[team].get(stage.name, 0.0) + stage.serial
    most = max(serial, key=lambda of: sum(of.values()))
    return Simulated(max(ready), max(path), max(map(len, images)), most)


def greedy(chunks: list[int], threads: int) -> float:
    """Returns when the last chunk ends, with chunks assigned as in Team::work: first those of a thread's own slot."""
    slots = [chunks[len(chunks) * t // threads : len(chunks) * (t + 1) // threads][::-1] for t in range(threads)]
    free = [(0.0, t) for t in range(threads)]
    end = 0.0
    while free:
        now, thread = heapq.heappop(free)
        slot = next((slots[(thread + i) % threads] for i in range(threads) if slots[(thread + i) % threads]), None)
        if slot:
            end = max(end, now + slot[-1])
            heapq.heappush(free, (now + slot.pop(), thread))
    return end


def build(folder: Path) -> Path:
    """Builds apet_chunks from the sources; returns its path."""
    cmake = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
    if not cmake or not (ROOT / "CMakeLists.txt").exists():
        sys.exit("benchmarks.threads needs cmake and the sources of the kernels.")
    for words in (["-S", ROOT, "-B", folder], ["--build", folder, "--target", "apet_chunks"]):
        subprocess.run([cmake, *words], check=True, stdout=subprocess.DEVNULL)
    return folder / "apet_chunks"


def chunk_times(program: Path, file: Path, case: Case, threads: int, rounds: int) -> list[list[Stage]]:
    """Returns the stages of every image, divided for a team of `threads`."""
    numbers = (DTYPES.index(case.dtype), case.B, case.N, case.D, case.keep, threads, rounds)
    images: list[list[Stage]] = [[] for _ in range(case.B)]
    for line in subprocess.check_output([program, file, *map(str, numbers)], text=True).splitlines():
        image, name, serial, *chunks = line.split("\t")
        if name != "done":
            images[int(image)].append(Stage(name, int(serial), [int(ns) for ns in chunks]))
    return images


def barrier_ns(program: Path, threads: int, rounds: int) -> float:
    """Returns the nanoseconds of a barrier on so many threads, or on as many as there are cores."""
    cores = min(threads, len(os.sched_getaffinity(0)))
    return float(subprocess.check_output([program, "barrier", str(cores), str(rounds)], text=True)) if cores > 1 else 0


def measured_ms(case: Case, x: Tensor, threads: int, rounds: int) -> float | None:
    """Returns the least time of all rounds; None if the machine has fewer cores."""
    if threads > len(os.sched_getaffinity(0)):
        return None
    torch.set_num_threads(threads)
    clock = Cpu()
    took = [clock.seconds(lambda: torch.ops.apet.compress(x, **case.op_arguments)) for _ in range(rounds + 1)]
    return 1e3 * min(took[1:])


def lines(case: Case, program: Path, threads: list[int], rounds: int) -> list[list[str]]:
    """Returns the table's lines of a case, one for each number of threads."""
    x = tokens(case, 0)
    found: list[list[str]] = []
    alone = 0.0
    with tempfile.NamedTemporaryFile(suffix=".tokens") as file, torch.inference_mode():
        file.write(x.contiguous().view(torch.uint8).numpy().tobytes())
        file.flush()
        for p in threads:
            torch.set_num_threads(p)
            plan = apet_kernels.plan(x, case.keep).details
            teams, each = int(plan["images_in_flight"]), int(plan["threads_per_image"])
            images = chunk_times(program, Path(file.name), case, each, rounds)
            barrier = barrier_ns(program, each, rounds)
            result = simulate(images, teams, each, barrier)
            alone = alone or result.total * p
            name, most = max(result.serial.items(), key=lambda item: item[1])
            took = measured_ms(case, x, p, rounds)
            found.append(
                [
                    *(case.shape, case.dtype_name, str(p), f"{teams} x {each}"),
                    *(str(result.barriers), f"{barrier / 1e3:.2g}"),
                    *(f"{result.path / 1e6:.3g}", f"{result.total / 1e6:.3g}", f"{alone / result.total:.1f}"),
                    f"{sum(result.serial.values()) / result.total:.1%}",
                    f"{name} {most / result.total:.1%}",
                    *(("-", "-") if took is None else (f"{took:.3g}", f"{1e6 * took / result.total:.2f}")),
                ]
            )
    return found


def sheet(rows: list[list[str]]) -> Sheet:
    return Sheet(
        "Threads",
        "Milliseconds. teams: images at once x threads of each. stages: of an image, a barrier each. "
        "path: with a thread for every chunk. faster: than the first line's, per thread. "
        "serial: what one thread of a team computes while the others, if it has others, wait, of simulated. "
        "worst: the same, of the stage that waits longest. measured: where the machine has the cores.",
        [
            *("shape", "dtype", "threads", "teams", "stages", "barrier us", "path", "simulated", "faster", "serial"),
            *("worst", "measured", "measured / simulated"),
        ],
        rows,
        ("shape", "dtype", "teams", "worst"),
    )


def main() -> None:
    parser = command.parser("threads", __doc__)
    parser.add_argument("--threads", type=positive, nargs="+", default=THREADS, help=f"{' '.join(map(str, THREADS))}")
    parser.add_argument("--rounds", type=positive, default=5, help="of which the least times count (5)")
    parser.add_argument("--markdown", action="store_true", help="print what docs/cpu.md holds")
    command.add_only(parser)
    options = parser.parse_args()
    cases = [Case(*shape, dtype, "inplace") for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]
    head = describe()
    with tempfile.TemporaryDirectory() as folder:
        program = build(Path(folder))
        rows = [
            line
            for case in command.chosen(parser, cases, options.only)
            for line in lines(case, program, options.threads, options.rounds)
        ]
    if options.markdown:
        print(document(head, [sheet(rows)]))
    else:
        show(Console(width=None if sys.stdout.isatty() else 220), head, [sheet(rows)])


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


if __name__ == "__main__":
    main()
