"""The stages of the kernel beside their reference costs, on every instruction set, and those of the reference.

python -m benchmarks.stages     (options: benchmarks/lib/suite.py)

The kernel fuses s1 to s3, so only the public functions can be timed: `score` (s1 to s3), `merge` (s5) and `compress`.
Two differences give more detail. The time of one more basis token is (`score` with M of them - `score` with one) /
(M - 1). The time of `compress` minus those of `score` and `merge` is that of s4 minus the saving of one call instead of
two, so it may be negative. The float64 reference runs each stage alone.

The reference cost of `score` is M sweeps that only read, that of `merge` one torch.mm [N-K, D] x [D, K], both measured
in the same rounds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from apet_kernels import reference
from benchmarks.lib import ceilings
from benchmarks.lib.cases import RIDGE, SELECT, Case, tokens
from benchmarks.lib.check import judge
from benchmarks.lib.compare import Comparison, Row, on_each_isa, ring
from benchmarks.lib.device import Device
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite, ms, noise, number

SHAPES = ((1, 576, 1024, 64), (5, 576, 1024, 192), (8, 256, 4096, 22), (1, 1280, 3584, 384), (1, 4096, 3584, 512))
REFERENCE = ("s1_basis", "s2_solve", "s3_residual", "s4_topk", "s5_merge")
Pair = tuple[Tensor, Tensor]  # x [B, N, D], and the tokens that `compress` keeps of it [B, K]


def cases(smoke: bool) -> list[Case]:
    """Returns the paper's shapes in two dtypes, in the default layout."""
    if smoke:
        return [Case(2, 96, 64, 24, torch.float32, "inplace")]
    return [Case(*shape, dtype, "inplace") for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)]


def compare(case: Case, device: Device) -> Comparison:
    """Checks and times everything; "kernel" is `compress`."""
    options = {"select": SELECT, "start": case.start, "ridge": RIDGE}

    def score(pair: Pair, basis: int = case.basis) -> Pair:
        return torch.ops.apet.score(pair[0], basis, **options)

    def merge(pair: Pair) -> Tensor:
        return torch.ops.apet.merge(*pair)

    def compress(pair: Pair) -> Pair:
        return torch.ops.apet.compress(pair[0], **case.op_arguments)

    halves = {**on_each_isa("score", score), **on_each_isa("merge", merge)}
    whole = on_each_isa("kernel", compress)
    with torch.inference_mode():
        inputs = [
            (x, torch.ops.apet.compress(x, **case.op_arguments)[1])
            for x in ring(functools.partial(tokens, case), device)
        ]
        shares = {name: check(case, name, inputs[0][0], call, halves) for name, call in whole.items()}
        cost = {name: _of_x(call) for name, call in ceilings.reference_cost(case).items()}
        stages = {f"reference {name}": call for name, call in reference_stages(case, inputs[0][0]).items()}
    first = functools.partial(score, basis=1)
    calls = {**cost, **stages, "score one": first, **halves, **whole}
    return Comparison(device, case.fields(), calls, inputs, shares)


def check(
    case: Case, name: str, x: Tensor, compress: Callable[[Pair], Pair], halves: dict[str, Callable[[Pair], object]]
) -> float:
    """Checks `compress` against float64, and `score` and `merge` of the same instruction set against `compress`: the
    tokens that the residuals of `score` rank highest are the kept ones, and `merge` of these gives the same rows.
    Returns the share of rows checked. Raises AssertionError."""
    isa = name.removeprefix("kernel")
    rows, kept = compress((x, torch.empty(0)))
    residual, basis = halves[f"score{isa}"]((x, kept))
    ranked = residual.scatter(1, basis, torch.inf).sort(dim=1, descending=True, stable=True).indices  # [B, N]
    assert torch.equal(ranked[:, : case.keep].sort(1).values, kept), f"score{isa}, {case}: it ranks other tokens"
    assert torch.equal(halves[f"merge{isa}"]((x, kept)), rows), f"merge{isa}, {case}: it gives other rows"
    return judge(case, name, x, (rows, kept))


