"""The CPU library on 64-bit ARM: cross-compiled, and called on a processor that qemu-user emulates."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apet_kernels import ops
from tests.binaries import run
from tests.library.copies import CMAKE, CSRC, SOURCES, built
from tests.library.copies import ISAS as NUMBERED
from tests.simt import abi
from tests.simt.call import CASES, NAMES, Case, reach

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path("/usr/aarch64-linux-gnu")  # of the cross compiler's package for the C library, which the emulator loads
CMAKE_OPTIONS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
ISAS = ("generic", "neon", "neon_bf16")
# What the emulator calls a processor with FEAT_BF16, and one without.
WITH_BF16, WITHOUT_BF16 = "max", "cortex-a72"


def missing() -> str | None:
    """Returns None if the library can be compiled and run here, else the reason why not."""
    if not (CMAKE and (CSRC / "apet.h").exists()):
        return "needs cmake and the sources"
    absent = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed (Debian: apt install g++-aarch64-linux-gnu qemu-user)"


def make(folder: Path, csrc: Path = CSRC, *options: str) -> None:
    """Builds the static library from these sources, and the program that calls it."""
    run(CMAKE, "-S", csrc, "-B", folder, *CMAKE_OPTIONS, "-DCMAKE_CXX_FLAGS=-Werror", *options)
    run(CMAKE, "--build", folder, "--parallel", "2")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-DAPET_STATIC", f"-I{csrc}"]
    run(COMPILER, *flags, SOURCES / "calls.cpp", folder / "libapet.a", "-o", folder / "calls")


@dataclass(frozen=True)
class Answer:
    """What a call returned: status, and of its plan the instruction set and the threads."""

    status: int
    isa: str
    threads: int


class Processor:
    """An emulated processor, on which the program answers one call after another."""

    def __init__(self, model: str, program: Path) -> None:
        command = [EMULATOR, "-cpu", model, "-L", ROOT, program]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def call(self, case: Case, isa: str, threads: int = 1, plan_alone: bool = False) -> Answer:
        """Runs the case, and fills its outputs if the status is APET_OK."""
        parts = [bytes((abi.int64 * 3)(NUMBERED.index(isa), threads, plan_alone)), bytes(case.problem)]
        for name in NAMES:
            content = reach(case.inputs[name]) if name in case.inputs else b""
            output = case.outputs.get(name)
            given = name in case.inputs or output is not None
            size = len(content) if output is None else output.numel() * output.element_size()
            parts += [bytes(abi.int64(size if given else -1)), content]
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()
        status, used, team = torch.frombuffer(bytearray(self._read(24)), dtype=torch.int64).tolist()
        if status == 0:
            for t in case.outputs.values():
                if t.numel():
                    content = bytearray(self._read(t.numel() * t.element_size()))
                    t.view(-1).view(torch.uint8).copy_(torch.frombuffer(content, dtype=torch.uint8))
        return Answer(status, NUMBERED[used], team)

    def _read(self, count: int) -> bytes:
        assert self.process.stdout is not None
        content = self.process.stdout.read(count)
        if len(content) != count:
            raise RuntimeError(f"the program ended, with exit code {self.process.wait()}")
        return content

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        self.process.wait()


@functools.cache
def processor(model: str) -> Processor:
    """The emulated processor of this name; it ends with this process."""
    return Processor(model, built("arm", make) / "calls")


@dataclass(frozen=True)
class Functions:
    """compress, compress_varlen, score and merge for CPU tensors, on the emulated processor; threads=0: as torch."""

    on: Processor
    isa: str
    threads: int = 0

    def __getattr__(self, name: str) -> Callable[..., Tensor | tuple[Tensor, ...]]:
        if name not in CASES:
            raise AttributeError(name)

        def function(*arguments: object, **options: object) -> Tensor | tuple[Tensor, ...]:
            ops.check_grad(*(a for a in (*arguments, *options.values()) if isinstance(a, Tensor)))
            case = CASES[name](*arguments, **options)
            answer = self.on.call(case, self.isa, self.threads or torch.get_num_threads())
            if answer.status:
                raise RuntimeError(f"status {answer.status}")
            results = tuple(case.outputs.values())
            return results if len(results) > 1 else results[0]

        return function
