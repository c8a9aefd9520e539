"""The symbols that compiled libraries export and need, and those that the headers in csrc/ declare for them."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import util
from pathlib import Path

import pytest

HEADER, TESTING = (Path(__file__).parents[1] / "csrc" / name for name in ("apet.h", "apet_testing.h"))
PACKAGE = Path(util.find_spec("apet_kernels").origin).parent
LIBRARY = PACKAGE / "libapet.so"
RUNTIMES = {
    "libstdc",
    "libgcc_s",
    "libc",
    "libm",
    "libpthread",
    "libdl",
    "librt",
    "ld-linux-x86-64",
    "ld-linux-aarch64",
}
# Symbols with a version are those of the C and C++ runtimes. Those with _ITM or __gmon are weak symbols of the
# compiler's start-up files. Those in namespace std are libstdc++'s: some builds of torch export them too, without a
# version, and the linker finds these first.
OF_THE_RUNTIMES = re.compile(r"@|^_ITM_|^__gmon_|^_Z(T[VTIS])?N?K?S[tabsiod]")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without the compiled kernels")


def called(*command: object, folder: Path | None = None, **environment: str) -> tuple[int, str]:
    """Runs a command; returns its exit code, and its output with standard error."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, done.stdout


def run(*command: object, folder: Path | None = None, **environment: str) -> str:
    """Runs a command; returns its output, standard error included. If the command fails, the test fails with that
    output."""
    code, said = called(*command, folder=folder, **environment)
    assert code == 0, f"{' '.join(map(str, command))}\n{said}"
    return said


def failing(*command: object, folder: Path | None = None, **environment: str) -> str:
    """Runs a command that must fail; returns its output, standard error included."""
    code, said = called(*command, folder=folder, **environment)
    assert code != 0, f"{' '.join(map(str, command))}\n{said}"
    return said


def exported(library: Path) -> set[str]:
    return {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}


def undefined(*files: Path) -> set[str]:
    """Returns the symbols that a library or objects need from elsewhere, without the weak ones of the compiler's
    start-up files."""
    dynamic = ["-D"] if ".so" in files[0].name else []
    lines = run("nm", *dynamic, "--undefined-only", *files).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines if line.strip().startswith("U ")}


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[([\w-]+)", run("readelf", "-d", library)))


def declared(*headers: Path) -> set[str]:
    """Returns the functions that these headers declare, by default both."""
    text = "\n".join(header.read_text() for header in headers or (HEADER, TESTING))
    return set(re.findall(r"^APET_API [^;]*?\b(apet_\w+)\(", text, re.M))


def declared_for(library: str) -> set[str]:
    """Returns the functions that a library must export."""
    cuda = {name for name in declared() if name.startswith("apet_cuda_")}
    assert cuda
    return cuda if library == "libapet_cuda" else declared() - cuda


def version() -> str:
    """Returns the version in apet.h."""
    return ".".join(re.findall(r"^#define APET_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", HEADER.read_text(), re.M))


def used_of_torch(binding: Path) -> set[str]:
    """Returns the symbols of torch that a binding uses; fails if one is not declared by torch's C shims."""
    include = Path(util.find_spec("torch").origin).parent / "include/torch/csrc"
    shims = [include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"]
    of_torch = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", "\n".join(shim.read_text() for shim in shims)))
    assert len(of_torch) > 100
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", binding).splitlines()]
    others = {name for name in symbols if not OF_THE_RUNTIMES.search(name)}
    assert others - of_torch - declared() == set()
    return others & of_torch
