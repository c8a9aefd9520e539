"""The bounds that times are compared with: the floor, the reference cost, and the rates of the machine.

The floor is a lower bound at the rates that the run has measured before its cases; where the machine is faster later, a
time may be below it. A good implementation should approach or beat the reference cost.

Work of one call on x [B, N, D], M basis tokens, K kept, T merge targets (K, or K - M for layout="overwrite"):

    flops(s1)   = B * M * 2 N D                 M dot products with every token
    flops(s5)   = B * 2 (N - K) T D             similarity of the dropped tokens with the targets
    bytes(s1)   = M * B N D itemsize            M sweeps over x, each for the basis token that the one before has
                                                picked; the kernel skips most of these reads

    floor of one image = X / bandwidth + max(second / bandwidth, flops(s5) / peak)

X = N D itemsize is read once before any token can be chosen. s5 then needs the tokens again: `second` is the part of X
that exceeds the last-level cache; reading it may overlap the product. `bandwidth` is the fastest of copying and
reading, `peak` the fastest product in any dtype and on any unit, by torch.mm or the kernel. With several images, the
first pass over one may overlap the product of another:

    floor = max(all bytes / bandwidth, smallest X / bandwidth + all flops(s5) / peak)

The floor is computed from rates that the same run has measured.

    reference cost = time of torch.mm [N-K, D] x [D, T], B times, in x's dtype
                   + time of M sweeps over each of the B images, in turn, that do nothing but read

Both terms are measured in the same rounds and on the same buffers as the implementations that they are compared with.
Each is a call of its own and reads x from memory, while the kernel's product reads an x that its first pass has left in
the cache: where reading x once takes a tenth of the reference cost, the kernel has that advantage. The kernel may beat
the reference cost, since it skips reads, and torch.mm may not be the fastest product on a machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

import apet_kernels  # noqa: F401, registers the op
from benchmarks.lib.cases import Case
from benchmarks.lib.device import Cpu
from benchmarks.lib.machine import last_level_cache

OF_FLOOR = (
    "of floor: the share of the kernel's time that the lower bound explains (benchmarks/lib/ceilings.py; - where its "
    "rates were not measured)."
)


def flops(case: Case) -> int:
    """Returns the operations of s1 and s5; other work grows with N, not with N D."""
    return case.B * 2 * case.D * (case.basis * case.N + (case.N - case.keep) * case.targets)


def swept_bytes(case: Case) -> int:
    """Returns the bytes read by M sweeps of s1."""
    return case.basis * case.B * case.N * case.D * case.itemsize


def floor_ms(images: Sequence[Case], rates: Mapping[str, float]) -> float | None:
    """Returns the floor of one call on all of these images; None if the run did not measure its rates."""
    if not {"peak GFLOP/s", "cache MiB", "read GB/s", "copy GB/s"} <= rates.keys():
        return None
    bandwidth, cache = (
        1e6 * max(rates["copy GB/s"], rates["read GB/s"]),
        2**20 * rates["cache MiB"],
    )  # bytes in a ms, bytes
    once = [case.N * case.D * case.itemsize for case in images]
    read = sum(case.B * (x + max(0.0, x - cache)) for case, x in zip(images, once, strict=True))
    product = sum(case.B * 2 * (case.N - case.keep) * case.targets * case.D for case in images)
    return max(read / bandwidth, min(once) / bandwidth + product / (1e6 * rates["peak GFLOP/s"]))


def of_floor(images: Sequence[Case], kernel_ms: float, rates: Mapping[str, float]) -> str:
    """The share of the kernel's time that the floor explains, for a table."""
    floor = floor_ms(images, rates)
    return "-" if floor is None else f"{floor / kernel_ms:.0%}"


def reference_cost(case: Case) -> dict[str, Callable[[Tensor], None]]:
    """Returns both terms of the reference cost, by name."""
    return {"product": product(case), "sweeps": sweeps(case)}


def product(case: Case) -> Callable[[Tensor], None]:
    """Returns the matrix product of s5 alone: any N-K tokens with any T."""

    def run(x: Tensor) -> None:
        for image in x:  # [N, D]
            torch.mm(image[: case.N - case.keep], image[-case.targets :].T)  # [N-K, T]

    return run


def sweeps(case: Case) -> Callable[[Tensor], None]:
    """Returns the reads of s1 alone, at the speed of torch's fastest: row sums of the same bytes viewed as float32."""

    def run(x: Tensor) -> None:
        for image in x:
            rows = image.view(torch.float32)  # [N, D * itemsize / 4]
            for _ in range(case.basis):
                rows.sum(1)  # [N]

    return run


def copy_gbytes(size: int = 2**28) -> float:
    """Returns the GB/s (1e9) that copying `size` bytes reads and writes, the median of five."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source)) / 1e9


def read_gbytes(size: int = 2**28) -> float:
    """Returns the GB/s (1e9) that row sums of `size` bytes read, the median of five calls on the same memory: a size
    beyond the last cache measures memory, a small one the cache."""
    rows = torch.ones(size // 4096, 1024)
    return size / _seconds(lambda: rows.sum(1)) / 1e9


def call_us() -> float:
    """Returns the microseconds of a call of the op with hardly any work: 16 tokens of 16 features."""
    x = torch.randn(1, 16, 16)

    def calls() -> None:
        for _ in range(100):
            torch.ops.apet.compress(x, 8)

    with torch.inference_mode():
        return 1e4 * _seconds(calls)


def measure() -> dict[str, float]:
    """Measures all rates, by name and unit."""
    large = {dtype: _product_seconds(dtype, 2048) for dtype in (torch.float32, torch.bfloat16)}
    fastest = [_gflops(min(seconds), 2048) for seconds in large.values()]
    fastest += [_gflops(min(_product_seconds(dtype, 1024)), 1024) for dtype in large]  # the operands fit the caches
    return {
        "float32 GFLOP/s": _gflops(statistics.median(large[torch.float32]), 2048),
        "bfloat16 GFLOP/s": _gflops(statistics.median(large[torch.bfloat16]), 2048),
        "peak GFLOP/s": max(*fastest, *map(merge_gflops, large)),
        "copy GB/s": copy_gbytes(),
        "read GB/s": read_gbytes(),
        "cached GB/s": read_gbytes(2**22),
        "cache MiB": last_level_cache() / 2**20,  # results are read on other machines
        "call us": call_us(),
    }


def peak_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """Returns the GFLOP/s of torch.mm on n x n matrices, the median of five."""
    return _gflops(statistics.median(_product_seconds(dtype, n)), n)


def merge_gflops(dtype: torch.dtype) -> float:
    """Returns the GFLOP/s of the kernel's own s5, its other work included: its product may be faster than
    torch.mm's."""
    N, K, D = 4096, 2048, 1024
    x, kept = torch.randn(1, N, D).to(dtype), torch.arange(0, N, N // K)[None]
    with torch.inference_mode():
        return 2 * (N - K) * K * D / min(_five(lambda: torch.ops.apet.merge(x, kept))) / 1e9


def _gflops(seconds: float, n: int) -> float:
    return 2 * n**3 / seconds / 1e9


def _product_seconds(dtype: torch.dtype, n: int) -> list[float]:
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return _five(lambda: torch.mm(a, b))


def _seconds(call: Callable[[], object]) -> float:
    """Returns the median seconds of five calls."""
    return statistics.median(_five(call))


def _five(call: Callable[[], object]) -> list[float]:
    """Returns the seconds of five calls, after a first one that warms up."""
    clock = Cpu()
    return [clock.seconds(call) for _ in range(6)][1:]
