"""The step that times the paper's shapes, from a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.quick.items import ROUNDS, Item, Options, forceable, prepare, usable

if TYPE_CHECKING:  # imported where it is needed: the first steps must run even if torch is broken
    from torch import Tensor

    from benchmarks.lib.cases import Case
    from benchmarks.lib.device import Device

BURST = 0.01  # seconds of calls in a graph, if the ring has as many inputs


def shapes(options: Options) -> list[Case]:
    """Returns the shapes of the paper, the smallest and the largest first; in a rehearsal two tiny ones."""
    import torch

    from benchmarks.lib.cases import PAPER_SHAPES, Case

    if options.rehearse:
        return [Case(2, 24, 16, 14, torch.float16, "inplace"), Case(1, 20, 12, 12, torch.float32, "inplace")]
    first = [(1, 576, 1024, 64), (64, 576, 1024, 64), (1, 4096, 3584, 1229), (1, 16384, 3584, 4915)]
    return [Case(*shape, torch.bfloat16, "inplace") for shape in dict.fromkeys([*first, *PAPER_SHAPES])]


def times(options: Options) -> Iterator[Item]:
    clock = prepare(options)
    from apet_kernels import testing

    have = usable(options)
    for case in shapes(options):
        if "cuda" in have:
            yield Item(f"{case} | plan", functools.partial(_plan, case, options))
            ways = [testing.CudaPath(), *(testing.CudaPath("fused", ctas) for ctas in (4, 8, 16))]
            for tile in (64, 128, 256):
                ways += [testing.CudaPath("cluster", ctas, tile=tile) for ctas in (4, 8, 16)]
                ways += [testing.CudaPath("cooperative", tile=tile)]
            for way in ways:
                call = functools.partial(_cuda, case, way)
                yield Item(f"{case} | cuda {way}", functools.partial(_time, case, clock, options, call, "cuda", way))
        if "triton" in have:
            yield Item(f"{case} | triton", functools.partial(_time, case, clock, options, _triton(case), "triton"))
        if have == ["cuda", "triton"]:
            call = functools.partial(_mix, case)
            yield Item(f"{case} | mix", functools.partial(_time, case, clock, options, call, "mix"))
    for case in shapes(options):  # last: the capture of an eager formulation may fail, and disturb what comes after it
        yield Item(f"{case} | tuned", functools.partial(_time, case, clock, options, _tuned(case), "tuned"))


def _plan(case: Case, options: Options) -> dict[str, Any]:
    import torch

    import apet_kernels

    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype, device=options.device)
    with apet_kernels.use_backend("cuda"):
        plan = apet_kernels.plan(x, **case.op_arguments)
    return {"case": str(case), "plan": dict(plan.details), "why": plan.why}


def _cuda(case: Case, way: Any, x: Tensor) -> tuple[Tensor, ...]:
    from apet_kernels import dispatch, testing

    with testing.use_cuda_path(way):
        return dispatch.run_cuda("compress", x, **case.op_arguments)  # type: ignore[no-any-return]


def _triton(case: Case) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from apet_kernels import dispatch

    return lambda x: dispatch.run_triton("compress", x, **case.op_arguments)


def _mix(case: Case, x: Tensor) -> tuple[Tensor, ...]:
    from benchmarks.lib.mix import compress

    return compress(x, **case.arguments)


def _tuned(case: Case) -> Callable[[Tensor], tuple[Tensor, ...]]:
    from benchmarks.lib import baselines

    return lambda x: baselines.tuned(x, **case.arguments)


@functools.lru_cache(maxsize=1)
def _ring(case: Case, clock: Device) -> list[Tensor]:
    """Returns inputs that are together at least twice the last cache."""
    from benchmarks.lib.cases import tokens
    from benchmarks.lib.compare import ring

    return ring(functools.partial(tokens, case), clock)


def _time(
    case: Case, clock: Device, options: Options, call: Callable[[Tensor], Any], name: str, way: Any = None
) -> dict[str, Any]:
    """Checks a result, then times calls replayed from a graph. Returns microseconds per call."""
    import torch

    from benchmarks.lib.check import judge
    from benchmarks.lib.paths import digest

    ring = _ring(case, clock)
    found: dict[str, Any] = {"case": str(case), "name": name, "checked": None}
    with torch.inference_mode():
        result = forceable(lambda: call(ring[0]))
        forced = way is not None and way.path != "best"
        if name == "cuda":
            found |= {"group": f"{case} cuda", "digest": digest(result), "way": str(way)}
        if not forced:  # the forced paths have the bits of the chosen one, or their line says "differs"
            found["checked"] = judge(case, name, ring[0], result)
        once = clock.seconds(lambda: call(ring[0]))
        count = min(len(ring), max(1, int(BURST / once)))
        replay = clock.graphed(lambda: [call(x) for x in ring[:count]])
        samples = [1e6 * clock.seconds(replay) / count for _ in range(ROUNDS + 1)][1:]
    return found | {"us": sorted(samples)[len(samples) // 2], "samples": samples}
