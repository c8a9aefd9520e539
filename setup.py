"""Builds the compiled libraries: setuptools calls CMake, CMake writes Ninja files, csrc/CMakeLists.txt lists sources.

A build that cannot compile the kernels fails, and prints the commands that can. It needs a compiler, torch (which the
isolated builds of uv, python -m build and poetry do not see) and, if APET_CUDA_ARCHS requires it, nvcc. Only if
APET_CUDA_ARCHS is unset, the CUDA kernels are left out without an error. An sdist needs none of these.

Build arguments are environment variables, named as for CMake and torch:
  CXX, CXXFLAGS, CMAKE_ARGS   the compiler, its flags, and arguments of CMake (-DTORCH_DIR=..., -DAPET_SANITIZE=...)
  MAX_JOBS                    the number of compilers that run at once
  APET_CUDA_ARCHS             the GPUs for which the CUDA kernels are compiled: "default", "native" (those of this
                              machine), a list as of CMAKE_CUDA_ARCHITECTURES ("80-real;90"), or "none". Unset:
                              "default" if torch has CUDA and there is an nvcc, else "none"
  CUDACXX                     the nvcc, if it is neither in CUDA_HOME nor on PATH or in /usr/local/cuda
  APET_BUILD=pure             compiles nothing: every call runs the float64 reference, slowly
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import warnings
import zlib
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent.resolve()
OLDEST_TORCH = (2, 10)  # the first with a stable ABI that has everything csrc/torch_binding.cpp uses
OLDEST_NVCC = 12
# Packages that bring a program, and their names for the folder it is in.
PROGRAM_FOLDERS = {"cmake": "CMAKE_BIN_DIR", "ninja": "BIN_DIR"}


PURE = "APET_BUILD=pure builds without compiled kernels: every call then runs the float64 reference, slowly."


def fail(message: str) -> NoReturn:
    sys.exit(f"\napet-kernels: {message}\n{PURE}")


def build_requirements() -> str:
    (listed,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    return " ".join(re.findall(r'"([\w-]+)', listed))


def no_torch() -> str:
    """The error message about a missing torch, with the commands of each build front end.

    A command has a line of its own, of at most 70 characters: uv breaks what is longer.
    """
    first = f"install torch {build_requirements()}"
    return f"""this build finds no torch >= 2.10, whose headers the kernels need (its environment: {sys.prefix}).
Install torch first, and build without isolation, which hides it; pip's isolation does not:
  pip     pip install torch
          pip install .
  uv      uv pip {first}
          uv pip install --no-build-isolation .
          (a wheel: uv build --no-build-isolation)
  build   pip {first}
          python -m build --no-isolation
  poetry  poetry run pip {first}
          poetry run pip install --no-build-isolation .
If torch is installed and pip does not find it, too, the option helps.
CMAKE_ARGS=-DTORCH_DIR=FOLDER names the folder of a torch package elsewhere."""


def find_program(*names: str) -> str | None:
    """The first of these programs that an importable package brings, or beside this Python (a virtual environment need
    not be activated), or on PATH.

    Packages first: in pip's isolated build they are what pyproject.toml requires, and `sysconfig` names the environment
    around it, which may have older ones.
    """
    folders = []
    for name in PROGRAM_FOLDERS.keys() & set(names):
        if importlib.util.find_spec(name):
            folders.append(getattr(importlib.import_module(name), PROGRAM_FOLDERS[name], ""))
    path = os.pathsep.join([*folders, sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def missing_tools() -> list[str]:
    """The tools that the build of the libraries needs and does not find."""
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

    pip's isolated build hides the environment that is installed into from `sys.path`, but not from `sysconfig`, nor the
    user's own packages from `site`. The isolated builds of uv and others are virtual environments, which do not show
    where the wheel will be installed.
    """
    named = re.search(r"-DTORCH_DIR=(\S+)", os.environ.get("CMAKE_ARGS", ""))
    spec = importlib.util.find_spec("torch")
    places = [named[1]] if named else [*((spec and spec.submodule_search_locations) or [])]
    if not named:
        places.append(os.path.join(sysconfig.get_path("platlib"), "torch"))
        if sys.prefix == sys.base_prefix:  # virtual environments have no packages of the user
            places.append(os.path.join(site.getusersitepackages(), "torch"))
    for torch in map(Path, places):
        if not (torch / "include/torch/csrc/stable/library.h").exists():
            continue
        version = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)'", (torch / "version.py").read_text())
        if version and (int(version[2]), int(version[3])) >= OLDEST_TORCH:
            return torch
        print(f"apet-kernels: the torch at {torch} is older than 2.10 and not built against.", file=sys.stderr)
    return None


