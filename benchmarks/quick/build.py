"""The libraries for one run: built here or carried from elsewhere, next to a copy of the package that loads them.

Nothing here changes the checkout or the environment. CMake builds them if cmake, ninja and pybind11 are installed; else
nvcc and g++ build only the CUDA kernels and their binding. It needs the standard library, and torch's headers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tools.sass import FLAGS, nvcc

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
CPU = ("libapet.so", "libapet_torch.so")
CUDA = ("libapet_cuda.so", "libapet_cuda_torch.so")
MANIFEST = "manifest.json"


@dataclass
class Built:
    """The contents of a folder of libraries."""

    how: str
    archs: str  # in the form of CMAKE_CUDA_ARCHITECTURES
    sources: str  # digest of csrc/
    libraries: list[str]


def sources() -> str:
    """Returns a digest of csrc/, by which libraries of other sources are detected."""
    found = hashlib.sha256()
    for path in sorted(p for p in CSRC.rglob("*") if p.is_file()):
        found.update(path.relative_to(CSRC).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def make_package(folder: Path) -> None:
    """Makes a copy of apet_kernels/ without libraries, which is imported instead of the checkout's."""
    shutil.rmtree(folder, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "apet_kernels", folder / "apet_kernels", ignore=ignore)


def build(into: Path, archs: str, jobs: int) -> Built:
    """Builds for these GPUs. Raises RuntimeError with the end of the compiler's output."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc (CUDACXX, PATH, /usr/local/cuda): the CUDA kernels cannot be built here")
    into.mkdir(parents=True, exist_ok=True)
    try:
        lacks = missing_for_cmake()
        if lacks:
            raise RuntimeError(f"there is no {lacks}")
        by_cmake(into, archs, compiler, jobs)
        how = "CMake and ninja"
    except RuntimeError as error:
        by_compilers(into, archs, compiler, jobs)
        how = f"nvcc and g++ directly, without the CPU kernels; not by CMake: {str(error).strip()[-300:]}"
    built = Built(f"{how}; {version(compiler)}", archs, sources(), [n for n in CPU + CUDA if (into / n).exists()])
    (into / MANIFEST).write_text(json.dumps(vars(built), indent=1) + "\n")
    return built


def take(carried: Path, into: Path) -> Built:
    """Takes libraries that `benchmarks.gpu_carry` made: a folder, or its archive. Raises RuntimeError for others."""
    into.mkdir(parents=True, exist_ok=True)
    if carried.is_file():
        with tarfile.open(carried) as archive:
            for member in archive.getmembers():
                if member.isfile() and member.name in (*CPU, *CUDA, MANIFEST):
                    archive.extract(member, into)
    elif carried.is_dir():
        for name in (*CPU, *CUDA, MANIFEST):
            if (carried / name).exists():
                shutil.copy(carried / name, into)
    if not (into / MANIFEST).exists():
        raise RuntimeError(f"{carried} holds no {MANIFEST}: python -m benchmarks.gpu_carry makes such an archive")
    found = Built(**json.loads((into / MANIFEST).read_text()))
    if found.sources != sources():
        raise RuntimeError(
            f"the libraries in {carried} are of other sources ({found.sources}) than {CSRC} ({sources()})"
        )
    found.how = f"carried; built by {found.how}"
    return found


def missing_for_cmake() -> str:
    """Returns what the build by CMake needs and is not installed; empty if nothing is missing."""
    programs = [name for name in ("cmake", "ninja") if not shutil.which(name)]
    return ", ".join(programs + [name for name in ("pybind11",) if importlib.util.find_spec(name) is None])


def torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("there is no torch")
    return Path(spec.submodule_search_locations[0])


def version(compiler: str) -> str:
    """Returns the version of nvcc."""
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release [\d.]+, V([\d.]+)", said)
    return f"nvcc {found[1]}" if found else "nvcc of unknown version"


def by_cmake(into: Path, archs: str, compiler: str, jobs: int) -> None:
    """Runs the repository's own build, for the libraries alone."""
    import pybind11

    folder = into / "cmake"
    variables = {
        "APET_PYTHON": "ON",
        "APET_CUDA_ARCHS": archs,
        "CMAKE_CUDA_COMPILER": compiler,
        "TORCH_DIR": torch_folder(),
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{name}={value}" for name, value in variables.items()))
    targets = [Path(name).stem.removeprefix("lib") for name in CPU + CUDA]
    run("cmake", "--build", folder, "--parallel", jobs, "--target", *targets)
    for name in CPU + CUDA:
        shutil.copy(next(folder.rglob(name)), into / name)
    shutil.rmtree(folder)


def by_compilers(into: Path, archs: str, compiler: str, jobs: int) -> None:
    """Compiles the same sources with the same flags (tests/test_sass.py compares them), a process for each file."""
    objects, torch = into / "objects", torch_folder()
    objects.mkdir(exist_ok=True)
    host = "-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-fno-fast-math,-ffp-contract=off"
    common = [compiler, *FLAGS, *gencode(archs), f"-Xcompiler={host}", f"-I{CSRC}"]
    files = [*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "problem.cpp"]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda file: run(*common, "-c", file, "-o", objects / f"{file.name}.o"), files))
    library, binding = (into / name for name in CUDA)
    made = [objects / f"{file.name}.o" for file in files]
    run(compiler, "-shared", "-cudart", "static", "-Xlinker", "--exclude-libs,ALL", "-o", library, *made)
    run(
        *("g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-DUSE_CUDA"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{CSRC}", f"-isystem{torch / 'include'}"),
        *(CSRC / "cuda_torch_binding.cpp", CSRC / "problem.cpp", library, "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed"),
        *(torch / "lib/libtorch.so", torch / "lib/libtorch_cpu.so", "-o", binding),
    )
    shutil.rmtree(objects)


def gencode(archs: str) -> list[str]:
    """Returns nvcc's form of a list in the form of CMAKE_CUDA_ARCHITECTURES: "90-real" machine code, "90" with PTX
    beside it."""
    options = []
    for arch in archs.split(";"):
        number, _, kind = arch.partition("-")
        code = f"sm_{number}" if kind == "real" else f"[sm_{number},compute_{number}]"
        options.append(f"-gencode=arch=compute_{number},code={code}")
    return options


def run(*words: object) -> None:
    """Runs a compiler. Raises RuntimeError with the end of its output."""
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(str(words[0])).name} failed: {(done.stdout + done.stderr).strip()[-600:]}")


def cores() -> int:
    return int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0)))
