"""Compiles every kernel that the Triton backend can launch, without a GPU, and checks the compiled code.

    python -m tools.offline [--smoke] [--target sm_90a ...] [--markdown]

The launches are those that `launch.py` builds, on meta tensors. Triton compiles them as for a launch, with a stand-in
for the driver that names the GPU. It is an error if

- a program needs more shared memory than the GPU has, or none fits on a multiprocessor, or anything spills;
- a 16-bit s5_assign multiplies without a matrix instruction, or a float32 one in tf32;
- rows of x are whole 16-byte words, with at least one for each thread of a load, but it loads smaller pieces.

--markdown writes the table into docs/gpu.md. Needs Triton, and neither GPU nor driver; compiles from scratch.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import contextlib
import io
import itertools
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.sheet import replaced
from tools.loads import narrow_loads

GUIDE = Path(__file__).parents[1] / "docs/gpu.md"
BEGIN, END = "<!-- offline:begin -->", "<!-- offline:end -->"


@dataclass(frozen=True)
class Target:
    """A GPU, with the limits of a multiprocessor (on AMD, of a compute unit)."""

    backend: str
    arch: int | str
    shared_limit: int  # bytes a program may have
    shared: int = 0  # bytes a multiprocessor has, 1 KB of which every program takes for itself
    warps: int = 0
    programs: int = 0


KB = 1024
# Under the names of `configs.device_class`. Sizes: CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; AMD CDNA 3 and CDNA 4 instruction set architecture.
TARGETS = {
    "sm_80": Target("cuda", 80, 163 * KB, 164 * KB, 64, 32),
    "sm_86": Target("cuda", 86, 99 * KB, 100 * KB, 48, 16),
    "sm_89": Target("cuda", 89, 99 * KB, 100 * KB, 48, 24),
    "sm_90a": Target("cuda", 90, 227 * KB, 228 * KB, 64, 32),
    "sm_100a": Target("cuda", 100, 227 * KB, 228 * KB, 64, 32),
    "sm_103a": Target("cuda", 103, 227 * KB, 228 * KB, 64, 32),
    "sm_120a": Target("cuda", 120, 99 * KB, 100 * KB, 48, 24),
    "gfx942": Target("hip", "gfx942", 64 * KB),
    "gfx950": Target("hip", "gfx950", 160 * KB),
}
REGISTERS = 65536  # of a multiprocessor
SMOKE = ("sm_80", "sm_90a", "gfx942")

# D: usual sizes of vision encoders and language models, the smallest and the largest, and rows that are not whole
# 16-byte words. The two 16-bit dtypes have the same layouts, so only one has every D. The largest M has every second D.
DIMS = {
    torch.float16: (64, 100, 768, 1024, 1152, 1280, 3584, 4096, 8192),
    torch.bfloat16: (100, 1024, 8192),
    torch.float32: (64, 99, 768, 1024, 1152, 1280, 3584, 4096, 8192),
}


@dataclass(frozen=True)
class Problem:
    """A call: the values on which its kernels depend, and those on which they must not (layout, select, ragged)."""

    op: str
    D: int
    dtype: torch.dtype
    M: int | None = 10
    options: tuple[tuple[str, Any], ...] = ()

    def launches(self, device_class: str) -> list:
        from apet_kernels.triton_kernels import launch

        x = torch.empty(2, 300, self.D, dtype=self.dtype, device="meta")
        options: dict[str, Any] = {**dict(self.options), "device_class": device_class}
        if options.get("weights"):
            options["weights"] = torch.empty(2, 300, device="meta")
        if self.op == "compress":
            return launch.compress(x, 150, self.M, **options).launches
        if self.op == "compress_varlen":
            cu = torch.empty(3, dtype=torch.int32, device="meta")
            return launch.compress_varlen(x[0], cu, cu, 150, 200, 100, self.M, **options).launches
        if self.op == "score":
            return launch.score(x, self.M, **options).launches
        indices = torch.empty(2, 150, dtype=torch.int64, device="meta")
        targets = indices.bool() if options.pop("targets") else None
        return launch.merge(x, indices, targets=targets, **options).launches


def problems(smoke: bool) -> Iterator[Problem]:
    """Yields the grid: every D and dtype, and on one D the options on which no kernel's code may depend."""
    dims = {torch.float16: (1024,), torch.bfloat16: (100,), torch.float32: (3584,)} if smoke else DIMS
    yield from (Problem("compress", D, dtype) for dtype in dims for D in dims[dtype])
    if not smoke:
        yield from (Problem("compress", D, dtype, 64) for dtype in dims for D in dims[dtype][::2])
    in_rounds = (("select", "qr"), ("refine", 1))
    yield from (Problem("compress", D, dtype, None, in_rounds) for dtype in dims for D in dims[dtype])
    yield Problem("compress_varlen", 1024, torch.float16, None, in_rounds)
    weights = ("weights", True)
    yield from (Problem("compress", D, t, M, (weights,)) for t in dims for D in dims[t][::2] for M in (10, None))
    layouts = [{"layout": "inplace"}, {"layout": "overwrite", "blend": 0.5}, {"layout": "append"}]
    for select, layout in itertools.product(("fps", "qr"), layouts):
        options = tuple({**layout, "select": select}.items())
        yield Problem("compress", 1024, torch.float16, 10, options)
        yield Problem("compress_varlen", 1024, torch.float16, 10, options)
    yield Problem("score", 1024, torch.float16)
    yield Problem("merge", 1024, torch.float16, options=(("targets", False),))
    yield Problem("merge", 1024, torch.float16, options=(("targets", True),))


