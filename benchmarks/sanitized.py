"""Runs every CUDA kernel on small inputs, for compute-sanitizer, whose tools make a kernel many times slower.

    compute-sanitizer --tool racecheck python -m benchmarks.sanitized

It runs the self-test of `apet doctor`; then, forced on each path and tile (PATHS), ragged images, given rows, and a
basis in rounds with a medoid step. It prints each part before it runs, so that a run that is cut off shows how far it
came, and exits with 1 if a result is wrong.
"""

from __future__ import annotations

import sys

import torch
from apet import selftest

import apet_kernels
from apet_kernels import choice, ops, testing
from apet_kernels.testing import CudaPath

LENGTHS, KEEPS, D = [33, 1, 70, 12], [9, 1, 30, 12], 40
# Every kernel with every tile, by columns and rows. A device without clusters runs the last four, and float32 has no
# tiles of 128 x 64 and 128 x 256.
TILES = ((64, 64), (64, 128), (128, 0), (256, 0))
PATHS = (
    CudaPath("fused", 4),
    *(CudaPath(path, 4, tile=tile, tile_rows=rows) for path in ("cluster", "cooperative") for tile, rows in TILES),
)


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


def rounds_and_medoids(dtype: torch.dtype) -> list[str]:
    """Runs compress with a basis in rounds, of more than 16 tokens, and a medoid step. Returns a message for each
    fault."""
    x = torch.randn(2, 61, D, generator=torch.Generator().manual_seed(2)).to(dtype)
    options = {"basis": None, "select": "qr", "refine": 1}
    _, at = apet_kernels.compress(x.cuda(), 24, **options, backend="cuda")
    _, wanted = apet_kernels.compress(x, 24, **options, backend="reference")
    same = torch.equal(at.cpu(), wanted)
    return [] if same else [f"compress of {dtype} in rounds, with a medoid step, keeps other tokens than the reference"]


def forced(way: CudaPath, dtype: torch.dtype) -> list[str]:
    """Runs all calls on one path. Returns a message for each fault; none where the device cannot run the path."""
    faults = []
    with testing.use_cuda_path(way):
        for part in (ragged_and_given, rounds_and_medoids):
            try:
                faults += [f"{way}: {fault}" for fault in part(dtype)]
            except RuntimeError as error:
                if choice.NO_PATH not in str(error):
                    raise
    return faults


def main() -> None:
    """Runs everything and prints the faults."""
    if why := apet_kernels.why_unavailable("cuda"):
        print(f"the CUDA kernels cannot run here: {why}", file=sys.stderr)
        sys.exit(2)
    print("self-test", flush=True)
    faults = selftest.run("cuda", graphs=False).faults
    for way in PATHS:
        for dtype in ops.DTYPES:
            print(way, dtype, flush=True)
            faults += forced(way, dtype)
    print(*faults, f"{len(faults)} faults", sep="\n")
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
