"""Compiles csrc/cuda for the CPU with the headers of this folder: a library for ctypes, programs for the sanitizers.

Builds are stored under .build/simt/, named by a hash of all inputs, so existing ones are up to date. It needs g++ on
x86-64 (for the switch between fibers) and no part of CUDA.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import platform
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FOLDER = HERE.parents[1] / ".build/simt"

# Only explicit fma, as with nvcc -fmad=false.
FLAGS = ["-std=c++17", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra"]
FLAGS += ["-Wno-unknown-pragmas"]  # unroll
RUNTIME = ["fiber.cpp", "schedule.cpp", "sync.cpp", "launch.cpp", "collectives.cpp", "device.cpp"]
SANITIZERS = ("address", "thread")
# Ways to compile the kernels: under a sanitizer, or as for a GPU whose float64 is slow (csrc/cuda/wide.cuh).
VARIANTS = {"": ["-O2"], "slow float64": ["-O2", "-DSIMT_SLOW_FLOAT64"]} | {
    name: ["-O1", "-g", f"-fsanitize={name}", "-fno-omit-frame-pointer"] for name in SANITIZERS
}


def missing() -> str | None:
    """Returns None if kernels can be compiled for the CPU here, else the reason why not."""
    if platform.machine() != "x86_64":
        return f"fibers are written for x86-64, and this is {platform.machine()}"
    if not shutil.which("g++"):
        return "there is no g++"
    if not (CSRC / "cuda").is_dir():
        return f"the sources are not at {CSRC / 'cuda'}"
    return None


def kernels(csrc: Path = CSRC, variant: str = "", only: str = "") -> list[Path]:
    """Returns objects of the CUDA backend. For a changed copy of the sources, `only` this file is compiled again. It
    comes first, so that the linker keeps its inline functions."""
    sources = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "problem.cpp"]
    if not only:
        return _objects(sources, variant, CSRC.rglob("*.*"))
    changed = _objects([csrc / f"cuda/{only}.cu"], variant, csrc.rglob("*.*"))
    return changed + _objects([s for s in sources if s.stem != only], variant, CSRC.rglob("*.*"))


@functools.cache
def library(variant: str = "") -> Path:
    """Builds a shared library with libapet_cuda's C interface, and the runtime's functions for ctypes."""
    return _link("libsimt.so", [*kernels(variant=variant), *_runtime()], ["-shared", "-Wl,--no-undefined"])


def program(main: str, objects: list[Path], sanitizer: str = "") -> Path:
    """Builds the program of a source in this folder, with objects of the same sanitizer."""
    own = _objects([HERE / main], sanitizer, CSRC.glob("*.h"))
    return _link(Path(main).stem, [*own, *objects, *_runtime()], VARIANTS[sanitizer])


def shared(main: str) -> Path:
    """Builds the library of a source in this folder."""
    return _link(f"lib{Path(main).stem}.so", [*_objects([HERE / main]), *_runtime()], ["-shared", "-Wl,--no-undefined"])


def _runtime() -> list[Path]:
    """Builds the simulated runtime, without a sanitizer, since its accesses are not the kernel's."""
    return _objects([HERE / name for name in RUNTIME])


def _objects(sources: list[Path], variant: str = "", headers: Iterable[Path] = ()) -> list[Path]:
    flags = [*FLAGS, *VARIANTS[variant], f"-I{HERE / 'include'}"]
    read = [p for p in (*HERE.rglob("*.h"), *headers) if p.suffix in (".h", ".cuh")]
    common = digest(compiler(), *flags, *sorted(p.read_text() for p in read))

    def compile_one(source: Path) -> Path:
        csrc = source.parents[1] if source.suffix == ".cu" and source.parent != HERE else CSRC
        target = FOLDER / f"{source.stem}-{digest(common, source.name, source.read_text())}.o"
        command = ["g++", *flags, f"-I{csrc}", "-x", "c++", "-c", str(source)]
        return make(target, command)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def _link(name: str, objects: list[Path], flags: list[str]) -> Path:
    stem, dot, suffix = name.partition(".")
    target = FOLDER / f"{stem}-{digest(*map(str, objects), *flags)}{dot}{suffix}"
    return make(target, ["g++", *map(str, objects), *flags])


def make(target: Path, command: list[str]) -> Path:
    """Runs a compiler unless its output exists. Several processes may call it at once."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return target
    with open(FOLDER / f"{target.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            part = target.with_name(f"{target.name}.part")
            done = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            part.rename(target)
    return target


@functools.cache
def compiler() -> str:
    """Returns the compiler's version, and its target for -march=native, since the folder may come from another
    machine."""
    query = ["g++", "-march=native", "-Q", "--help=target"]
    return subprocess.check_output(["g++", "--version"], text=True) + subprocess.check_output(query, text=True)


def digest(*parts: str) -> str:
    """Returns a short name for all inputs of a compiler."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
