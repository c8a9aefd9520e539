"""Selection by the CUDA kernels and merging by Triton's, which benchmarks/gpu_quick.py measures. The dispatcher does
not combine them: docs/gpu.md, "CUDA or Triton"."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from apet_kernels import dispatch
from benchmarks.lib.cases import SELECT


def compress(x: Tensor, keep: int, basis: int, layout: str, start: int, ridge: float) -> tuple[Tensor, ...]:
    """Returns tokens [B, K, D] and indices [B, K] as `torch.ops.apet.compress` does: one launch of CUDA, and those of
    Triton without the sweeps."""
    from apet_kernels.triton_kernels import launch

    call = launch.compress(x, keep, basis, layout=layout, start=start, ridge=ridge, select=SELECT)
    e_sq, picks = dispatch.run_cuda("score", x, basis, start=start, ridge=ridge, select=SELECT)  # [B, N], [B, M]
    found = {"e_sq": e_sq.flatten(), "basis": picks}
    for launched in call.launches:
        if launched.kernel.fn.__name__ != "s1_s3_sweep":
            args = {name: found.get(name, value) for name, value in launched.args.items()}
            dataclasses.replace(launched, args=args).run()
    return call.results
