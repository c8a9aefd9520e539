"""The CPU kernel against the published formulation, eager torch and torch.compile, plain and tuned, and the floor.

    python -m benchmarks.cpu [--smoke] [--rounds 20] [--only TEXT ...] [--json FILE] [--markdown FILE]

--only keeps the cases whose name (such as "1x576x1024 keep 64 float32 overwrite") holds every TEXT given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cases import cases
from benchmarks.ceilings import peak_gflops
from benchmarks.compare import RIVALS, ROUNDS, THREADS, Comparison, Row
from benchmarks.machine import describe
from benchmarks.sheet import Sheet, document, show


def sheets(rows: list[Row]) -> list[Sheet]:
    """One table of the goals, one of the instruction sets."""
    speed = Sheet(
        "torch.ops.apet.compress",
        "Milliseconds, medians; (n) where fewer rounds than the kernel's were timed; - where the broadcast does not "
        "fit memory or the layout does not exist. x: how many times faster the kernel is, median of paired rounds. "
        "floor: one torch.mm [N-K, D] x [D, T] per image and M sweeps over X. of floor: the share of the kernel's time "
        "that the floor explains. noise: interquartile range over median, the worst of kernel and floor. "
        "judged: rows whose values were checked (less than 100 % where rounding decides).",
        [
            *("shape", "dtype", "layout", *RIVALS, "kernel", "floor"),
            *(f"x {rival}" for rival in RIVALS),
            *("kernel / floor", "of floor", "GFLOP/s", "noise", "judged", "goals"),
        ],
        [_speed_line(row) for row in rows],
    )
    names = list(dict.fromkeys(name for row in rows for name in row.ms if name.startswith("kernel")))
    isa = Sheet(
        "Instruction sets",
        "Milliseconds, medians, and the floor they are read against; kernel is the best set of this machine.",
        ["shape", "dtype", "layout", *names, "product", "sweeps", "sweeps GB/s"],
        [
            [row.shape, row.dtype, row.layout]
            + [_ms(row, name) for name in (*names, "product", "sweeps")]
            + [f"{row.sweep_gbytes:.0f}"]
            for row in rows
        ],
    )
    return [speed, isa]


def header() -> dict[str, str]:
    """Machine, versions, commit, command, and the peak of torch.mm that puts the floor into proportion."""
    peak = ", ".join(f"{name} {peak_gflops(getattr(torch, name)):.0f} GFLOP/s" for name in ("float32", "bfloat16"))
    return {**describe(), "torch.mm 2048^3": peak}


def _ms(row: Row, name: str) -> str:
    if name not in row.ms:
        return "-"
    few = f" ({row.rounds[name]})" if row.rounds[name] < row.rounds["kernel"] else ""
    return f"{row.ms[name]:.3g}{few}" if row.ms[name] < 1000 else f"{row.ms[name]:.0f}{few}"


def _speed_line(row: Row) -> list[str]:
    return [
        *(row.shape, row.dtype, row.layout),
        *(_ms(row, name) for name in (*RIVALS, "kernel", "floor")),
        *(f"{row.faster[rival]:.1f}" if rival in row.faster else "-" for rival in RIVALS),
        *(f"{row.floors:.2f}", f"{1 / row.floors:.0%}", f"{row.gflops:.0f}"),
        *(f"{row.noise:.0%}", f"{row.judged['kernel']:.0%}"),
        "; ".join(row.missed) if row.missed else "met" if row.goals else "none",
    ]


def main() -> None:
    """Measures, prints, writes."""
    summary, _, usage = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu",
        description=summary,
        epilog=usage,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--smoke", action="store_true", help="two tiny cases and three rounds")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"calls of each implementation ({ROUNDS})")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose name holds every TEXT")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables")
    options = parser.parse_args()
    chosen = [case for case in cases(options.smoke) if all(text in str(case) for text in options.only)]
    if not chosen:
        parser.error(f"no case holds {' and '.join(options.only)}")
    torch.set_num_threads(THREADS)
    console, head, rows = Console(width=None if sys.stdout.isatty() else 220), header(), []
    for number, case in enumerate(chosen, 1):
        with console.status(f"{number} of {len(chosen)}: {case}"):
            rows.append(Comparison(case, 3 if options.smoke else options.rounds).run())
        if options.json:  # after every case, so that a run cut short leaves what it has
            report = {"head": head, "rows": [dataclasses.asdict(row) for row in rows]}
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(console, head, sheets(rows))
    if options.markdown:
        options.markdown.write_text(document(head, sheets(rows)))


if __name__ == "__main__":
    main()
