"""The step that measures, one by one, the figures from which csrc/cuda/plan.cu computes its estimate."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.quick.items import (
    ROUNDS,
    Item,
    NotPossible,
    Options,
    forceable,
    median,
    prepare,
    raise_unusable,
    usable,
)

if TYPE_CHECKING:  # imported where it is needed: the first steps must run even if torch is broken
    from torch import Tensor

    from benchmarks.lib.device import Device


def primitives(options: Options) -> Iterator[Item]:
    clock = prepare(options)
    yield Item("rates", functools.partial(_rates, clock))
    yield Item("L2", functools.partial(_cache_rate, clock, options))
    have = usable(options)
    if "cuda" in have:
        yield from _of_cuda(clock, options)
    else:
        yield Item("steps", raise_unusable)
    if "triton" in have:
        for N, D, keep in ((4096, 3584, 1229), (16384, 3584, 4915)):
            yield Item(f"triton s5 {N}x{D} keep {keep}", functools.partial(_triton_s5_alone, options, N, D, keep))


def _of_cuda(clock: Device, options: Options) -> Iterator[Item]:
    sms = _sms(options)
    for path, ctas in (("cluster", 4), ("cluster", 8), ("cluster", 16), ("cooperative", 16), ("cooperative", sms)):
        yield Item(f"step {path} {ctas}", functools.partial(_step, clock, options, path, ctas))
    for path, ctas in (("cluster", 8), ("cooperative", sms)):
        yield Item(f"picks {path} {ctas}", functools.partial(_picks, clock, options, path, ctas))
        yield Item(f"rounds {path} {ctas}", functools.partial(_rounds, clock, options, path, ctas))
    for path in ("cluster", "cooperative"):
        for resident in (-1, 0):
            what = "resident" if resident else "L2"
            yield Item(f"sweep {path} 4 {what}", functools.partial(_sweep, clock, options, path, 4, resident))
    yield Item(f"sweep cooperative {sms} L2", functools.partial(_sweep, clock, options, "cooperative", sms, 0))
    for N in (576, 4096, 16384):
        yield Item(f"s4 {N}", functools.partial(_s4_alone, options, N))
    for N, D, keep, dtype in (
        *((1024, 3584, 307, "bfloat16"), (4096, 3584, 1229, "bfloat16"), (16384, 3584, 4915, "bfloat16")),
        (4096, 1024, 1024, "float32"),
    ):
        for tile in (64, 128, 256)[: 2 if dtype == "float32" else 3]:
            yield Item(
                f"s5 {N}x{D} keep {keep} {dtype} tile {tile}",
                functools.partial(_s5_alone, options, N, D, keep, dtype, tile),
            )


def _sms(options: Options) -> int:
    import torch

    if options.rehearse:
        return 16
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


def _rates(clock: Device) -> dict[str, Any]:
    from benchmarks.lib import rates

    return {"rates": vars(rates.measure(clock))}


def _cache_rate(clock: Device, options: Options) -> dict[str, Any]:
    """Returns the bytes per second from the L2 cache, by repeated sums of 8 MiB."""
    import torch

    x = torch.ones(2**10 if options.rehearse else 2**21, device=options.device)
    out = torch.empty((), device=options.device)
    passes = 20

    def sums() -> None:
        for _ in range(passes):
            torch.sum(x, 0, out=out)

    replay = clock.graphed(sums)
    return {"l2_bytes_per_s": passes * x.nbytes / median(clock, replay)}


def _us(clock: Device, way: Any, op: str, x: Tensor, *args: Any, **arguments: Any) -> float:
    """Returns the microseconds of an op on a path, from a graph of ten."""
    from apet_kernels import dispatch, testing

    count = 10 if x.is_cuda else 1

    with testing.use_cuda_path(way):

        def calls() -> None:
            for _ in range(count):
                dispatch.run_cuda(op, x, *args, **arguments)

        return 1e6 / count * median(clock, clock.graphed(calls))


def _step(clock: Device, options: Options, path: str, ctas: int) -> dict[str, Any]:
    """Measures a step with hardly any work: t(M) = launch + M * step + M^2 * term, fitted to rows of 8 features."""
    from apet_kernels import testing
    from benchmarks.quick.figures import parabola
    from tests.data import tokens

    basis = (4, 6, 8) if options.rehearse else (4, 16, 32, 48, 64)
    x = tokens(1, 24 if options.rehearse else 4 * max(ctas, 32), 8, kind="normal", seed=ctas).to(options.device)
    way = testing.CudaPath(path, ctas)  # type: ignore[arg-type]
    us = [forceable(lambda m=m: _us(clock, way, "score", x, m)) for m in basis]
    launch, step, term = parabola([float(m) for m in basis], us)
    return {"basis": basis, "us": us, "launch_us": launch, "step_us": step, "term_us": term}


def _picks(clock: Device, options: Options, path: str, ctas: int) -> dict[str, Any]:
    """Measures a pick of a round: t(M) = others + M * pick + M^2 * term, of a compress that keeps the same number for
    each M. These M are picked in rounds, which make as many tiles of products for each."""
    import torch

    from apet_kernels import testing
    from benchmarks.quick.figures import parabola
    from tests.data import tokens

    basis = (66, 70, 74) if options.rehearse else (68, 88, 108, 128)
    N, dtype = (80, torch.float16) if options.rehearse else (1024, torch.bfloat16)
    x = tokens(1, N, 2 * max(basis), dtype=dtype, kind="normal", seed=ctas).to(options.device)
    way = testing.CudaPath(path, ctas)  # type: ignore[arg-type]
    us = [forceable(lambda m=m: _us(clock, way, "compress", x, max(basis), m, select="qr")) for m in basis]
    return {"basis": basis, "us": us, "pick_us": parabola([float(m) for m in basis], us)[1]}


def _rounds(clock: Device, options: Options, path: str, ctas: int) -> dict[str, Any]:
    """Measures a basis in rounds and a medoid step, beside their estimates."""
    import torch

    import apet_kernels
    from apet_kernels import testing
    from tests.data import tokens

    N, D, keep = (40, 24, 20) if options.rehearse else (576, 1024, 64)
    dtype = torch.float16 if options.rehearse else torch.bfloat16
    x = tokens(1, N, D, dtype=dtype, kind="clustered", seed=N).to(options.device)
    way = testing.CudaPath(path, ctas)  # type: ignore[arg-type]
    found: dict[str, Any] = {}
    for refine in (0, 2):
        arguments = {"refine": refine}
        us = forceable(lambda arguments=arguments: _us(clock, way, "compress", x, keep, **arguments))
        with testing.use_cuda_path(way), apet_kernels.use_backend("cuda"):
            estimated = apet_kernels.plan(x, keep, **arguments).details["estimated_us"]
        found |= {f"refine_{refine}_us": us, f"refine_{refine}_estimated_us": estimated}
    return found


def _sweep(clock: Device, options: Options, path: str, ctas: int, resident: int) -> dict[str, Any]:
    """Measures the time that a step takes for every row of 1024 bfloat16 features, from shared memory or from L2."""
    import torch

    from apet_kernels import testing
    from tests.data import tokens

    rows, D, basis = (8, 16, (4, 6)) if options.rehearse else (64, 1024, (4, 20))
    way = testing.CudaPath(path, ctas, resident)  # type: ignore[arg-type]
    dtype = torch.float16 if options.rehearse else torch.bfloat16

    def step_us(rows: int) -> float:
        x = tokens(1, rows * ctas, D, dtype=dtype, kind="normal", seed=1).to(options.device)
        few, many = (forceable(lambda m=m: _us(clock, way, "score", x, m)) for m in basis)
        return (many - few) / (basis[1] - basis[0])

    small, large = step_us(rows // 4), step_us(rows)
    return {"rows": rows - rows // 4, "dim": D, "itemsize": 2, "step_us": large - small, "ctas": ctas}


def _kernels_us(options: Options, call: Callable[[], Any]) -> dict[str, float]:
    """Returns the microseconds of every kernel of a call, by torch's profiler."""
    if options.rehearse:
        call()
        return {"s1_s4_group": 20.0, "s5_merge": 10.0, "s5_assign": 10.0}
    import torch
    from torch.profiler import ProfilerActivity, profile

    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(ROUNDS):
            call()
        torch.cuda.synchronize()
    us: dict[str, float] = {}
    for event in found.key_averages():
        if name := re.search(r"s1_s4_group|s1_s5_cluster|s5_merge|s5_assign", event.key):
            us[name[0]] = us.get(name[0], 0.0) + event.device_time_total / ROUNDS
    if not us:
        raise NotPossible("torch's profiler sees no kernel here")
    return us