def reference_stages(case: Case, x: Tensor) -> dict[str, Callable[[object], None]]:
    """Returns each stage of the reference on all images of x [B, N, D], given the results of the stages before it. The
    calls run on x, whatever input they get."""
    images = [reference.widen(image) for image in x]
    picks = [reference.s1_basis(image, case.basis, start=case.start, ridge=RIDGE) for image in images]
    weights = [reference.s2_solve(image, p, RIDGE) for image, p in zip(images, picks, strict=True)]
    e_sq = [reference.s3_residual(*given, case.basis) for given in zip(images, picks, weights, strict=True)]
    cuts = [reference.s4_topk(r, p, case.keep, case.layout) for r, p in zip(e_sq, picks, strict=True)]

    def each(stage: Callable[..., object], *columns: list) -> Callable[[object], None]:
        def run(_: object) -> None:
            for given in zip(*columns, strict=True):
                stage(*given)

        return run

    return {
        "s1_basis": each(lambda image: reference.s1_basis(image, case.basis, start=case.start, ridge=RIDGE), images),
        "s2_solve": each(lambda image, p: reference.s2_solve(image, p, RIDGE), images, picks),
        "s3_residual": each(lambda *given: reference.s3_residual(*given, case.basis), images, picks, weights),
        "s4_topk": each(lambda r, p: reference.s4_topk(r, p, case.keep, case.layout), e_sq, picks),
        "s5_merge": each(
            lambda rows, image, cut: reference.s5_merge(rows, image, *cut), list(x.unbind()), images, cuts
        ),
    }


def _of_x(call: Callable[[Tensor], None]) -> Callable[[Pair], None]:
    return lambda pair: call(pair[0])


def sheets(results: Results) -> list[Sheet]:
    """Returns the tables of the kernel, its instruction sets, and the reference."""
    isa = list(dict.fromkeys(n.removeprefix("kernel ") for row in results.rows for n in row.ms if n[:7] == "kernel "))
    kernel = Sheet(
        "Stages of the kernel",
        "Milliseconds, medians. s1-s3: `score`; s5: `merge`; all: `compress`. "
        f"{ceilings.OF_FLOOR} sweeps / s1-s3, product / s5: M "
        "sweeps that only read, and torch.mm, divided by the stage's time. one more: time of one more basis token, and "
        "the rate of its products with every token. s4 and one call: `compress` minus `score` and `merge`. noise: that "
        "of kernel and reference cost. checked: share of rows compared with float64.",
        [
            *("shape", "dtype", "all", "of floor", "s1-s3", "sweeps / s1-s3", "one more", "one more GFLOP/s"),
            *("s5", "product / s5", "s5 GFLOP/s", "s4 and one call", "noise", "checked"),
        ],
        [_line(row, results.rates) for row in results.rows],
    )
    sets = Sheet(
        "Stages by instruction set",
        "Milliseconds, medians; columns without a name are the best set of this machine.",
        ["shape", "dtype", *(f"{stage} {name}".strip() for stage in ("s1-s3", "s5") for name in (*isa, ""))],
        [
            [*_named(row), *(ms(row, f"{stage} {name}".strip()) for stage in ("score", "merge") for name in (*isa, ""))]
            for row in results.rows
        ],
    )
    judges = Sheet(
        "Stages of the reference",
        "Milliseconds, medians, in float64 and one image after another: the specification, not a baseline.",
        ["shape", "dtype", *REFERENCE],
        [[*_named(row), *(ms(row, f"reference {name}") for name in REFERENCE)] for row in results.rows],
    )
    return [kernel, sets, judges]


def _named(row: Row) -> list[str]:
    case = Case.of(row.case)
    return [case.shape, case.dtype_name]


def _line(row: Row, rates: dict[str, float]) -> list[str]:
    case, took = Case.of(row.case), row.ms
    one_more = (took["score"] - took["score one"]) / (case.basis - 1)
    dots = case.B * 2 * case.N * case.D
    product = case.B * 2 * (case.N - case.keep) * case.targets * case.D
    return [
        *(*_named(row), ms(row, "kernel"), ceilings.of_floor([case], took["kernel"], rates)),
        *(ms(row, "score"), f"{took['sweeps'] / took['score']:.2f}", number(one_more), f"{dots / one_more / 1e6:.0f}"),
        *(ms(row, "merge"), f"{took['product'] / took['merge']:.2f}", f"{product / took['merge'] / 1e6:.0f}"),
        *(number(took["kernel"] - took["score"] - took["merge"]), noise(row)),
        f"{row.checked['kernel']:.0%}",
    ]


SUITE = Suite(
    "stages",
    "The stages of the kernel beside their reference costs, on every instruction set, and those of the reference.",
    cases,
    compare,
    sheets,
    rounds=10,
)

if __name__ == "__main__":
    SUITE.main()