def code(launch: Any) -> tuple:
    """Returns all on which the code of a launch depends: kernel, constants, options, and dtypes of its tensors."""
    tensors = {name: a.dtype for name, a in launch.args.items() if isinstance(a, torch.Tensor)}
    return launch.kernel.__name__, *(tuple(d.items()) for d in (launch.constants, launch.options, tensors))


# ---- in a process that compiles


class Driver:
    """A stand-in for a GPU's driver, with the functions that Triton calls before it compiles."""

    def __init__(self, target: Target) -> None:
        from triton.backends.compiler import GPUTarget

        wave = 64 if target.backend == "hip" else 32
        self.target = GPUTarget(target.backend, target.arch, wave)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of a kernel's compiled binaries

    def get_current_stream(self, device: str) -> int:
        return 0


def start() -> None:
    """Makes Triton behave as on a machine with a GPU, with an empty cache."""
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(prefix="offline-", dir=os.environ["OFFLINE_CACHE"])


@contextlib.contextmanager
def pool(workers: int = 2) -> Iterator[concurrent.futures.ProcessPoolExecutor]:
    """Yields processes that compile, also if this one interprets."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["OFFLINE_CACHE"] = cache
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context, start) as executor:
            yield executor


def compile_launch(launch: Any, target: Target) -> tuple[Any, str]:
    """Compiles as `launch.run()` does on a GPU. Returns a CompiledKernel, and the output of ptxas."""
    import triton

    triton.runtime.driver.set_active(Driver(target))
    triton.knobs.nvidia.dump_ptxas_log = True
    with contextlib.redirect_stdout(io.StringIO()) as said:
        kernel = launch.kernel.warmup(grid=(launch.programs,), **launch.args, **launch.constants, **launch.options)
    return kernel, said.getvalue()


@dataclass
class Compiled:
    """The resources of a kernel on a target."""

    target: str
    kernel: str
    D: int | None
    dtype: torch.dtype
    registers: int
    spilled: int  # bytes
    shared: int
    resident: int  # warps that a multiprocessor (waves that a compute unit) can hold at once
    matrix: str
    faults: list[str] = field(default_factory=list)


def misfits(result: Compiled, target: Target, assembly: str) -> list[str]:
    """Returns a message for everything in which a compiled kernel does not fit its target."""
    found = []
    if result.shared > target.shared_limit:
        found.append(f"needs {result.shared} bytes of shared memory of {target.shared_limit}")
    if result.resident < 1:
        found.append(f"no program fits on a multiprocessor, with {result.registers} registers per thread")
    if result.spilled:
        found.append(f"spills {result.spilled} bytes")
    if result.kernel == "s5_assign":
        if result.dtype.itemsize == 2 and not result.matrix:
            found.append("multiplies 16-bit tokens without a matrix instruction")
        if result.dtype.itemsize == 4 and re.search(r"\.tf32|_xf32", assembly):
            found.append("multiplies float32 tokens in tf32")
    return found


def examine(name: str, problem: Problem, number: int) -> Compiled:
    """Compiles launch `number` of a problem for the target `name`."""
    return examine_launch(name, problem.launches(name)[number], problem.dtype)[0]


def examine_launch(name: str, launch: Any, dtype: torch.dtype) -> tuple[Compiled, Any]:
    """Compiles a launch on x of some dtype; also returns the CompiledKernel."""
    target = TARGETS[name]
    kernel, said = compile_launch(launch, target)
    warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
    if target.backend == "cuda":
        assembly = kernel.asm["ptx"]
        registers = int(re.findall(r"Used (\d+) registers", said)[-1])
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", said))
        per_warp = -(-registers * 32 // 256) * 256
        programs = min(REGISTERS // (per_warp * warps), target.shared // (shared + KB), target.programs)
        resident = min(programs * warps, target.warps)
    else:
        assembly = kernel.asm["amdgcn"]
        counts = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)$", assembly, re.MULTILINE)}
        registers = counts["vgpr_count"]
        spilled = counts["private_segment_fixed_size"]  # scratch memory; scalar registers spill into vector registers
        resident = 4 * int(re.findall(r"; Occupancy: (\d+)", assembly)[-1])
    found = re.search(r"tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma", assembly)
    result = Compiled(
        name,
        launch.kernel.__name__,
        launch.constants.get("D"),
        dtype,
        registers,
        spilled,
        shared,
        resident,
        found[0] if found else "",
    )
    result.faults += misfits(result, target, assembly)
    if launch.constants.get("ALIGN") == 16:
        threads = warps * (64 if target.backend == "hip" else 32)
        result.faults += narrow_loads(kernel.asm["ttir"], assembly, threads, dtype)
    return result, kernel


# ---- the command


def jobs(names: Iterable[str], smoke: bool) -> Iterator[tuple[str, Problem, int]]:
    """Yields every different code once per target, by the first launch that has it."""
    for name in names:
        seen = set()
        for problem in problems(smoke):
            for number, launch in enumerate(problem.launches(name)):
                if (key := code(launch)) not in seen:
                    seen.add(key)
                    yield name, problem, number


def table(results: list[Compiled]) -> str:
    """Returns a markdown table of the resources of every kernel, the largest over D and M, by target."""
    import triton

    names = [name for name in TARGETS if any(r.target == name for r in results)]
    groups = collections.defaultdict(list)
    for r in results:
        groups[r.kernel, "" if r.D is None else f"{8 * r.dtype.itemsize}-bit", r.target].append(r)
    dims = sorted({r.D for r in results if r.D})
    lines = [
        f"`python -m tools.offline --markdown`, Triton {triton.__version__}: {len(results)} kernels compiled, "
        f"for D = {', '.join(map(str, dims))}.",
        "A cell holds the registers of a thread, the KB of shared memory of a program, and the number of warps",
        "that fit on a multiprocessor at once (on AMD, of waves on a compute unit), each the worst over D, dtype, M.",
        "",
        "| kernel | x | " + " | ".join(names) + " |",
        "|---|---|" + "---|" * len(names),
    ]
    for kernel, bits in sorted({key[:2] for key in groups}):
        lines.append(f"| `{kernel}` | {bits} |")
        for name in names:
            group = groups[kernel, bits, name]
            registers, shared = max(r.registers for r in group), max(r.shared for r in group)
            lines[-1] += f" {registers}, {-(-shared // KB)}, {min(r.resident for r in group)} |"
    spilled = sum(r.spilled > 0 for r in results)
    by_instruction = collections.defaultdict(list)
    for name in names:
        used = {r.matrix for r in groups["s5_assign", "16-bit", name]}
        by_instruction[" or ".join(f"`{instruction}`" for instruction in sorted(used))].append(name)
    lines += [
        "",
        f"{'Nothing spills.' if not spilled else f'{spilled} of them spill.'} A 16-bit `s5_assign` multiplies by "
        + ", ".join(f"{instruction} on {' and '.join(targets)}" for instruction, targets in by_instruction.items())
        + "; a float32",
        "one never uses tf32. Rows of x that are whole 16-byte words are loaded by words, unless a tile has fewer",
        "words than threads.",
    ]
    return "\n".join(lines) + "\n"


def compile_all(names: Iterable[str], smoke: bool) -> list[Compiled]:
    """Compiles every job, two at a time."""
    with pool() as executor:
        return list(executor.map(examine, *zip(*jobs(names, smoke), strict=True)))


def faults(results: list[Compiled]) -> list[str]:
    """Returns a message for each fault."""
    return [
        f"{r.kernel} for {r.target}, D={r.D}, {str(r.dtype).removeprefix('torch.')}: {fault}"
        for r in results
        for fault in r.faults
    ]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.offline", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help=f"three sizes, on {', '.join(SMOKE)}")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {GUIDE.name}")
    options = parser.parse_args(arguments)
    if options.markdown and (options.smoke or options.target):
        parser.error("--markdown is of all targets and sizes")
    began = time.monotonic()
    results = compile_all(options.target or (SMOKE if options.smoke else TARGETS), options.smoke)
    found = faults(results)
    print(table(results), *found, f"{len(results)} kernels in {time.monotonic() - began:.0f} s", sep="\n")
    if options.markdown:
        GUIDE.write_text(replaced(GUIDE.read_text(), BEGIN, END, table(results)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
