"""Compiles every CUDA kernel, without a GPU, and checks the machine code.

    python -m tools.sass [--smoke] [--target sm_90a ...] [--markdown]

It is an error if a kernel

- spills, or uses local memory otherwise; has static shared memory, which the launches do not count; or needs more
  registers than a multiprocessor has for one CTA;
- lacks an instruction that docs/cuda.md claims (CLAIMS below), or contains one that it excludes.

--markdown writes the table into docs/cuda.md. Needs nvcc and, for nvdisasm and cuobjdump, the package triton; no GPU.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.sheet import replaced

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
GUIDE = ROOT / "docs/cuda.md"
BEGIN, END = "<!-- sass:begin -->", "<!-- sass:end -->"

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_103a", "sm_120a")
DTYPES = ("float32", "float16", "bfloat16")  # a source each
SMOKE = [("sm_80", "float16"), ("sm_90a", "bfloat16"), ("sm_90a", "float32")]
FLAGS = ["-std=c++17", "-O3", "-DNDEBUG", "-fmad=false"]  # as csrc/CMakeLists.txt; tests/test_sass.py compares
REGISTERS = 65536  # of a multiprocessor, the same on every target


def missing() -> str | None:
    """Returns None if kernels can be compiled and disassembled here, else the reason why not."""
    if not nvcc():
        return "there is no nvcc"
    try:
        import triton  # noqa: F401
    except ImportError:
        return "nvdisasm and cuobjdump come with the package triton, which is not installed"
    return None


@functools.cache
def nvcc() -> str | None:
    if "CUDACXX" in os.environ:
        return shutil.which(os.environ["CUDACXX"])
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def tools() -> dict[str, str]:
    import triton

    return {"nvdisasm": triton.knobs.nvidia.nvdisasm.path, "cuobjdump": triton.knobs.nvidia.cuobjdump.path}


# ---- claims about the machine code


@dataclass(frozen=True)
class Claim:
    """A claim about kernels whose names match, on some targets: they contain an instruction, or none do."""

    text: str  # after "it"
    instruction: str
    kernels: str = ""
    dtypes: tuple[str, ...] = DTYPES
    targets: tuple[str, ...] = TARGETS
    present: bool = True


FROM_90 = ("sm_90a", "sm_100a", "sm_103a", "sm_120a")
SLOW_FLOAT64 = ("sm_86", "sm_89", "sm_103a", "sm_120a")
TENSOR = ("float16", "bfloat16")
CLUSTERS = r"ClusterGroup|s1_s5"
TILES = "s1_s4_rounds|s4_medoids|s5_merge|s1_s5"
CLAIMS = (
    Claim("reads rows of tokens by 16 bytes", r"LDG\.E\.128\S*"),
    Claim("writes results by 16 bytes", r"STG\.E\.128\S*", "s1_s4|s1_s5|s5_merge"),
    Claim("copies to shared memory asynchronously, by 16 bytes", r"LDGSTS\.E\.BYPASS\.128\S*"),
    Claim("reads its resident rows by 16 bytes", r"LDS\.128", "s1_s4_group|s1_s5"),
    Claim(
        "multiplies 16-bit tokens on the matrix units, with float32 sums",
        r"HMMA\.16816\.F32(?:\.BF16)?",
        TILES,
        TENSOR,
    ),
    Claim("loads their tiles by ldmatrix", r"LDSM\.16\.M88\.4", TILES, TENSOR),
    Claim("multiplies float32 tokens by fma, not in tf32", r"HMMA\.\S*", "", ("float32",), present=False),
    Claim("waits at the cluster's barrier", r"UCGABAR_WAIT", CLUSTERS, targets=FROM_90),
    Claim("waits at no cluster's barrier", r"UCGABAR_\w+", "CooperativeGroup|s5_merge", present=False),
    Claim("counts its group's arrivals in global memory", r"REDG?\.E\.ADD\.STRONG\.GPU", "CooperativeGroup"),
    Claim("lets the next launch begin", r"PREEXIT", "s1_s4", targets=FROM_90),
    Claim("waits for the launch before it", r"ACQBULK", "s5_merge", targets=FROM_90),
    Claim(
        "takes the best target as a 64-bit integer maximum",
        r"REDG?\.E\.MAX\.64\S*|ATOMG?\.E\.MAX\.64\S*",
        "s4_medoids|s5_merge|s1_s5",
    ),
    Claim(
        "multiplies and adds two floats in place of float64", "DFMA", "s1_s4|s1_s5", targets=SLOW_FLOAT64, present=False
    ),
    Claim("adds no floats atomically", r"(?:RED|ATOM)\w?\.\S*(?:F16|F32|BF16|F64)\S*", present=False),
)


@dataclass(frozen=True)
class LoopClaim:
    """A claim about the order of instructions in kernels whose names match: their stream has a pattern, or has not."""

    text: str  # after "it"
    keep: str  # the instructions in the stream
    pattern: str
    kernels: str
    dtypes: tuple[str, ...] = DTYPES
    present: bool = True


# Read on these targets; others schedule otherwise.
LOOP_TARGETS = ("sm_80", "sm_90a")
LOADED = r"LDG\.E\.STRONG\.GPU "
LOOP_CLAIMS = (
    LoopClaim(
        "loads rows ahead of its matrix instructions: six times before the first, and not among the last twelve",
        r"LDSM|HMMA",
        r"\[ (?:LDSM\S* ){6,}(?:HMMA\S* ){2}(?:(?:LDSM|HMMA)\S* )*(?:HMMA\S* ){12}\]",
        "s5_merge",
        TENSOR,
    ),
    LoopClaim(
        "has no loop of less than sixteen matrix instructions, those of two slabs",
        r"LDSM|HMMA",
        r"\[ (?:LDSM\S* )*(?:HMMA\S* (?:LDSM\S* )*){1,15}\]",
        "s5_merge",
        TENSOR,
        present=False,
    ),
    LoopClaim(
        "has eight keys in registers before it counts the first",
        r"LDG|ATOMS",
        rf"(?:{LOADED}){{8}}(?:\| )*(?:ATOMS\.POPC\.INC\.32 (?:\| )*){{8}}",
        "s4_medoids|s5_merge|s1_s5",
    ),
    LoopClaim(
        "has eight 16-byte words of a target's tokens in flight before it adds the first",
        r"LDG|FADD",
        r"(?:LDG\.E\.128\S* (?:\| )*){8}FADD",
        "s5_merge|s1_s5",
    ),
    LoopClaim(
        "polls by a load alone, and empties L1 once after it",
        r"LDG|CCTL",
        rf"\[ {LOADED}\] (?:\| )*CCTL\.IVALL",
        "CooperativeGroup|s5_merge",
    ),
    LoopClaim(
        "has four ranks in registers before it counts the first",
        r"LD\.E$|LDS|LDG|ATOMS",
        r"(?:LD\.E (?:\| )*){4}(?:ATOMS\.POPC\.INC\.32 )",
        "s1_s4|s1_s5",
    ),
)


# ---- compiling and reading


@dataclass(frozen=True)
class Block:
    """Instructions that run one after the other: none but the last jumps, and no jump leads to any but the first."""

    names: tuple[str, ...]
    repeats: bool  # the last jumps to the first


@dataclass
class Kernel:
    """One instantiation of a kernel for one target."""

    target: str
    dtype: str
    name: str  # as in the source, less the dtype
    threads: int  # of a CTA, by its launch bounds
    registers: int
    spilled: int  # bytes
    stack: int  # bytes of local memory
    static_shared: int  # bytes
    instructions: collections.Counter[str]
    blocks: tuple[Block, ...]

    @property
    def capability(self) -> int:
        return int(re.sub(r"\D", "", self.target))

    @property
    def empty(self) -> bool:
        """Whether the kernel has no body, as cluster kernels on targets without clusters."""
        return self.capability < 90 and bool(re.search(CLUSTERS, self.name))

    def count(self, pattern: str) -> int:
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    def faults(self) -> list[str]:
        found = []
        if self.spilled or self.stack or self.count(r"(?:LDL|STL).*"):
            found.append(f"spills {self.spilled} bytes and has {self.stack} bytes of local memory")
        if self.static_shared:
            found.append(f"has {self.static_shared} bytes of static shared memory, which the launches do not count")
        per_warp = -(-self.registers * 32 // 256) * 256
        if self.threads == 0 or per_warp * (self.threads // 32) > REGISTERS:
            found.append(f"needs {self.registers} registers for each of {self.threads} threads")
        if self.empty:
            if self.count(r"(?:LD|ST|RED|ATOM).*[GS].*"):
                found.append("has a body, on a target without clusters")
            return found
        for claim in CLAIMS:
            if (
                self.target not in claim.targets
                or self.dtype not in claim.dtypes
                or not re.search(claim.kernels, self.name)
            ):
                continue
            count = self.count(claim.instruction)
            if bool(count) != claim.present:
                found.append(f"does not hold the claim that it {claim.text}: {count} {claim.instruction}")
        for loop in LOOP_CLAIMS:
            if self.target not in LOOP_TARGETS or self.dtype not in loop.dtypes:
                continue
            if re.search(loop.kernels, self.name) and bool(self.finds(loop)) != loop.present:
                found.append(f"does not hold the claim that it {loop.text}")
        return found

    def finds(self, claim: LoopClaim) -> bool:
        return re.search(claim.pattern, self.stream(claim.keep)) is not None

    def stream(self, keep: str) -> str:
        """Returns the instructions whose names begin with a pattern, a | between blocks, and [ ] around a block that
        repeats itself."""
        parts = []
        for block in self.blocks:
            names = " ".join(name for name in block.names if re.match(keep, name))
            parts.append(f"[ {names} ]" if block.repeats else names)
        return " ".join(("| " + " | ".join(parts)).split()) + " "


def examine(target: str, dtype: str, csrc: Path = CSRC, flags: Iterable[str] = ()) -> list[Kernel]:
    """Returns the kernels of one source, compiled for one target."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        arch = target.removeprefix("sm_")
        said = _run(
            *(nvcc(), *FLAGS, *flags, "-Xptxas", "-v", f"-I{csrc}", "-cubin", "-o", cubin),
            *(f"-gencode=arch=compute_{arch},code=sm_{arch}", csrc / f"cuda/{dtype}.cu"),
        )
        code = _run(tools()["nvdisasm"], "-c", cubin)
        # cuobjdump looks for nvdisasm on PATH.
        path = os.pathsep.join([str(Path(tools()["nvdisasm"]).parent), os.environ.get("PATH", os.defpath)])
        elf = _run(tools()["cuobjdump"], "--dump-elf", cubin, PATH=path)
    bodies = dict(re.findall(r"\.section\s+\.text\.(\w+),(.*?)(?=\.section\s|\Z)", code, re.DOTALL))
    bounds = re.findall(
        r"^\.nv\.info\.(\w+)$(.*?)EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+)", elf, re.M | re.S
    )
    threads = {symbol: int(value, 16) for symbol, between, value in bounds if ".nv.info." not in between}
    kernels = []
    for symbol, report in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", said, re.DOTALL):
        blocks = blocks_of(bodies[symbol])
        instructions = [name for block in blocks for name in block.names]
        assert instructions, f"nvdisasm shows no instruction of {symbol}"
        number = functools.partial(_number, report)
        kernels.append(
            Kernel(
                target,
                dtype,
                readable(symbol),
                threads.get(symbol, 0),
                number(r"Used (\d+) registers"),
                number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads"),
                number(r"(\d+) bytes stack frame"),
                number(r"(\d+) bytes smem", 0),
                collections.Counter(instructions),
                blocks,
            )
        )
    return kernels


