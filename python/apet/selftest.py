"""The self-test of `apet doctor`: runs every usable backend on small inputs and compares it with the float64 reference.

The inputs are seeded, and chosen so that no pick, cut or merge target is near a tie (relative margins of at least 4e-5,
hundreds of roundings), so kept sets must be equal.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

import apet_kernels
from apet_kernels import reference, testing
from apet_kernels.options import PAPER


@dataclass(frozen=True)
class Case:
    """One call of compress. shape: [B, N, D]."""

    name: str
    shape: tuple[int, int, int]
    dtype: torch.dtype
    keep: int
    basis: int | None = PAPER["basis"]  # None: as many as are kept, for which `score` has no counterpart
    options: dict[str, Any] = field(default_factory=dict)
    prepare: Callable[[torch.Tensor], torch.Tensor] = lambda x: x

    @property
    def score_options(self) -> dict[str, Any]:
        """The options that `score` takes."""
        return {k: v for k, v in self.options.items() if k in ("select", "start")}

    def input(self) -> torch.Tensor:
        """Returns x [B, N, D], the same on every machine."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(sum(self.shape)))
        return self.prepare(x).to(self.dtype)


def _strided(x: torch.Tensor) -> torch.Tensor:
    """Returns the same values with gaps between rows and images."""
    room = x.new_zeros(x.shape[0], x.shape[1] + 3, x.shape[2] + 5)
    room[:, : x.shape[1], : x.shape[2]] = x
    return room[:, : x.shape[1], : x.shape[2]]


def _spoiled(x: torch.Tensor) -> torch.Tensor:
    """Makes one token of image 0 infinite, which must not affect image 1."""
    x = x.clone()
    x[0, 7, 3] = float("inf")
    return x


CASES = (
    Case("float32", (2, 96, 64), torch.float32, 24),
    Case("float32, rows apart, qr", (2, 61, 80), torch.float32, 20, options={"select": "qr"}, prepare=_strided),
    Case("float32, keep below basis", (1, 50, 40), torch.float32, 12, basis=16, options={"start": 5}),
    Case("float32, nothing to drop", (1, 33, 17), torch.float32, 33),
    Case("float32, an infinite token", (2, 40, 48), torch.float32, 15, basis=5, prepare=_spoiled),
    Case("bfloat16, overwrite", (1, 257, 72), torch.bfloat16, 40, options={"layout": "overwrite"}),
    Case("bfloat16, blend", (2, 64, 33), torch.bfloat16, 20, options={"layout": "overwrite", "blend": 0.5}),
    Case("float16, append", (2, 70, 56), torch.float16, 16, options={"layout": "append"}),
    Case("float16, squares overflow", (1, 48, 128), torch.float16, 20, prepare=lambda x: x * 3000),
    Case("float32, the default rule", (2, 90, 64), torch.float32, 40, basis=None),
    Case("float32, the default rule, few", (1, 60, 48), torch.float32, 12, basis=None),
    Case("bfloat16, the default rule", (1, 151, 160), torch.bfloat16, 64, basis=None),
    Case("float16, a medoid step", (2, 70, 56), torch.float16, 24, basis=None, options={"refine": 1}),
)


@dataclass
class Outcome:
    """The results of one backend (with one instruction set). Ratios are to the allowed error: above 1 is wrong."""

    backend: str
    isa: str | None
    cases: int = 0  # number of cases run
    residual: float = 0.0  # worst |e^2 - reference| / (4 M u ||x||^2)
    tokens: float = 0.0  # worst token error / allowed error
    faults: list[str] = field(default_factory=list)  # one message each

    @property
    def right(self) -> bool:
        return not self.faults


def run(backend: str, isa: str | None = None, graphs: bool = True) -> Outcome:
    """Tests a backend, with the CPU kernels pinned to the instruction set `isa` if one is given.

    graphs: whether a GPU's calls are also replayed from a graph, which torch cannot capture while its caching allocator
    is off. Interpreted kernels are not tested with bfloat16, because Triton's interpreter computes on its bits.
    """
    outcome = Outcome(backend, isa)
    if isa is not None:
        testing.use_cpu_isa(isa)
    try:
        for number, case in enumerate(CASES):
            if interpreted(backend) and case.dtype is torch.bfloat16:
                continue
            outcome.cases += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", RuntimeWarning)  # numpy warns of infinities in the interpreter
                    _judge(case, _truth(number), outcome, graphs)
            except Exception as error:  # an error of a broken backend is a result of the test, and must not end it
                outcome.faults.append(f"{case.name}: {type(error).__name__}: {str(error).strip().splitlines()[0]}")
    finally:
        if isa is not None:
            testing.use_cpu_isa(None)
    return outcome


