"""Measures the rates of a GPU, from which floors are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import floors
from benchmarks.lib.device import Device


def measure(device: Device) -> floors.Rates:
    """Measures the ceilings of this machine: the fastest of ten for copies and products, the mean over a chain for
    launches."""
    large = device.type == "cuda"
    source = torch.empty(2**28 if large else 2**16, device=device.type).normal_()
    target = torch.empty_like(source)

    def fastest(call: Callable[[], object]) -> float:
        call()
        return min(device.seconds(call) for _ in range(10))

    def product(n: int, dtype: torch.dtype) -> float:
        a, b = (torch.randn(n, n, device=device.type).to(dtype) for _ in range(2))
        return 2 * n**3 / fastest(lambda: torch.mm(a, b))

    one, links = torch.zeros(1, device=device.type), 500

    def chain() -> None:
        for _ in range(links):
            one.add_(1)

    return floors.Rates(
        name=device.name,
        bandwidth=2 * source.nbytes / fastest(lambda: target.copy_(source)),
        matrix=product(8192 if large else 64, torch.bfloat16),
        float32=product(4096 if large else 64, torch.float32),
        memory=device.memory_bytes,
        cache=device.cache_bytes,
        source="measured: copy_ of 1 GiB, torch.mm of 8192^3 and 4096^3, chains of 500 additions to one number",
        gap=fastest(device.graphed(chain)) / links,
        host=fastest(chain) / links,
    )