def blocks_of(body: str) -> tuple[Block, ...]:
    """Returns the blocks of a kernel's body, as nvdisasm writes it."""
    blocks: list[Block] = []
    label, names = "", []
    for line in body.splitlines():
        if mark := re.match(r"\s*(\.L_\w+):", line):
            blocks += [Block(tuple(names), False)] if names else []
            label, names = mark[1], []
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)([^;]*)", line):
            names.append(found[1])
            if re.match(r"BRA|BRX|JMP|JMX|CALL|RET|EXIT", found[1]):
                blocks.append(Block(tuple(names), bool(label) and f"`({label})" in found[2]))
                label, names = "", []
    return (*blocks, Block(tuple(names), False)) if names else tuple(blocks)


def _number(report: str, pattern: str, otherwise: int | None = None) -> int:
    found = re.search(pattern, report)
    assert found or otherwise is not None, f"ptxas does not say {pattern}: {report}"
    return int(found[1]) if found else otherwise


def readable(symbol: str) -> str:
    """Makes a name readable: `_ZN4apet4cuda11s1_s4_groupIfNS0_12ClusterGroupEEEvNS0_4CallE` ->
    `s1_s4_group<ClusterGroup>`."""
    name = _run("c++filt", symbol).strip().replace("apet::cuda::", "")
    name = re.sub(r"^void |\(Call\)$", "", name)
    return re.sub(r"<(?:float|__half|__nv_bfloat16)(?:, (.*))?>$", lambda m: f"<{m[1]}>" if m[1] else "", name)