def interpreted(backend: str) -> bool:
    """Returns whether Triton's interpreter runs this backend's kernels, on CPU tensors."""
    return backend == "triton" and not torch.cuda.is_available()


class Truth(NamedTuple):
    """The results of the float64 reference for a case."""

    scores: tuple[torch.Tensor, torch.Tensor] | None  # residual [B, N] float64 and basis [B, M]
    tokens: torch.Tensor  # [B, R, D] float64
    kept: torch.Tensor  # [B, R]


@functools.cache
def _truth(number: int) -> Truth:
    """Returns the reference's results for CASES[number], computed once for all backends."""
    case = CASES[number]
    x = case.input()
    scores = None
    if case.basis is not None:
        scores = reference.score(x, case.basis, **case.score_options, out_dtype=torch.float64)
    return Truth(scores, *reference.compress(x, case.keep, case.basis, **case.options, out_dtype=torch.float64))


def _judge(case: Case, truth: Truth, outcome: Outcome, graphs: bool) -> None:
    """Runs one case and adds its errors to `outcome`."""
    on_gpu = outcome.backend in ("triton", "cuda") and torch.cuda.is_available()
    x = case.input()  # [B, N, D]
    there = x.to("cuda") if on_gpu else x
    if truth.scores is not None and case.basis is not None:
        residual, basis = apet_kernels.score(there, case.basis, **case.score_options, backend=outcome.backend)
        if not torch.equal(basis.cpu(), truth.scores[1]):
            outcome.faults.append(f"{case.name}: the basis is not the reference's")
        square = x.double().square().sum(-1)  # [B, N]
        ratio = _ratio(residual.cpu().double(), truth.scores[0], 4 * case.basis * reference.U * square)
        outcome.residual = max(outcome.residual, ratio)
        if not ratio <= 1:
            outcome.faults.append(f"{case.name}: the residual is {ratio:.3g} times its error bound away")

    tokens, kept = _compress(case, there, outcome.backend)
    if not torch.equal(kept.cpu(), truth.kept):
        outcome.faults.append(f"{case.name}: the kept tokens are not the reference's")
        return
    # Twice the error of rounding the true value to the dtype, plus the error of a float32 sum.
    largest = x.double().masked_fill(~x.isfinite(), 0).abs().amax()
    allowed = torch.finfo(x.dtype).eps * truth.tokens.abs() + 16 * reference.U * largest
    ratio = _ratio(tokens.cpu().double(), truth.tokens, allowed)
    outcome.tokens = max(outcome.tokens, ratio)
    if not ratio <= 1:
        outcome.faults.append(f"{case.name}: a token is {ratio:.3g} times the allowed error away")
    call = functools.partial(_compress, case, there, outcome.backend)
    if on_gpu and graphs and not torch.equal(_replayed(call), tokens):
        outcome.faults.append(f"{case.name}: replayed from a graph, the call gives other bits")
    alone, _ = apet_kernels.compress(there[-1:], case.keep, case.basis, **case.options, backend=outcome.backend)
    if not torch.equal(alone[0], tokens[-1]):
        outcome.faults.append(f"{case.name}: the last image alone gives other bits than in its batch")


def _compress(case: Case, x: torch.Tensor, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return apet_kernels.compress(x, case.keep, case.basis, **case.options, backend=backend)


def _replayed(call: Callable[[], tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Returns the tokens of a call that is captured in a graph and replayed. It may be refused where another is not:
    drivers differ in the edges that a graph has between dependent launches."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens, *_ = call()
    tokens.zero_()
    graph.replay()
    return tokens


def _ratio(found: torch.Tensor, true: torch.Tensor, allowed: torch.Tensor) -> float:
    """Returns the largest |found - true| / allowed; infinite if one of them is not finite and the other is not the
    same."""
    same = (found == true) | (found.isnan() & true.isnan())
    ratio = torch.where(same, 0.0, (found - true).abs() / allowed)
    return float(ratio.nan_to_num(nan=float("inf")).max())
