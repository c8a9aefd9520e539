"""The CPU library in a program of its own: built for another processor, or in another way, than the installed one.

`BACKEND_TESTS` are the tests that all backends share; a module that takes them, with a fixture `backend`, runs them on
its program.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from apet_kernels import ops
from tests import (
    test_hostile,
    test_invariance,
    test_layouts,
    test_reference_published,
    test_rounds,
    test_s1_basis,
    test_s3_residual,
    test_s4_topk,
    test_s5_merge,
)
from tests.binaries import run
from tests.library.copies import CMAKE, CSRC, SOURCES
from tests.library.copies import ISAS as NUMBERED
from tests.simt import abi
from tests.simt.call import CASES, NAMES, Case, reach

BACKEND_TESTS: dict[str, Callable[..., None]] = {
    f"{module.__name__.rpartition('.')[2]}__{name.removeprefix('test_')}": test
    for module in (
        test_hostile,
        test_invariance,
        test_layouts,
        test_reference_published,
        test_rounds,
        test_s1_basis,
        test_s3_residual,
        test_s4_topk,
        test_s5_merge,
    )
    for name, test in vars(module).items()
    if name.startswith("test_") and "backend" in test.__code__.co_varnames[: test.__code__.co_argcount]
}


def make(folder: Path, compiler: str, csrc: Path, *options: str) -> Path:
    """Builds the static library from these sources, and the program that calls it; returns its path."""
    run(CMAKE, "-S", csrc, "-B", folder, "-DCMAKE_CXX_FLAGS=-Werror", *options)
    run(CMAKE, "--build", folder, "--parallel", "2")
    flags = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread", "-DAPET_STATIC", f"-I{csrc}"]
    run(compiler, *flags, SOURCES / "calls.cpp", folder / "libapet.a", "-o", folder / "calls")
    return folder / "calls"


def with_fault(folder: Path, name: str, old: str, new: str) -> Path:
    """Copies csrc/ into the folder, and replaces the only occurrence of `old` in cpu/`name`. Returns the copy."""
    source = shutil.copytree(CSRC, folder / "csrc")
    file = source / "cpu" / name
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
    return source


@dataclass(frozen=True)
class Answer:
    """The result of a call: its status, and the instruction set and threads of its plan."""

    status: int
    isa: str
    threads: int


class Program:
    """A process that runs this command, the program with or without an emulator, and answers one call after another."""

    def __init__(self, *command: str | Path) -> None:
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


@dataclass(frozen=True)
class Functions:
    """compress, compress_varlen, score and merge for CPU tensors, in a program of its own; threads=0: as torch."""

    on: Program
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
