"""Time against tokens kept: the kernel, other ways to compute the same, and other methods for the same job.

python -m benchmarks.kept     (options: benchmarks/lib/suite.py)

The other methods are the earlier ones of benchmarks/lib/alternatives.py, in eager torch on all threads. FastV and
VisionZip get the attention weights that they rank by as input. A model with FlashAttention must compute these in
addition; their times do not include that.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from benchmarks.lib import alternatives, baselines, ceilings
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.check import check_other, checked
from benchmarks.lib.compare import Comparison, Row, ring
from benchmarks.lib.device import Device
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite, ms, noise, number

SHARES = (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32)
# [B, N, D]: LLaVA-1.5, the tiles of one LLaVA-NeXT image, a large image of Qwen2.5-VL.
SHAPES = (
    (1, 576, 1024, torch.float32),
    (1, 576, 1024, torch.bfloat16),
    (5, 576, 1024, torch.bfloat16),
    (1, 4096, 3584, torch.bfloat16),
)
SAME = ("published", "eager", "tuned")
OTHERS = alternatives.EARLIER
PUBLISHED = 2**32  # bytes of its broadcast up to which the published formulation is run


def cases(smoke: bool) -> list[Case]:
    """Returns every shape at every share, in the default layout."""
    if smoke:
        return [Case(2, 64, 32, keep, torch.float32, "inplace") for keep in (8, 32)]
    return [Case(B, N, D, round(share * N), dtype, "inplace") for B, N, D, dtype in SHAPES for share in SHARES]


def compare(case: Case, device: Device) -> Comparison:
    """Checks and times everything. The published formulation has another layout, which costs the same."""
    published = dataclasses.replace(case, layout="overwrite")
    of = dict.fromkeys(("eager", "tuned", "kernel"), case)
    calls = {name: functools.partial(getattr(baselines, name), **case.arguments) for name in ("eager", "tuned")}
    calls["kernel"] = functools.partial(torch.ops.apet.compress, **case.op_arguments)
    broadcast = baselines.published_bytes(case.N, case.D, case.keep, case.basis, case.itemsize)
    if case.keep > case.basis and broadcast <= PUBLISHED:
        of["published"], calls["published"] = published, functools.partial(baselines.published, **published.arguments)
    inputs = ring(functools.partial(tokens, case), device)
    shares = {name: checked(of[name], name, call, inputs[0]) for name, call in calls.items()}
    attention = torch.rand(case.B, case.N, generator=torch.Generator().manual_seed(0))
    for name in OTHERS:
        calls[name] = functools.partial(alternatives.METHODS[name], keep=case.keep, attention=attention)
        with torch.inference_mode():
            check_other(name, case, inputs[0], *calls[name](inputs[0]))
        shares[name] = 1.0
    return Comparison(
        device, case.fields(), {**ceilings.reference_cost(case), "copy": torch.clone, **calls}, inputs, shares
    )


def sheets(results: Results) -> list[Sheet]:
    """Returns a table of all times, and one of the ratios to the kernel."""
    names = ("kernel", *SAME, *OTHERS, "copy", "reference cost")
    times = Sheet(
        "Time against tokens kept",
        "Milliseconds, medians; (n) where fewer rounds than the kernel's were timed; - where its broadcast would "
        "take more than 4 GiB. copy: x, copied once. reference cost: one torch.mm [N-K, D] x [D, K] per image and "
        "M sweeps over X, both from memory. "
        f"{ceilings.OF_FLOOR} of copy: likewise. noise: interquartile range over median, the worst of kernel and "
        "reference cost. checked: share of the kernel's rows compared with float64.",
        ["shape", "dtype", *names, "of floor", "of copy", "noise", "checked"],
        [
            [
                *(*_named(row), *(ms(row, name) for name in names)),
                ceilings.of_floor([Case.of(row.case)], row.ms["kernel"], results.rates),
                *(f"{row.faster['copy']:.0%}", noise(row), f"{row.checked['kernel']:.0%}"),
            ]
            for row in results.rows
        ],
    )
    ratios = Sheet(
        "Time of other methods relative to the kernel",
        "Medians of paired rounds; below 1 the other is faster.",
        ["shape", "dtype", *SAME, *OTHERS],
        [
            [*_named(row), *(number(row.faster[name]) if name in row.faster else "-" for name in (*SAME, *OTHERS))]
            for row in results.rows
        ],
    )
    return [times, ratios]


def _named(row: Row) -> list[str]:
    case = Case.of(row.case)
    return [case.shape, case.dtype_name]


SUITE = Suite(
    "kept",
    "Time against tokens kept: the kernel, other ways to compute the same, and other methods for the same job.",
    cases,
    compare,
    sheets,
    rounds=10,
)

if __name__ == "__main__":
    SUITE.main()
