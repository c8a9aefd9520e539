"""Memory of one call beyond its input: the bound, and what a fresh process really grew by.

bound = outputs + workspace
outputs = B K (D itemsize + 8)                 tokens and int64 indices
workspace = I (4 N (M + 1) + D min(4 K, (4 - itemsize) K + 4 P))
                                               for each of the I images in flight, min(B, threads) at most: float32
                                               products of s1 with every token, one norm each, and the merge targets
                                               repacked as float32, less what the output has room for until the means
                                               are written, in whole panels, P targets being lost to these
"""

from __future__ import annotations

import ctypes
import functools
import multiprocessing
from collections.abc import Callable
from multiprocessing.pool import Pool
from pathlib import Path

import torch

import apet_kernels
from benchmarks.lib import baselines
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.compare import THREADS

PANEL = 81  # 64 targets that share a load, a vector of 16, and one for the alignment
CALLS: dict[str, Callable] = {
    "kernel": torch.ops.apet.compress,
    "eager": baselines.eager,
    "published": baselines.published,
}


def output_bytes(case: Case) -> int:
    """Tokens and indices."""
    return case.B * case.keep * (case.D * case.itemsize + 8)


def workspace_bound(case: Case) -> int:
    """O(N (M + 1) + K D) with its constants, for every image in flight."""
    targets = case.D * min(4 * case.keep, (4 - case.itemsize) * case.keep + 4 * PANEL)
    return min(case.B, THREADS) * (4 * case.N * (case.basis + 1) + targets)


def planned_workspace(case: Case) -> int:
    """What the kernel says it needs."""
    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype)
    return apet_kernels.plan(x, **case.arguments).workspace_bytes


def measured_growth(case: Case, name: str = "kernel") -> int:
    """Peak resident memory during a call of CALLS[name] less that before it, in a fresh process."""
    return _processes().apply(_grow, (case, name))


@functools.cache
def _processes() -> Pool:
    """One process for each task, forked from one that has imported this and run nothing: no heap is warm, and torch is
    loaded once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.lib.memory"])
    return context.Pool(1, maxtasksperchild=1)


def _grow(case: Case, name: str) -> int:
    """The call, after a tiny one that loads the library and starts the threads."""
    torch.set_num_threads(THREADS)
    x, call = tokens(case, seed=0), CALLS[name]
    with torch.inference_mode():
        few = min(case.N, 2 * case.basis + 2)
        call(x[:, :few, :32].contiguous(), **{**case.arguments, "keep": few - 1})
        ctypes.CDLL(None).malloc_trim(0)  # what making x has left would hide as much growth
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = _status("VmRSS")
        call(x, **case.arguments)
        return _status("VmHWM") - before


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status that counts kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
