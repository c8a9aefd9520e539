"""For tests and benchmarks of this package: pins the CPU kernels to an instruction set, the CUDA kernels to a path."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from . import available, host
from .registry import registered

__all__ = ["CudaPath", "cpu_isa", "cuda_paths", "use_cpu_isa", "use_cuda_path"]


def cpu_isa() -> list[str]:
    """Returns the instruction sets that the CPU kernels can use on this machine, the best one last.

    Returns:
        Some of "generic", "avx2", "avx512", "avx512_bf16", "amx" and "amx_fp16", or on 64-bit ARM of "generic", "neon"
        and "neon_bf16"; empty without the compiled library.

    Example:
        >>> from apet_kernels import testing
        >>> testing.cpu_isa()[:1] in ([], ["generic"])
        True
    """
    return list(host.module().cpu_isa()) if host.has_module() else []


def use_cpu_isa(name: str | None) -> None:
    """Pins the CPU kernels of this process to one instruction set, as on a machine that has no better one.

    Args:
        name: one of `cpu_isa()`; None: the best one.

    Raises:
        ValueError: if it is not usable here.

    Example:
        >>> from apet_kernels import testing
        >>> for isa in testing.cpu_isa():
        ...     testing.use_cpu_isa(isa)
        ...     # compare results
        >>> testing.use_cpu_isa(None)
    """
    host.module().use_cpu_isa(name)


@dataclass(frozen=True)
class CudaPath:
    """How the CUDA kernels run a call (docs/cuda.md). No choice of these values changes a bit of the result."""

    path: Literal["best", "fused", "cluster", "cooperative"] = "best"  # best: the one with the lowest estimated time
    ctas_per_image: int = 0  # 0: the library chooses
    rows_in_shared_memory: int = -1  # at most, in each CTA; -1: as many as fit
    tile: int = 0  # columns of a tile of s5 as its own launch: 64, 128 or 256; 0: the library chooses
    tile_rows: int = 0  # rows of that tile: 64 or 128 with 64 columns; 0: the library chooses

    def __str__(self) -> str:
        parts = [self.path, str(self.ctas_per_image or "any")]
        parts += [f"resident {self.rows_in_shared_memory}"] if self.rows_in_shared_memory >= 0 else []
        tile = f"{self.tile_rows} x {self.tile}" if self.tile_rows else str(self.tile)
        return " ".join(parts + ([f"tile {tile}"] if self.tile else []))


_TILES = {64: (64, 128), 128: (0,), 256: (0,)}  # columns, and the rows of tiles that have so many
_thread = threading.local()  # .forced: the CudaPath of this thread, as the compiled library has it


@contextlib.contextmanager
def use_cuda_path(path: CudaPath) -> Iterator[None]:
    """Forces a path on the calls of the CUDA kernels in a `with` block, for this thread only; blocks may be nested.

    Such a call, and `apet_kernels.plan` of one, raises RuntimeError if the device cannot run it on this path.

    Raises:
        ValueError: if the CUDA kernels cannot be used here, or there is no such path, group or tile.

    Example:
        >>> import torch
        >>> from apet_kernels import testing
        >>> if "cuda" in apet_kernels.available_backends():
        ...     with testing.use_cuda_path(testing.CudaPath("cluster", ctas_per_image=8)):
        ...         apet_kernels.compress(torch.randn(1, 576, 1024, device="cuda"), keep=64)
    """
    if why := available.why_unavailable("cuda"):
        raise ValueError(f"no CUDA path can be forced: {why}")
    if path.path not in ("best", "fused", "cluster", "cooperative"):
        raise ValueError(f"path='{path.path}' is none of best, fused, cluster, cooperative")
    if path.tile not in (0, *_TILES):
        raise ValueError(f"tile={path.tile} is none of 64, 128, 256, and 0 for the one that is chosen")
    if path.tile_rows not in (0, *_TILES.get(path.tile, ())):
        raise ValueError(f"tile_rows={path.tile_rows} is none of 64, 128 with tile=64, and 0 for any")
    if not 0 <= path.ctas_per_image < 2**31 or not -1 <= path.rows_in_shared_memory < 2**31:
        raise ValueError(
            f"ctas_per_image={path.ctas_per_image} must be at least 0 and "
            f"rows_in_shared_memory={path.rows_in_shared_memory} at least -1"
        )
    before = getattr(_thread, "forced", CudaPath())
    _force(path)
    try:
        yield
    finally:
        _force(before)


def cuda_paths() -> list[CudaPath]:
    """Returns every path with small, middle and large groups, with all rows in shared memory, some and none, and with
    every tile. A device can run only some of them, and only 16-bit tokens have the tiles of 128 x 64 and 128 x 256.

    Example:
        >>> from apet_kernels import testing
        >>> sorted({path.path for path in testing.cuda_paths()})
        ['cluster', 'cooperative', 'fused']
    """
    found = [CudaPath("fused", ctas) for ctas in (2, 4, 8, 16)]
    for resident in (-1, 4, 0):
        for tile in ((columns, rows) for columns, has in _TILES.items() for rows in has):
            found += [CudaPath("cluster", ctas, resident, *tile) for ctas in (1, 4, 8, 16)]
            found += [CudaPath("cooperative", ctas, resident, *tile) for ctas in (1, 16, 0)]
    return found


def _force(forced: CudaPath) -> None:
    # The device of a tensor selects the op. The simulated GPU of this package's tests has its tensors on the CPU.
    like = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    path, *numbers = asdict(forced).values()
    registered._cuda_override(like, path, *numbers)
    _thread.forced = forced