def find_nvcc() -> str | None:
    """The nvcc that CUDACXX names, else that of CUDA_HOME, on PATH, or in /usr/local/cuda."""
    if "CUDACXX" in os.environ:
        return find_program(os.environ["CUDACXX"])
    home = os.environ.get("CUDA_HOME")
    return find_program(*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc")


def too_old(nvcc: str) -> str | None:
    """The version of this nvcc if it is too old, else None; also where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.\d+", said)
    return version[0].removeprefix("release ") if version and int(version[1]) < OLDEST_NVCC else None


def cuda_archs(torch: Path, nvcc: str | None) -> str:
    """The value of APET_CUDA_ARCHS for CMake; empty: no CUDA kernels."""
    wanted = os.environ.get("APET_CUDA_ARCHS", "")
    if wanted == "none":
        return ""
    if wanted:
        if not nvcc:
            fail(f"APET_CUDA_ARCHS={wanted} asks for CUDA kernels, but there is no nvcc; CUDACXX=PATH names one.")
        if old := too_old(nvcc):
            fail(
                f"APET_CUDA_ARCHS={wanted} asks for CUDA kernels, but {nvcc} is of CUDA {old}, and they need nvcc "
                f"{OLDEST_NVCC} or newer; CUDACXX=PATH names another."
            )
        return wanted
    # Compiling takes minutes, so by default it is done only if torch can run the result.
    if not re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE):
        return ""
    if not nvcc:
        print("apet-kernels: torch has CUDA but there is no nvcc: the CUDA kernels are left out.", file=sys.stderr)
        return ""
    if old := too_old(nvcc):
        print(
            f"apet-kernels: {nvcc} is of CUDA {old}, older than {OLDEST_NVCC}: the CUDA kernels are left out. "
            "CUDACXX=PATH names another nvcc.",
            file=sys.stderr,
        )
        return ""
    print("apet-kernels: compiling the CUDA kernels (minutes; APET_CUDA_ARCHS=native or none: fewer)", file=sys.stderr)
    return "default"


def commit() -> str:
    """The commit of this checkout, with "-dirty" if files differ from it; in an sdist the commit of its sources."""

    def git(*arguments: str) -> str:
        return subprocess.check_output(["git", "-C", ROOT, *arguments], text=True, stderr=subprocess.DEVNULL).strip()

    try:
        # An unpacked sdist may lie inside another repository.
        if Path(git("rev-parse", "--show-toplevel")).samefile(ROOT):
            return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        pass  # no git, or no repository
    recorded = ROOT / "COMMIT"
    return recorded.read_text().strip() if recorded.exists() else ""


def version() -> str:
    """The version in csrc/apet.h. CMake reads it there too, and Python reads it from the installed metadata."""
    header = (ROOT / "csrc/apet.h").read_text()
    return ".".join(re.findall(r"^#define APET_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)$", header, re.MULTILINE))


def run(*command: object) -> None:
    """Runs a command of the build. If it fails, the build ends without a traceback, since the output explains it."""
    words = [str(word) for word in command]
    # DESTDIR would install the libraries beside the package instead of into it.
    environment = {name: value for name, value in os.environ.items() if name not in ("DESTDIR", "CMAKE_INSTALL_MODE")}
    if code := subprocess.call(words, env=environment):
        fail(
            f"this command failed with exit code {code}, for the reason printed above:\n  {shlex.join(words)}\n"
            "CXX=... chooses another compiler (C++17: g++ 9 or clang 10, or newer), MAX_JOBS=1 needs the least memory, "
            "and APET_CUDA_ARCHS=none leaves out the CUDA kernels."
        )


def remove_libraries(package: Path) -> None:
    """Removes what an earlier build for this Python has installed, e.g. the CUDA libraries of one that had nvcc."""
    for old in [*package.glob("libapet*.so"), package / f"_host{sysconfig.get_config_var('EXT_SUFFIX')}"]:
        old.unlink(missing_ok=True)


class CMakeBuild(build_ext):
    def run(self) -> None:
        if not (torch := find_torch()):
            fail(no_torch())
        if missing := missing_tools():
            fail(
                f"the kernels cannot be compiled without {', '.join(missing)}.\n"
                f"Without build isolation, install first what the build requires: pip install {build_requirements()}\n"
                "Debian has the compiler and Python.h in g++ and python3-dev."
            )
        import pybind11

        package = Path(self.get_ext_fullpath("apet_kernels._host")).parent.resolve()
        cmake, nvcc = find_program("cmake"), find_nvcc()
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("MAX_JOBS")
        variables = {
            "CMAKE_MAKE_PROGRAM": find_program("ninja"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "APET_PYTHON": "ON",
            "TORCH_DIR": torch,
            "APET_COMMIT": commit(),
            "APET_CUDA_ARCHS": cuda_archs(torch, nvcc),
        }
        if variables["APET_CUDA_ARCHS"]:
            variables["CMAKE_CUDA_COMPILER"] = nvcc
        # The build folder outlives pip's temporary ones, so that a rebuild compiles only what changed. Its name depends
        # on the settings whose changes CMake does not notice.
        key = [str(ROOT), *(os.environ.get(name, "") for name in ("CXX", "CXXFLAGS", "CMAKE_ARGS"))]
        key += [variables["CMAKE_CUDA_COMPILER"]] if "CMAKE_CUDA_COMPILER" in variables else []
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-{zlib.crc32(repr(key).encode()):08x}"
        arguments = [f"-D{name}={value}" for name, value in variables.items()] + arguments
        run(cmake, "-S", ROOT, "-B", folder, "-G", "Ninja", *arguments)
        run(cmake, "--build", folder, *(["--parallel", jobs] if jobs else []))
        remove_libraries(package)
        run(cmake, "--install", folder, "--prefix", package, "--component", "python")
        if not (package / "libapet_torch.so").exists():
            fail(f"cmake --install left no libraries in {package}.")

    def get_outputs(self) -> list[str]:
        return []  # `cmake --install` has put them into the package


class PureBuild(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:  # an earlier build's libraries may be of other sources
            remove_libraries(ROOT / "apet_kernels")


class SourceDistribution(sdist):
    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        Path(base_dir, "COMMIT").write_text(commit() + "\n")


# setuptools warns about packages beside the sources, which every editable installation from a checkout has.
warnings.filterwarnings("ignore", r"(?s)\s*Editable installation")
build = os.environ.get("APET_BUILD", "")
if build not in ("", "pure"):
    fail(f"APET_BUILD={build} is not known.")
setup(
    version=version(),
    ext_modules=[] if build == "pure" else [Extension("apet_kernels._host", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "sdist": SourceDistribution, **({"build_py": PureBuild} if build else {})},
)
