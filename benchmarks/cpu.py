"""The CPU kernel against the published formulation, eager torch and torch.compile, plain and tuned.

python -m benchmarks.cpu     (options: benchmarks/lib/suite.py)
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.lib import baselines, ceilings
from benchmarks.lib.cases import SHAPES, Case, cases, tokens
from benchmarks.lib.check import checked
from benchmarks.lib.compare import Comparison, Row, on_each_isa, ring
from benchmarks.lib.device import Device
from benchmarks.lib.machine import available_memory
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite, ms, noisy

COST = "reference cost"
BASELINES = ("published", "eager", "compiled", "tuned", "tuned compiled")


def compare(case: Case, device: Device) -> Comparison:
    """Checks and times everything that can run `case`: the baselines, and the kernel on every instruction set."""
    others = {
        **eager_baselines(case),
        "compiled": functools.partial(baselines.compiled(), **case.arguments),
        "tuned compiled": functools.partial(baselines.tuned_compiled(), **case.arguments),
    }
    calls = {**others, **on_each_isa("kernel", functools.partial(torch.ops.apet.compress, **case.op_arguments))}
    inputs = ring(functools.partial(tokens, case), device)
    shares = {name: checked(case, name, call, inputs[0]) for name, call in calls.items()}
    return Comparison(device, case.fields(), {**ceilings.reference_cost(case), **calls}, inputs, shares)


def eager_baselines(case: Case) -> dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """Returns the baselines that need no compiler; "published" only if it has the layout and its broadcast fits the
    memory."""
    functions = {"eager": baselines.eager, "tuned": baselines.tuned}
    broadcast = baselines.published_bytes(case.N, case.D, case.keep, case.basis, case.itemsize)
    if case.layout == "overwrite" and broadcast < 0.75 * available_memory():
        functions = {"published": baselines.published, **functions}
    return {name: functools.partial(function, **case.arguments) for name, function in functions.items()}


def goals(case: Case) -> dict[str, float]:
    """Returns how many times faster than each baseline the kernel should be, and how many reference costs it may take.

    The tuned baselines have no goals: they take 1.2 to 2.1 reference costs in float32 and 2.7 to 6.2 in bfloat16, so
    goals of 4 and 6.5 would be below the reference cost of most shapes.
    """
    if case.dtype is torch.float16 or (case.B, case.N, case.D, case.keep) not in SHAPES:
        return {}
    if case.dtype is torch.bfloat16:
        return {"published": 75, "eager": 6.5, "compiled": 3.2, COST: 1.4}
    return {"published": 75, "eager": 2.5 if case.N >= 5120 else 4, "compiled": 1.6, COST: 1.4}


def missed(row: Row) -> list[str]:
    """Returns the goals that this row does not reach, each with the value reached."""
    wanted, reached = goals(Case.of(row.case)), {**row.faster, COST: row.costs}
    return [
        f"{name} {reached[name]:.2f}x, goal {goal:g}x"
        for name, goal in wanted.items()
        if name in reached and (reached[name] > goal if name == COST else reached[name] < goal)
    ] + (noisy(row) if wanted else [])


def sheets(results: Results) -> list[Sheet]:
    """Returns a table of the goals and a table of the instruction sets."""
    rows = results.rows
    speed = Sheet(
        "torch.ops.apet.compress",
        "Milliseconds, medians; (n) where fewer rounds than the kernel's were timed; - where the broadcast does not "
        "fit memory or the layout does not exist. x: how many times faster the kernel is, median of paired rounds. "
        "reference cost: one torch.mm [N-K, D] x [D, T] per image and M sweeps over X, both from memory. "
        f"{ceilings.OF_FLOOR} noise: interquartile range over median, the worst of kernel and reference cost. "
        "checked: share of rows compared with float64 (the others are those that rounding decides).",
        [
            *("shape", "dtype", "layout", *BASELINES, "kernel", COST),
            *(f"x {name}" for name in BASELINES),
            *(f"kernel / {COST}", "of floor", "GFLOP/s", "noise", "checked", "goals"),
        ],
        [_speed_line(row, results.rates) for row in rows],
    )
    names = list(dict.fromkeys(name for row in rows for name in row.ms if name.startswith("kernel")))
    isa = Sheet(
        "Instruction sets",
        "Milliseconds, medians, and the reference cost they are read against; kernel is the best set of this machine.",
        ["shape", "dtype", "layout", *names, "product", "sweeps", "sweeps GB/s"],
        [
            [*_named(row), *(ms(row, name) for name in (*names, "product", "sweeps")), _swept(row)]
            for row in rows
            if "sweeps" in row.ms
        ],
    )
    return [speed, isa] if isa.lines else [speed]


def _named(row: Row) -> list[str]:
    case = Case.of(row.case)
    return [case.shape, case.dtype_name, case.layout]


def _swept(row: Row) -> str:
    return f"{ceilings.swept_bytes(Case.of(row.case)) / row.ms['sweeps'] / 1e6:.0f}"


def _speed_line(row: Row, rates: dict[str, float]) -> list[str]:
    wrong = missed(row)
    return [
        *_named(row),
        *(ms(row, name) for name in (*BASELINES, "kernel", COST)),
        *(f"{row.faster[name]:.1f}" if name in row.faster else "-" for name in BASELINES),
        *(f"{row.costs:.2f}", ceilings.of_floor([Case.of(row.case)], row.ms["kernel"], rates)),
        f"{ceilings.flops(Case.of(row.case)) / row.ms['kernel'] / 1e6:.0f}",
        *(f"{row.worst_noise:.0%}", f"{row.checked['kernel']:.0%}"),
        "; ".join(wrong) if wrong else "met" if goals(Case.of(row.case)) else "none",
    ]


SUITE = Suite(
    "cpu",
    "The CPU kernel against the published formulation, eager torch and torch.compile, plain and tuned.",
    cases,
    compare,
    sheets,
    missed=missed,
)

if __name__ == "__main__":
    SUITE.main()
