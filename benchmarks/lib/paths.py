"""The calls for which every CUDA path must return the same bits: every op and layout, a basis in rounds, each dtype,
and rows with and without whole 16-byte words. tests/test_gpu_paths.py and benchmarks/gpu_quick.py force the paths of
`testing.cuda_paths`."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import apet_kernels
from apet_kernels import ops, testing
from tests import judge
from tests.data import tokens

OPS = ("inplace", "overwrite", "append", "varlen", "score", "merge", "rounds")


@dataclass(frozen=True)
class Shape:
    """The sizes of a call: x [B, N, D]; K kept; M basis tokens."""

    B: int
    N: int
    D: int
    keep: int
    basis: int


REAL = (Shape(3, 576, 1024, 64, 10), Shape(2, 300, 131, 100, 12))
TINY = (Shape(2, 37, 40, 14, 4), Shape(1, 30, 13, 17, 5))


@functools.lru_cache(maxsize=2 * len(ops.DTYPES))  # all that calls() needs: each is in hundreds of calls
def _tokens(shape: Shape, dtype: torch.dtype) -> Tensor:
    return tokens(shape.B, shape.N, shape.D, dtype=dtype, kind="clustered", seed=shape.N)


@dataclass(frozen=True)
class Call:
    """One op, or `compress` in one layout, on tokens of one dtype."""

    op: str  # one of OPS; "rounds": of a basis as large as keep, and with medoid steps
    dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        s = self.shape
        return f"{s.B}x{s.N}x{s.D} keep {s.keep} {str(self.dtype).removeprefix('torch.')} {self.op}"

    def tokens(self) -> Tensor:
        """Returns x [B, N, D] on the CPU. It is shared and must not be changed."""
        return _tokens(self.shape, self.dtype)

    def run(self, device: str, backend: str = "cuda") -> tuple[Tensor, ...]:
        """Runs the call by one backend on a device; returns the results."""
        s, x = self.shape, self.tokens().to(device)
        if self.op in ops.LAYOUTS:
            return tuple(apet_kernels.compress(x, s.keep, s.basis, select="fps", layout=self.op, backend=backend))
        if self.op == "rounds":
            return tuple(apet_kernels.compress(x, s.keep, refine=2, backend=backend))
        if self.op == "score":
            return tuple(apet_kernels.score(x, s.basis, backend=backend))
        if self.op == "merge":
            rows = torch.randint(s.N, (s.B, s.keep), generator=torch.Generator().manual_seed(1)).to(device)
            return (apet_kernels.merge(x, rows, targets=rows % 3 > 0, backend=backend),)
        lengths = [s.N // 3, 1, s.N - s.N // 3 - 1]
        keeps = [s.keep // 3, 1, s.keep // 2]
        packed = x.flatten(0, 1)[: s.N]
        return tuple(
            apet_kernels.compress_packed(
                packed, lengths, keeps, s.basis, select="fps", layout="append", backend=backend
            )
        )

    def compared(self, device: str) -> None:
        """Compares the results of a layout with float64 (tests/judge.py). Raises AssertionError, which begins with the
        fault."""
        functions = carried(device, "cuda")
        judge.check(functions, self.tokens(), self.shape.keep, self.shape.basis, layout=self.op)


def carried(device: str, backend: str) -> SimpleNamespace:
    """The attributes of a backend that judge.check needs, for tensors on the CPU."""

    def over(function: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, *args, **options: tuple(
            t.cpu() for t in function(x.to(device), *args, **options, backend=backend)
        )

    return SimpleNamespace(score=over(apet_kernels.score), compress=over(apet_kernels.compress))


def calls(tiny: bool = False) -> list[Call]:
    """Returns all calls; tiny: those for a simulated GPU."""
    return [Call(op, dtype, shape) for shape in (TINY if tiny else REAL) for dtype in ops.DTYPES for op in OPS]


def forced(call: Call, way: testing.CudaPath, device: str) -> tuple[Tensor, ...] | None:
    """Returns the results on one path; None if the device cannot run the call on it."""
    with testing.use_cuda_path(way):
        try:
            return call.run(device)
        except RuntimeError as error:
            if "cannot run here" in str(error):
                return None
            raise


def digest(results: tuple[Tensor, ...]) -> str:
    """Returns a digest of dtypes, shapes and bytes."""
    found = hashlib.sha256()
    for t in results:
        found.update(f"{t.dtype} {tuple(t.shape)}".encode())
        found.update(t.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
