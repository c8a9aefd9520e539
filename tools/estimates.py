"""Prints the estimates of csrc/cuda/plan.cu and of apet_kernels/triton_kernels/estimate.py for the shapes of the paper
and of current vision encoders, as a table.

    python -m tools.estimates [--markdown]

It calls apet_cuda_plan, compiled with g++, for every path on devices of the size of real ones. mix: s1 to s3 by the
CUDA kernels, s4 and s5 by Triton's. --markdown writes the table into docs/cuda.md, and tables of the terms of those
estimates that have a target, and of a basis in rounds. It needs neither a GPU nor nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass

import torch

from apet_kernels.triton_kernels import configs, estimate
from benchmarks.lib import machine
from benchmarks.lib.sheet import replaced
from benchmarks.quick import figures
from tests.simt import build, call
from tests.simt.call import Device, How, NoPath
from tools.sass import GUIDE

BEGIN, END = "<!-- estimates:begin -->", "<!-- estimates:end -->"
ROUNDS_BEGIN, ROUNDS_END = "<!-- rounds:begin -->", "<!-- rounds:end -->"
TERMS_BEGIN, TERMS_END = "<!-- terms:begin -->", "<!-- terms:end -->"
HEADER = build.CSRC / "cuda/figures.cuh"
PATHS = ("fused", "cluster", "cooperative")


@dataclass(frozen=True)
class Card:
    """A real GPU: its limits, and the name of its class in configs.py."""

    device: Device
    device_class: str


CARDS = {
    "H100": Card(Device(90, multiprocessors=132), "sm_90a"),
    "B200": Card(Device(100, multiprocessors=148), "sm_100a"),
    "A100": Card(Device(80, 108, 163 << 10, 164 << 10, 0), "sm_80"),
    "RTX 4090": Card(Device(89, 128, 99 << 10, 100 << 10, 0), "sm_89"),
    "RTX 5090": Card(Device(120, 170, 99 << 10, 100 << 10, 8), "sm_120a"),
}
COLUMNS = {f"H100: {path}": ("H100", path) for path in (*PATHS, "mix", "triton")}
COLUMNS |= {f"{card}: {way}": (card, way) for card in CARDS if card != "H100" for way in ("cuda", "triton")}
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
BASIS = 10
# The shapes with a target for an H100, and that target in us.
TARGETS = {
    "LLaVA-1.5, 1 image, K 64": 30,
    "LLaVA-1.5, 64 images, K 64": 150,
    "4096 x 3584, K 1229": 170,
    "16384 x 3584, K 4915": 1100,
}
# With a basis in rounds.
ROUNDS = {
    "576 x 1024, K 64": (1, 576, 1024, 64),
    "576 x 1024, K 288": (1, 576, 1024, 288),
    "64 images of 576 x 1024, K 64": (64, 576, 1024, 64),
    "1024 x 3584, K 307": (1, 1024, 3584, 307),
    "4096 x 3584, K 1229": (1, 4096, 3584, 1229),
}
# The terms of an estimate (apet_cuda_terms), as the table names them.
TERMS = {
    "launches": "launches",
    "barriers": "barriers beside the exchanges",
    "memory": "X from memory",
    "sweeps": "norms, and ten sweeps",
    "exchanges": "ten exchanges",
    "algebra": "terms of `y`",
    "topk": "s4",
    "products": "tiles of s5",
    "lists": "lists",
    "means": "means",
}


def card_figures(capability: int) -> dict[str, float]:
    """Returns the row of figures.cuh for a compute capability."""
    rows = [row for _, row in figures.read(HEADER.read_text())]
    return next((row for row in rows if row["capability"] == capability), rows[0])


def triton(card: Card, shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> estimate.Estimate:
    """Returns the estimate of the Triton kernels for a shape (B, N, D, K)."""
    B, N, D, K = shape
    tiles = configs.tiles(card.device_class, D, dtype.itemsize)
    return estimate.estimate(
        card_figures(card.device.capability), card.device.multiprocessors, tiles, N, D, K, BASIS, dtype.itemsize, B
    )


def problem(shape: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16) -> call.Problem:
    """Returns the call of `compress` of a shape (B, N, D, K)."""
    *dims, keep = shape
    return call.compress_case(torch.empty(*dims, dtype=dtype, device="meta"), keep, BASIS).problem


def cuda(card: Card, shape: tuple[int, int, int, int], path: str = "best") -> call.Plan:
    """Returns the plan of the CUDA kernels. Raises NoPath if the GPU cannot run the path."""
    return call.plan(problem(shape), How(card.device, path))


def mix(card: Card, shape: tuple[int, int, int, int]) -> float:
    """Returns the estimate of s1 to s3 by the CUDA kernels, and of the norms, s4 and s5 by Triton's."""
    case = call.score_case(torch.empty(*shape[:3], dtype=torch.bfloat16, device="meta"), BASIS)
    by_triton = triton(card, shape)
    return call.plan(case.problem, How(card.device)).estimated_us + by_triton.norms_us + by_triton.merge_us


