"""The floor that a time is read against, and the machine's peak.

Work of one call on x [B, N, D], M basis tokens, K kept, T merge targets (K, or K - M for layout="overwrite"):

    flops(s1)   = B * M * 2 N D                 M dot products with every token
    flops(s5)   = B * 2 (N - K) T D             similarity of the dropped tokens with the targets
    bytes(s1)   = M * B N D itemsize            M sweeps over x, each for the basis token that the one before has
                                                picked: the plain form of s1, of which the kernel leaves most out

    floor = time of torch.mm [N-K, D] x [D, T], B times, in x's dtype
          + time of M sweeps over each of the B images, in turn, that do nothing but read

Both terms are measured in the same rounds and on the same buffers as what they are compared with. A kernel may
beat the floor: it need not sweep, and torch.mm need not be the fastest product on a machine (the header prints its
rate on a large matrix).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.machine import last_level_cache


def flops(case: Case) -> int:
    """s1 and s5; what else there is grows with N, not with N D."""
    return case.B * 2 * case.D * (case.basis * case.N + (case.N - case.keep) * case.targets)


def swept_bytes(case: Case) -> int:
    """Read by M sweeps of s1."""
    return case.basis * case.B * case.N * case.D * case.itemsize


def floor(case: Case) -> dict[str, Callable[[Tensor], None]]:
    """Both terms, by name."""
    return {"product": product(case), "sweeps": sweeps(case)}


def product(case: Case) -> Callable[[Tensor], None]:
    """The matrix product of s5 alone: any N-K tokens with any T."""

    def run(x: Tensor) -> None:
        for image in x:  # [N, D]
            torch.mm(image[: case.N - case.keep], image[-case.targets :].T)  # [N-K, T]

    return run


def sweeps(case: Case) -> Callable[[Tensor], None]:
    """The reads of s1 alone, at the speed of torch's fastest: row sums of the same bytes seen as float32."""

    def run(x: Tensor) -> None:
        for image in x:
            rows = image.view(torch.float32)  # [N, D * itemsize / 4]
            for _ in range(case.basis):
                rows.sum(1)  # [N]

    return run


def copy_gbytes(size: int = 2**28) -> float:
    """Bytes per second, in 1e9, that copying `size` bytes reads and writes, the median of five."""
    source = torch.ones(size, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source)) / 1e9


def read_gbytes(size: int = 2**28) -> float:
    """Bytes per second, in 1e9, that row sums of `size` bytes read, the median of five; again and again, so that few
    bytes come from a cache."""
    rows = torch.ones(size // 4096, 1024)
    return size / _seconds(lambda: rows.sum(1)) / 1e9


def call_us() -> float:
    """Microseconds of a call of the op that has next to nothing to do: 16 tokens of 16 features."""
    x = torch.randn(1, 16, 16)

    def calls() -> None:
        for _ in range(100):
            torch.ops.apet.compress(x, 8)

    with torch.inference_mode():
        return 1e4 * _seconds(calls)


def measure() -> dict[str, float]:
    """All of them, by name and unit."""
    return {
        "float32 GFLOP/s": peak_gflops(torch.float32),
        "bfloat16 GFLOP/s": peak_gflops(torch.bfloat16),
        "copy GB/s": copy_gbytes(),
        "read GB/s": read_gbytes(),
        "cached GB/s": read_gbytes(2**22),
        "call us": call_us(),
        "cache MiB": last_level_cache() / 2**20,  # results are read on other machines
    }


def peak_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """What torch.mm reaches on n x n matrices, the median of five."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    return 2 * n**3 / _seconds(lambda: torch.mm(a, b)) / 1e9


def _seconds(call: Callable[[], object]) -> float:
    """The median of five, after one."""
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])
