"""Runs every CUDA kernel on small inputs, for compute-sanitizer, whose tools make a kernel many times slower.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitized

It runs the self-test of `apet doctor`, then ragged images and given rows. It exits with 1 if a result is wrong.
"""

from __future__ import annotations

import sys

import torch
from apet import selftest

import apet_kernels
from apet_kernels import ops

LENGTHS, KEEPS, D = [33, 1, 70, 12], [9, 1, 30, 12], 40


def ragged_and_given(dtype: torch.dtype) -> list[str]:
    """Runs compress_varlen in every layout, and merge. Returns a message for each fault."""
    faults = []
    x = torch.randn(sum(LENGTHS), D, generator=torch.Generator().manual_seed(1)).to(dtype)
    for layout in ops.LAYOUTS:
        options = {"basis": 4, "layout": layout}
        _, at = apet_kernels.compress_packed(x.cuda(), LENGTHS, KEEPS, **options, backend="cuda")
        _, wanted = apet_kernels.compress_packed(x, LENGTHS, KEEPS, **options, backend="reference")
        if not torch.equal(at.cpu(), wanted):
            faults.append(f"compress_varlen of {dtype}, layout='{layout}', keeps other tokens than the reference")
    images, rows = x[:60].view(2, 30, D), torch.tensor([[3, 0, 3, 29, 17], [1, 2, 4, 8, 16]])
    for targets in (None, rows % 2 == 0):
        given = None if targets is None else targets.cuda()
        got = apet_kernels.merge(images.cuda(), rows.cuda(), targets=given, backend="cuda")
        wanted = apet_kernels.merge(images, rows, targets=targets, backend="reference")
        if not torch.allclose(got.cpu().double(), wanted.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5):
            faults.append(f"merge of {dtype} gives other rows than the reference")
    return faults


def main() -> None:
    """Runs everything and prints the faults."""
    if why := apet_kernels.why_unavailable("cuda"):
        print(f"the CUDA kernels cannot run here: {why}", file=sys.stderr)
        sys.exit(2)
    faults = selftest.run("cuda").faults
    for dtype in ops.DTYPES:
        faults += ragged_and_given(dtype)
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