def cell(name: str, way: str, shape: tuple[int, int, int, int]) -> tuple[float, str]:
    """Returns the estimate in us, and in brackets the CTAs per image and the tile of s5_merge."""
    card = CARDS[name]
    if way == "triton":
        return triton(card, shape).us, ""
    if way == "mix":
        return mix(card, shape), ""
    plan = cuda(card, shape, "best" if way == "cuda" else way)
    inside = f"{plan.ctas_per_image}, {plan.tile_rows} x {plan.tile}" if plan.tile else f"{plan.ctas_per_image}"
    return plan.estimated_us, f" ({inside})"


def cells(shape: tuple[int, int, int, int]) -> list[str]:
    """Returns a row: estimates in us; bold: the least of each GPU."""
    found: dict[str, tuple[float, str]] = {}
    for column, (name, way) in COLUMNS.items():
        with contextlib.suppress(NoPath):
            found[column] = cell(name, way, shape)
    least = {name: min(us for c, (us, _) in found.items() if COLUMNS[c][0] == name) for name in CARDS}
    texts = []
    for column, (name, _) in COLUMNS.items():
        us, inside = found.get(column, (None, ""))
        mark = "**" if us == least[name] else ""
        texts.append("-" if us is None else f"{mark}{us:.0f}{mark}{inside}")
    return texts


def table() -> str:
    lines = [
        f"`python -m tools.estimates --markdown`, commit {machine.commit()}:",
        "",
        "| tokens | " + " | ".join(COLUMNS) + " |",
        "|---|" + "---|" * len(COLUMNS),
    ]
    lines += [f"| {name} | " + " | ".join(cells(shape)) + " |" for name, shape in SHAPES.items()]
    return "\n".join(lines) + "\n"


def terms_table() -> str:
    """Returns what the estimates of the shapes with a target consist of, in us."""
    device = CARDS["H100"].device
    plans = {name: cuda(CARDS["H100"], SHAPES[name]) for name in TARGETS}
    terms = {name: call.terms(problem(SHAPES[name]), How(device)) for name in TARGETS}
    rows = {"path": [f"`{call.PATHS[plan.path]}`, {plan.ctas_per_image} CTAs" for plan in plans.values()]}
    rows |= {text: [f"{terms[name][key]:.1f}" for name in TARGETS] for key, text in TERMS.items()}
    rows |= {"sum": [f"**{sum(of.values()):.1f}**" for of in terms.values()], "target": [*map(str, TARGETS.values())]}
    lines = ["| | " + " | ".join(TARGETS) + " |", "|---|" + "---|" * len(TARGETS)]
    return "\n".join(lines + [f"| {text} | " + " | ".join(cells) + " |" for text, cells in rows.items()]) + "\n"


def rounds_table() -> str:
    """Returns estimates in us of `select="qr", basis=None`, without and with two medoid steps."""
    columns = [(card, refine) for card in ("H100", "A100", "RTX 5090") for refine in (0, 2)]
    heads = [f"{card}: `refine=2`, 3 launches" if refine else f"{card}: 2 launches" for card, refine in columns]
    lines = ["| tokens, bfloat16 | " + " | ".join(heads) + " |", "|---|" + "---|" * len(columns)]
    for name, (*dims, keep) in ROUNDS.items():
        texts = []
        for card, refine in columns:
            x = torch.empty(*dims, dtype=torch.bfloat16, device="meta")
            of = call.compress_case(x, keep, None, select="qr", refine=refine).problem
            plan = call.plan(of, How(CARDS[card].device))
            way = f" (`{call.PATHS[plan.path]}`, {plan.ctas_per_image} CTAs)" if not refine else ""
            texts.append(f"{plan.estimated_us:.0f}{way}")
        lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.estimates", description=__doc__.splitlines()[0])
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {GUIDE.name}")
    options = parser.parse_args(arguments)
    if why := build.missing():
        print(f"python -m tools.estimates: {why}", file=sys.stderr)
        return 2
    parts = {(BEGIN, END): table(), (TERMS_BEGIN, TERMS_END): terms_table(), (ROUNDS_BEGIN, ROUNDS_END): rounds_table()}
    print(*parts.values(), sep="\n")
    if options.markdown:
        guide = GUIDE.read_text()
        for (begin, end), text in parts.items():
            guide = replaced(guide, begin, end, text)
        GUIDE.write_text(guide)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
