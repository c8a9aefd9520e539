"""Builds the compiled libraries: setuptools calls CMake, CMake writes Ninja files, csrc/CMakeLists.txt lists sources.

What is missing is left out, with one sentence that says so (`pip install -v` shows it):
no compiler -> a pure wheel, whose ops run on the reference; no torch headers -> everything but the torch binding;
no nvcc, or a torch without CUDA -> no CUDA kernels.

Build arguments, from the environment as CMake's and torch's builders know them:
  CXX, CXXFLAGS, CMAKE_ARGS   the compiler, its flags, and anything for CMake (-DTORCH_DIR=..., -DAPET_SANITIZE=...)
  MAX_JOBS                    how many compilers run at once
  APET_CUDA_ARCHS             the GPUs that the CUDA kernels are compiled for: "default", "native" (those of this
                              machine), a list as of CMAKE_CUDA_ARCHITECTURES ("80-real;90"), or "none". Unset:
                              "default" where torch has CUDA and there is an nvcc, else "none"
  CUDACXX                     the nvcc, where it is neither on PATH nor in CUDA_HOME or /usr/local/cuda
  APET_REQUIRE_NATIVE=1       fail, instead of leaving something out (CUDA kernels: if APET_CUDA_ARCHS asks for them)
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)  # the first whose stable ABI has all that csrc/torch_binding.cpp uses


def leave_out(sentence: str) -> None:
    if os.environ.get("APET_REQUIRE_NATIVE", "0") not in ("", "0"):
        sys.exit(f"apet-kernels: APET_REQUIRE_NATIVE is set, but {sentence}")
    print(f"apet-kernels: {sentence}", file=sys.stderr)


def find_program(*names: str) -> str | None:
    """The first of these programs beside this Python (a virtual environment need not be activated) or on PATH."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def missing_tools() -> list[str]:
    """What the libraries cannot be built without and is not there."""
    compiler = shlex.split(os.environ.get("CXX", ""))[:1] or ["c++", "g++", "clang++"]
    needs = {
        "Linux": sys.platform == "linux",
        "a C++ compiler": find_program(*compiler),
        "cmake": find_program("cmake"),
        "ninja": find_program("ninja"),
        "pybind11": importlib.util.find_spec("pybind11"),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").exists(),
    }
    return [name for name, found in needs.items() if not found]


def find_torch() -> Path | None:
    """The torch package to build against, found without importing it.

    pip's isolated build hides the environment that is installed into from `sys.path`, but not from `sysconfig`.
    """
    spec = importlib.util.find_spec("torch")
    places = list(spec.submodule_search_locations or []) if spec else []
    places.append(os.path.join(sysconfig.get_path("platlib"), "torch"))
    for torch in map(Path, places):
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
        if version and (int(version[2]), int(version[3])) >= OLDEST_TORCH:
            return torch
        print(f"apet-kernels: the torch at {torch} is older than 2.10 and not built against.", file=sys.stderr)
    return None


def find_nvcc() -> str | None:
    if "CUDACXX" in os.environ:
        return find_program(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    return find_program("nvcc", *(f"{home}/bin/nvcc" for home in homes if home))


def cuda_archs(torch: Path | None, nvcc: str | None) -> str:
    """What CMake is told as APET_CUDA_ARCHS; empty: no CUDA kernels."""
    wanted = os.environ.get("APET_CUDA_ARCHS", "")
    if wanted == "none":
        return ""
    if wanted:
        if not nvcc:
            leave_out(f"there is no nvcc, so the CUDA kernels that APET_CUDA_ARCHS={wanted} asks for are left out.")
        return wanted if nvcc else ""
    # Compiling takes minutes: unasked, only where a torch will run the result.
    if not torch or not re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE):
        return ""
    if not nvcc:
        print("apet-kernels: torch has CUDA but there is no nvcc: the CUDA kernels are left out.", file=sys.stderr)
        return ""
    print("apet-kernels: compiling the CUDA kernels (minutes; APET_CUDA_ARCHS=native or none: fewer)", file=sys.stderr)
    return "default"


def commit() -> str:
    """The commit of this checkout, "-dirty" if files differ from it; in an sdist the one that it was made from."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True, stderr=subprocess.DEVNULL).strip()

    try:
        # An unpacked sdist may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).samefile(ROOT):
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no repository
    recorded = ROOT / "COMMIT"
    return recorded.read_text().strip() if recorded.exists() else ""


def version() -> str:
    """csrc/apet.h is the only place: CMake reads it there too, Python from the installed metadata."""
    header = (ROOT / "csrc/apet.h").read_text()
    return ".".join(re.findall(r"^#define APET_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header, re.MULTILINE))


class CMakeBuild(build_ext):
    def run(self) -> None:
        import pybind11

        package = Path(self.get_ext_fullpath("apet_kernels._host")).parent.resolve()
        cmake, torch, nvcc = find_program("cmake"), find_torch(), find_nvcc()
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        if not torch and not any(argument.startswith("-DTORCH_DIR=") for argument in arguments):
            leave_out(
                "no torch >= 2.10 is installed where this is built, so the torch binding is left out; "
                "install torch first, then apet-kernels again (CMAKE_ARGS=-DTORCH_DIR=... names one elsewhere)."
            )
        variables = {
            "CMAKE_MAKE_PROGRAM": find_program("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "APET_PYTHON": "ON",
            "TORCH_DIR": torch or "",
            "APET_COMMIT": commit(),
            "APET_CUDA_ARCHS": cuda_archs(torch, nvcc),
        }
        if variables["APET_CUDA_ARCHS"]:
            variables["CMAKE_CUDA_COMPILER"] = nvcc
        # A folder that outlives pip's temporary ones, so that a rebuild compiles only what changed; one for each of the
        # things that CMake does not notice when they change.
        key = [str(ROOT), *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CMAKE_ARGS"))]
        key += [variables["CMAKE_CUDA_COMPILER"]] if "CMAKE_CUDA_COMPILER" in variables else []
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{zlib.crc32(repr(key).encode()):08x}"
        arguments = [f"-D{name}={value}" for name, value in variables.items()] + arguments
        subprocess.check_call([cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *arguments])
        subprocess.check_call([cmake, "--build", folder, *(["--parallel", jobs] if jobs else [])])
        for old in [*package.glob("libapet*.so"), *package.glob("_host*.so")]:
            old.unlink()  # e.g. the torch binding of an earlier build that had torch
        subprocess.check_call([cmake, "--install", folder, "--prefix", package, "--component", "python"])

    def get_outputs(self) -> list[str]:
        return []  # `cmake --install` has put them into the package


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(commit() + "\n")


missing = missing_tools()
if missing:
    leave_out(f"the compiled kernels are left out: they need {', '.join(missing)}. The ops will run on the reference.")
setup(
    version=version(),
    ext_modules=[] if missing else [Extension("apet_kernels._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "sdist": SourceDistribution},
)