def _run(*command: object, **environment: str) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


# ---- the command


def faults(kernels: list[Kernel]) -> Iterator[str]:
    """Returns messages about every kernel, and about claims for which there was no kernel."""
    for k in kernels:
        for fault in k.faults():
            yield f"{k.name} of {k.dtype} for {k.target} {fault}"
    for claim in CLAIMS:
        if not any(re.search(claim.kernels, k.name) and k.dtype in claim.dtypes for k in kernels):
            yield f"no kernel matches {claim.kernels!r}, which {claim.text}"


def compiler() -> str:
    """Returns the version of nvcc, as 13.0.88."""
    return re.search(r"V([\d.]+)", _run(nvcc(), "--version"))[1]


def table(kernels: list[Kernel]) -> str:
    """Returns a markdown table: registers of every kernel, and the instructions found in its code."""
    targets = [name for name in TARGETS if any(k.target == name for k in kernels)]
    wrong = len(list(faults(kernels)))
    lines = [
        f"`python -m tools.sass --markdown`, nvcc {compiler()}: {len(kernels)} kernels compiled, {wrong} faults. The",
        "cells show registers per thread. Nothing spills or uses local memory. A dot: the target has no clusters, so "
        "the kernel is empty.",
        "",
        "| kernel | tokens | threads | " + " | ".join(targets) + " |",
        "|---|---|---|" + "---|" * len(targets),
    ]
    rows = {(k.name, k.dtype): k.threads for k in sorted(kernels, key=lambda k: (k.name, DTYPES.index(k.dtype)))}
    for (name, dtype), threads in rows.items():
        own = {k.target: k for k in kernels if (k.name, k.dtype) == (name, dtype)}
        cells = ["·" if own[target].empty else str(own[target].registers) for target in targets]
        lines.append(f"| `{name}` | {dtype} | {threads} | " + " | ".join(cells) + " |")
    lines += [
        "",
        'Instructions that the machine code contains, or with "no" does not contain, on every target:',
        "",
        "| kernels | instruction (a pattern) | so it |",
        "|---|---|---|",
    ]
    for c in CLAIMS:
        which = ", ".join(sorted({k.name.partition("<")[0] for k in kernels if re.search(c.kernels, k.name)}))
        groups = {
            CLUSTERS: "those of `ClusterGroup`, s1_s5_cluster",
            "CooperativeGroup": "those of `CooperativeGroup`",
            "CooperativeGroup|s5_merge": "those of `CooperativeGroup`, s5_merge",
        }
        which = groups.get(c.kernels, which)
        which += " of 16-bit tokens" if c.dtypes == TENSOR else " of float32 tokens" if c.dtypes == ("float32",) else ""
        which += {TARGETS: "", FROM_90: ", from sm_90 on"}.get(c.targets, f", on {', '.join(c.targets)}")
        instruction = c.instruction.replace("|", r"\|")
        lines.append(f"| {which} | {'' if c.present else 'no '}`{instruction}` | {c.text} |")
    return "\n".join(lines) + "\n"


def compile_all(jobs: Iterable[tuple[str, str]]) -> list[Kernel]:
    """Returns the kernels of every (target, dtype)."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(lambda job: examine(*job), jobs) for kernel in kernels]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="three of the sources, on two targets")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only this one; may be repeated")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into {GUIDE.name}")
    options = parser.parse_args(arguments)
    if options.markdown and (options.smoke or options.target):
        parser.error("--markdown is of all targets and dtypes")
    if why := missing():
        print(f"python -m tools.sass: {why}", file=sys.stderr)
        return 2
    began = time.monotonic()
    kernels = compile_all(SMOKE if options.smoke else [(t, d) for t in options.target or TARGETS for d in DTYPES])
    found = list(faults(kernels))
    if not options.smoke:
        print(table(kernels))
    print(*found, f"{len(kernels)} kernels in {time.monotonic() - began:.0f} s", sep="\n")
    if options.markdown:
        GUIDE.write_text(replaced(GUIDE.read_text(), BEGIN, END, table(kernels)))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
