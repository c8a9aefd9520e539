"""Memory of one call beyond its input: the bound, and what a fresh process really grew by.

bound = outputs + workspace
outputs = B K (D itemsize + 8)                 tokens and int64 indices
workspace = I (4 N (M + 1) + 4 K D)            float32 products of s1 with every token, one norm each, and the merge
                                               targets repacked as float32; for each of the I images in flight,
                                               min(B, threads) at most

python -m benchmarks.memory B N D keep dtype layout     prints the growth of this process in bytes
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

import apet_kernels
from benchmarks.cases import BASIS, Case, tokens
from benchmarks.compare import THREADS


def output_bytes(case: Case) -> int:
    """Tokens and indices."""
    return case.B * case.keep * (case.D * case.itemsize + 8)


def workspace_bound(case: Case) -> int:
    """O(N (M + 1) + K D) with its constants, for every image in flight."""
    return min(case.B, THREADS) * 4 * (case.N * (BASIS + 1) + case.keep * case.D)


def planned_workspace(case: Case) -> int:
    """What the kernel says it needs."""
    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype)
    return apet_kernels.plan(x, case.keep, BASIS, layout=case.layout, start=case.start)["workspace_bytes"]


def measured_growth(case: Case) -> int:
    """Peak resident memory during the call less that before it, in a fresh process."""
    arguments = [case.B, case.N, case.D, case.keep, case.dtype_name, case.layout]
    command = [sys.executable, "-m", "benchmarks.memory", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return int(result.stdout)


def _status(field: str) -> int:
    """Bytes of a field of /proc/self/status that counts kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(B: str, N: str, D: str, keep: str, dtype: str, layout: str) -> None:
    """One call, after a tiny one that loads the library and starts the threads."""
    case = Case(int(B), int(N), int(D), int(keep), getattr(torch, dtype), layout)
    torch.set_num_threads(THREADS)
    x = tokens(case, seed=0)
    with torch.inference_mode():
        torch.ops.apet.compress(x[:, :32, :32].contiguous(), 16, BASIS, layout=case.layout, start=case.start)
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
        before = _status("VmRSS")
        torch.ops.apet.compress(x, case.keep, BASIS, layout=case.layout, start=case.start)
        print(_status("VmHWM") - before)


if __name__ == "__main__":
    main(*sys.argv[1:])
