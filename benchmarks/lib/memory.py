"""Memory of one call beyond its input: the bound, and the measured growth of a fresh process.

bound = outputs + workspace
outputs = B K (D itemsize + 8)                 tokens and int64 indices
workspace = I (4 N (M + 1) + D min(4 K, (4 - itemsize) K + 4 P))
                                               for each of the I images in flight, min(B, threads) at most: float32
                                               products of s1 and a norm for every token, and the merge targets
                                               repacked as float32. Until the means are written, the output stores
                                               whole panels of these; rounding to panels loses P targets
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
from benchmarks.lib.cases import SELECT, Case, tokens
from benchmarks.lib.compare import THREADS

PANEL = 81  # 64 targets that share a load, a vector of 16, and one for the alignment
CALLS: dict[str, Callable] = {
    "kernel": functools.partial(torch.ops.apet.compress, select=SELECT),
    "eager": baselines.eager,
    "published": baselines.published,
}


def output_bytes(case: Case) -> int:
    """Returns the bytes of tokens and indices."""
    return case.B * case.keep * (case.D * case.itemsize + 8)


def workspace_bound(case: Case) -> int:
    """Returns O(N (M + 1) + K D) with its constants, for all images in flight."""
    targets = case.D * min(4 * case.keep, (4 - case.itemsize) * case.keep + 4 * PANEL)
    return min(case.B, THREADS) * (4 * case.N * (case.basis + 1) + targets)


def planned_workspace(case: Case) -> int:
    """Returns the bytes of workspace that the kernel plans."""
    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype)
    return apet_kernels.plan(x, **case.op_arguments).workspace_bytes


def measured_growth(case: Case, name: str = "kernel") -> int:
    """Returns the growth of peak resident memory during a call of CALLS[name], in a fresh process."""
    return _processes().apply(_grow, (case, name))


@functools.cache
def _processes() -> Pool:
    """Returns a pool with one process for each task, forked from one that has only imported this module: no heap is
    warm, and torch is loaded once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.lib.memory"])
    return context.Pool(1, maxtasksperchild=1)


def _grow(case: Case, name: str) -> int:
    """Makes the call, after a tiny one that loads the library and starts the threads. Returns the growth in bytes."""
    torch.set_num_threads(THREADS)
    x, call = tokens(case, seed=0), CALLS[name]
    with torch.inference_mode():
        few = min(case.N, 2 * case.basis + 2)
        call(x[:, :few, :32].contiguous(), **{**case.arguments, "keep": few - 1})
        ctypes.CDLL(None).malloc_trim(0)  # memory left free by making x would hide as much growth
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = _status("VmRSS")
        call(x, **case.arguments)
        return _status("VmHWM") - before


def _status(field: str) -> int:
    """Returns the bytes of a field of /proc/self/status that counts kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
