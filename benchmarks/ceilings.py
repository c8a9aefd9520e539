"""The floor that a time is read against, and the machine's peak.

Work of one call on x [B, N, D], M basis tokens, K kept, T merge targets (K, or K - M for layout="overwrite"):

    flops(s1)   = B * M * 2 N D                 M dot products with every token
    flops(s5)   = B * 2 (N - K) T D             similarity of the dropped tokens with the targets
    bytes(s1)   = M * B N D itemsize            M sweeps over x, one per basis token: each is picked by the sweep before

    floor = time of torch.mm [N-K, D] x [D, T], B times, in x's dtype
          + time of M sweeps over each of the B images, in turn, that do nothing but read

Both terms are measured in the same rounds and on the same buffers as what they are compared with. A kernel may
beat the floor: torch.mm need not be the fastest product on a machine (the header prints its rate on a large matrix).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import BASIS, Case


def flops(case: Case) -> int:
    """s1 and s5; what else there is grows with N, not with N D."""
    return case.B * 2 * case.D * (BASIS * case.N + (case.N - case.keep) * case.targets)


def swept_bytes(case: Case) -> int:
    """Read by s1 in M sweeps."""
    return BASIS * case.B * case.N * case.D * case.itemsize


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
            for _ in range(BASIS):
                rows.sum(1)  # [N]

    return run


def peak_gflops(dtype: torch.dtype, n: int = 2048) -> float:
    """What torch.mm reaches on n x n matrices, the median of five."""
    a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - begin)
    return 2 * n**3 / statistics.median(seconds[1:]) / 1e9
