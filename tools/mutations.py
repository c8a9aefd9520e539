"""Injects faults into the CUDA sources, one at a time, and reports which ways to run them without a GPU notice each.

    python -m tools.mutations [--only PART-OF-A-NAME ...] [--markdown]

There are two ways. The simulation compiles the sources with g++ and runs them, for some faults under a sanitizer. The
interpreter executes the PTX that nvcc makes of them. --markdown writes the table into docs/cuda.md. The exit code is 1
if neither notices a fault. It needs nvcc, and takes minutes, since each fault needs two builds.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.lib import machine
from benchmarks.lib.sheet import replaced
from tests.ptx import build, call, injected
from tests.simt.bugs import BUGS, CLUSTER, COOPERATIVE, FUSED, IN_ROUNDS, WRONG, Bug, both, differs, inject, small
from tests.simt.call import Fault
from tools import sass
from tools.sass import GUIDE

BEGIN, END = "<!-- mutations:begin -->", "<!-- mutations:end -->"
NOT_THERE = "not compiled there"
# Faults in addition to those of the simulation's own test: fragments, and ptx.cuh, which only nvcc compiles.
FRAGMENTS = [
    Bug(
        "the halves of b exchanged",
        "product.cuh",
        [(r"(fb\[j / 2\]\[j % 2 \* 2\]), (fb\[j / 2\]\[j % 2 \* 2 \+ 1\])", r"\2, \1")],
        CLUSTER,
        WRONG,
    ),
    Bug("rows of a from the wrong half", "product.cuh", [(r"lane / 16 \* 16;", "lane / 8 % 2 * 16;")], CLUSTER, WRONG),
    Bug("rows of b from the wrong half", "product.cuh", [(r"lane / 8 % 2 \* 16", "lane / 16 * 16")], FUSED, WRONG),
    Bug("columns of a product exchanged", "product.cuh", [(r"\* 2 \+ c;", "* 2 + 1 - c;")], CLUSTER, WRONG),
    Bug(
        "rows of a product off by one",
        "product.cuh",
        [(r"half \* 8 \+ threadIdx\.x % 32 / 4;", "half * 8 + (threadIdx.x % 32 / 4 + 1) % 8;")],
        FUSED,
        WRONG,
    ),
    Bug(
        "a step too few",
        "product.cuh",
        [(r"const int steps = \(slabs \+ (.*?);", r"const int steps = -1 + (slabs + \1;")],
        CLUSTER,
        WRONG,
    ),
]
ASSEMBLY = [
    Bug(
        "mma: a1 and a2 exchanged", "ptx.cuh", [(r'"r"\(a\[1\]\), "r"\(a\[2\]\)', '"r"(a[2]), "r"(a[1])')], CLUSTER, ""
    ),
    Bug(
        "ldmatrix: the second matrix first",
        "ptx.cuh",
        [(r"\{%0, %1, %2, %3\}, \[%4\]", "{%1, %0, %2, %3}, [%4]")],
        FUSED,
        "",
    ),
    Bug("polls acquire nothing", "ptx.cuh", [(r'asm volatile\("fence\.acq_rel\.gpu;".*?;', "")], COOPERATIVE, ""),
    Bug("polls made plain", "ptx.cuh", [(r"ld\.relaxed\.gpu\.global", "ld.global")], COOPERATIVE, ""),
    Bug("release made relaxed", "ptx.cuh", [(r"red\.release", "red.relaxed")], COOPERATIVE, ""),
    Bug("a copy of what is not valid", "ptx.cuh", [(r"valid \? 16 : 0", "16")], CLUSTER, ""),
    Bug("the second launch waits for nothing", "ptx.cuh", [(r"cudaGridDependencySynchronize\(\);", "")], CLUSTER, ""),
]


def by_simulation(bug: Bug, csrc: Path) -> str:
    """Returns the error of the simulation; "" if it notices nothing."""
    if bug in ASSEMBLY:
        return NOT_THERE
    case = small(bug)
    said, right = both(bug, csrc, case)
    if said:
        kinds = r"data race|heap-buffer-overflow|deadlock|divergent barrier|asynchronous copies|mask|not begun"
        kind = re.search(kinds, said)
        return kind[0] if kind else said.strip()[:40]
    return "other results" if differs(case, right) else ""


MERGE = "s5_merge<__half, SmallTile, 2>"
KERNELS = {
    "fused": ["s1_s5_cluster<__half>"],
    "cluster": ["s1_s4_group<__half, ClusterGroup>", MERGE],
    "cooperative": ["s1_s4_group<__half, CooperativeGroup>", MERGE],
}


def kernels_of(bug: Bug) -> list[str]:
    """Returns the kernels that the bug's case launches."""
    if bug.file not in IN_ROUNDS:
        return KERNELS[bug.how.path]
    group = {"cluster": "ClusterGroup", "cooperative": "CooperativeGroup"}[bug.how.path]
    return [f"{name}<__half, {group}>" for name in ("s1_s4_rounds", "s4_medoids")] + [MERGE]


def by_interpreter(bug: Bug, csrc: Path) -> str:
    """Returns the interpreter's first error on a few schedules; "" if it notices nothing."""
    case, how = small(bug), replace(bug.how, device=call.H100 if bug.how.device.capability >= 90 else call.A100)
    call.run(case, how)
    right = {name: t.clone() for name, t in case.outputs.items()}
    source = csrc / "changed.cu"  # with the kernels of this path only
    needed = (f"template __global__ void apet::cuda::{kernel}(const Call);\n" for kernel in kernels_of(bug))
    source.write_text('#include "cuda/kernels.cuh"\nusing namespace apet::cuda;\n' + "".join(needed))
    text = build.compiled(source, csrc, call.target_of(how))
    try:
        for seed in injected.SEEDS:
            call.run(case, replace(how, seed=seed), text)
            if differs(case, right):
                return "other results"
        return ""
    except Fault as fault:
        return re.split(r": | in .* at byte", str(fault))[0]
    finally:
        call.forget(text)


def head() -> str:
    """Returns the command, versions and machine, for the head of the table."""
    where = machine.describe()
    nvcc = f"nvcc {sass.compiler()}"
    return f"`python -m tools.mutations --markdown`, {nvcc}, {where['machine']}, commit {where['commit']}:"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.mutations", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", default=[], help="part of a fault's name; may be repeated")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {GUIDE.name}")
    options = parser.parse_args(arguments)
    if options.markdown and options.only:
        parser.error("--markdown is of all faults")
    if why := build.missing():
        print(f"python -m tools.mutations: {why}", file=sys.stderr)
        return 2
    lines = [head(), "", "| fault in the source | file | simulation | compiled PTX |", "|---|---|---|---|"]
    missed = 0
    for bug in [*BUGS, *FRAGMENTS, *ASSEMBLY]:
        if options.only and not any(part in bug.name for part in options.only):
            continue
        with tempfile.TemporaryDirectory() as folder:
            csrc = inject(bug, Path(folder))
            seen = [way(bug, csrc) for way in (by_simulation, by_interpreter)]
        missed += not any(way and way != NOT_THERE for way in seen)
        lines.append(f"| {bug.name} | `{bug.file}` | " + " | ".join(way or "not noticed" for way in seen) + " |")
        print(lines[-1], flush=True)
    if options.markdown:
        GUIDE.write_text(replaced(GUIDE.read_text(), BEGIN, END, "\n".join(lines) + "\n"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