def _s4_alone(options: Options, N: int) -> dict[str, Any]:
    """Measures s4 as the first launch of compress minus that of score."""
    import torch

    import apet_kernels
    from apet_kernels import testing
    from tests.data import tokens

    N = N // 16 if options.rehearse else N
    x = tokens(1, N, 64, dtype=torch.float16, kind="clustered", seed=N).to(options.device)
    path = "cooperative"
    with testing.use_cuda_path(testing.CudaPath(path, 8 if options.rehearse else 0)):
        whole = _kernels_us(options, lambda: apet_kernels.compress(x, N // 9, 4, select="fps", backend="cuda"))
        part = _kernels_us(options, lambda: apet_kernels.score(x, 4, backend="cuda"))
    return {"tokens": N, "us": whole["s1_s4_group"] - part["s1_s4_group"]}


def _s5_alone(options: Options, N: int, D: int, keep: int, dtype: str, tile: int) -> dict[str, Any]:
    import torch

    import apet_kernels
    from apet_kernels import testing
    from tests.data import tokens

    if options.rehearse:
        N, D, keep, dtype = 40, 24, 12, "float16"
    x = tokens(1, N, D, kind="clustered", seed=N).to(getattr(torch, dtype)).to(options.device)
    with testing.use_cuda_path(testing.CudaPath("cooperative", 4 if options.rehearse else 0, tile=tile)):
        us = forceable(
            lambda: _kernels_us(options, lambda: apet_kernels.compress(x, keep, 4, select="fps", backend="cuda"))
        )
    return {"flops": 2 * (N - keep) * keep * D, "us": us["s5_merge"], "dtype": dtype, "tile": tile}


def _triton_s5_alone(options: Options, N: int, D: int, keep: int) -> dict[str, Any]:
    """Measures s5_assign of 16-bit tokens, with the operations of the multiprocessor that has most of its programs."""
    import torch

    import apet_kernels
    from apet_kernels.triton_kernels import configs
    from apet_kernels.triton_kernels.estimate import assign_work
    from tests.data import tokens

    if options.rehearse:
        N, D, keep = 40, 24, 12
    dtype = torch.float16 if options.rehearse else torch.bfloat16
    x = tokens(1, N, D, kind="clustered", seed=N).to(dtype).to(options.device)
    us = _kernels_us(options, lambda: apet_kernels.compress(x, keep, 4, select="fps", backend="triton"))
    tiles = configs.tiles(configs.device_class(x.device), D, x.element_size())
    programs, _, each = assign_work(tiles, 1, N, keep)
    flops = 2 * tiles.assign_r * tiles.assign_t * D * each * -(-programs // _sms(options))
    return {"flops_per_sm": flops, "us": us["s5_assign"]}
