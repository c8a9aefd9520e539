"""Prints the estimates of csrc/cuda/plan.cu for the shapes of the paper and of current vision encoders, as a table.

    python -m tests.tools.estimates [--markdown]

It calls apet_cuda_plan, compiled with g++, for every path on devices of the size of an H100 and an A100. --markdown
writes the table into docs/cuda.md. It needs neither a GPU nor nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import sys

import torch

from benchmarks.lib import machine
from benchmarks.lib.sheet import replaced
from tests.simt import build, call
from tests.simt.call import Device, How, NoPath
from tests.tools.sass import GUIDE

BEGIN, END = "<!-- estimates:begin -->", "<!-- estimates:end -->"
H100 = Device(90, multiprocessors=132)
A100 = Device(80, 108, 163 << 10, 164 << 10, 0)
COLUMNS = {"H100: fused": (H100, "fused"), "cluster": (H100, "cluster"), "cooperative": (H100, "cooperative")}
COLUMNS |= {"A100: cooperative": (A100, "cooperative")}
# B, N, D, keep
SHAPES = {
    "LLaVA-1.5, 1 image, K 64": (1, 576, 1024, 64),
    "LLaVA-1.5, 1 image, K 288": (1, 576, 1024, 288),
    "LLaVA-1.5, 64 images, K 64": (64, 576, 1024, 64),
    "LLaVA-1.5, 64 images, K 288": (64, 576, 1024, 288),
    "LLaVA-NeXT, 5 tiles, K 192": (5, 576, 1024, 192),
    "Video-LLaVA, 8 frames, K 22": (8, 256, 4096, 22),
    "Qwen2.5-VL 1024 x 3584, K 307": (1, 1024, 3584, 307),
    "4096 x 3584, K 1229": (1, 4096, 3584, 1229),
    "16384 x 3584, K 4915": (1, 16384, 3584, 4915),
}


def cells(shape: tuple[int, int, int, int]) -> list[str]:
    """Returns a row: estimates in us, with CTAs per image and the tile of s5_merge; bold: the least of the H100."""
    *dims, keep = shape
    case = call.compress_case(torch.empty(*dims, dtype=torch.bfloat16, device="meta"), keep)
    plans: dict[str, call.Plan] = {}
    for column, (device, path) in COLUMNS.items():
        with contextlib.suppress(NoPath):
            plans[column] = call.plan(case.problem, How(device, path))
    best = min((p.estimated_us, column) for column, p in plans.items() if COLUMNS[column][0] == H100)[1]
    found = []
    for column in COLUMNS:
        if not (plan := plans.get(column)):
            found.append("-")
            continue
        mark = "**" if column == best else ""
        tile = f", {plan.tile}" if plan.tile else ""
        found.append(f"{mark}{plan.estimated_us:.0f}{mark} ({plan.ctas_per_image}{tile})")
    return found


def table() -> str:
    lines = [
        f"`python -m tests.tools.estimates --markdown`, commit {machine.commit()}:",
        "",
        "| tokens | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {name} | " + " | ".join(cells(shape)) + " |" for name, shape in SHAPES.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.tools.estimates", description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {GUIDE.name}")
    options = parser.parse_args(arguments)
    if why := build.missing():
        print(f"python -m tests.tools.estimates: {why}", file=sys.stderr)
        return 2
    text = table()
    print(text)
    if options.markdown:
        GUIDE.write_text(replaced(GUIDE.read_text(), BEGIN, END, text))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
