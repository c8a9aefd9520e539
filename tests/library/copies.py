"""Copies of the library as other projects use it: the files that the guide lists, every way to build it, and calls."""

from __future__ import annotations

import ctypes
import fcntl
import re
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import apet_kernels
from tests.binaries import run, version
from tests.simt import abi
from tests.simt import build as simt_build
from tests.simt import call as simt_call

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
HEADER = CSRC / "apet.h"
SOURCES = Path(__file__).parent
GUIDE = ROOT / "docs/vendoring.md"
EXAMPLE = ROOT / "examples/vendor"
FOLDER = ROOT / ".build/library"
CMAKE = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
CUDA_HEADERS = Path("/usr/local/cuda/include")
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]

needs_sources = pytest.mark.skipif(
    not (CMAKE and shutil.which("g++") and HEADER.exists()), reason="needs cmake, g++ and the sources"
)
needs_op = pytest.mark.skipif("cpu" not in apet_kernels.available_backends(), reason="there are no compiled kernels")


# ---- the guide -------------------------------------------------------------------------------------------------------


def block(mark: str) -> str:
    """Returns the guide's code block under <!-- mark -->."""
    (text,) = re.findall(rf"^<!-- {mark} -->\n```\w*\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    return text


def listed(*parts: str) -> set[str]:
    """Returns the files that the guide lists for these parts, relative to csrc/."""
    return {name for part in parts for name in block(f"files: {part}").split()}


def copy_listed(folder: Path, *parts: str) -> Path:
    """Makes a copy of csrc/ in `folder` with exactly these files."""
    for name in listed(*parts):
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CSRC / name, folder / "csrc" / name)
    return folder / "csrc"


# ---- every way to build: once for all processes of a test run, and again only if an input changes -------------------


def built(name: str, make: Callable[[Path], None]) -> Path:
    """Returns a folder that `make` has filled."""
    folder = FOLDER / name
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read = [GUIDE, ROOT / "CMakeLists.txt", Path(__file__)]
        files = (path for source in (CSRC, SOURCES, EXAMPLE) for path in source.rglob("*.*"))
        read += sorted(path for path in files if path.parent.name != "__pycache__")
        texts = [path.read_text() for path in read]
        now = simt_build.digest(run("g++", "--version"), run(CMAKE, "--version"), *texts)
        made = folder / "made-of"
        if not made.exists() or made.read_text() != now:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            made.write_text(now)
    return folder


def bump(header: Path) -> str:
    """Changes the header's version to the next minor one; returns that version."""
    text = header.read_text()
    major, minor, patch = map(int, version().split("."))
    line = "#define APET_VERSION_MINOR {}\n"
    header.write_text(text.replace(line.format(minor), line.format(minor + 1)))
    assert header.read_text() != text
    return f"{major}.{minor + 1}.{patch}"


def cmake(source: Path, folder: Path, *options: str) -> None:
    run(CMAKE, "-S", source, "-B", folder, *options)
    run(CMAKE, "--build", folder, "--parallel", "2")


def make_installed(folder: Path) -> None:
    """Installs the package as the guide says, from the files that it lists, and then moves it; -O1 instead of -O3, as
    below."""
    copy_listed(folder, "cpu", "cmake")
    commands = block("commands: install")
    shared = "-DBUILD_SHARED_LIBS=ON"
    assert "/opt/apet" in commands
    assert shared in commands
    commands = commands.replace(shared, f"{shared} -DCMAKE_CXX_FLAGS_RELEASE=-O1")
    run("sh", "-ec", commands.replace("/opt/apet", str(folder / "first")), folder=folder, PATH=path())
    (folder / "first").rename(folder / "moved")
    shutil.rmtree(folder / "build")


def make_example(folder: Path) -> None:
    """Builds the example as in its README, with the moved package."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.M | re.S)
    assert "/opt/apet" in commands
    commands = commands[: commands.index("build/vendor/compress")]  # running it needs tokens
    (folder / "examples").mkdir()
    shutil.copytree(EXAMPLE, folder / "examples/vendor")
    prefix = built("installed", make_installed) / "moved"
    run("sh", "-ec", commands.replace("/opt/apet", str(prefix)), folder=folder, PATH=path())


def make_by_hand(folder: Path) -> None:
    """Builds by the guide's commands, except for -O3, which takes a compiler four times as long and changes no bit
    (`newer`)."""
    copy_listed(folder, "cpu")
    commands = block("commands: cpu")
    assert "-O3" in commands
    run("sh", "-ec", commands.replace("-O3", "-O1"), folder=folder)
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DAPET_STATIC", "-Wl,--no-undefined"]
    run("g++", *flags, f"-I{folder}/csrc", SOURCES / "engine.cpp", folder / "libapet.a", "-o", folder / "libengine.so")


def make_inside(folder: Path) -> None:
    """Builds a copy of csrc/ inside a project that has harmful compiler flags and no build type."""
    copy_listed(folder, "cpu", "cmake")
    shutil.copy(SOURCES / "engine.cpp", folder)
    (folder / "CMakeLists.txt").write_text("""
        cmake_minimum_required(VERSION 3.25)
        project(engine LANGUAGES CXX)
        set(CMAKE_CXX_STANDARD 20)
        set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
        add_compile_options(-ffast-math -ffp-contract=fast)
        add_subdirectory(csrc EXCLUDE_FROM_ALL)
        add_library(engine SHARED engine.cpp)
        set_target_properties(engine PROPERTIES CXX_VISIBILITY_PRESET hidden)
        target_link_libraries(engine PRIVATE apet::cpu)
        install(TARGETS engine)
        """)
    run(CMAKE, "-S", folder, "-B", folder / "flags")  # only the compiler flags of this build are read
    cmake(folder, folder / "build", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG")
    run(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")


def make_newer(folder: Path) -> None:
    """Builds the whole repository's C++ files, of the next version, inside a project; shared, hardly optimised."""
    (folder / "apet/tests").mkdir(parents=True)
    shutil.copy(ROOT / "CMakeLists.txt", folder / "apet")
    shutil.copytree(CSRC, folder / "apet/csrc")
    bump(folder / "apet/csrc/apet.h")
    (folder / "CMakeLists.txt").write_text("""
        cmake_minimum_required(VERSION 3.25)
        project(engine LANGUAGES CXX)
        set(BUILD_SHARED_LIBS ON)
        set(CMAKE_CXX_FLAGS_RELEASE "-O1 -DNDEBUG")
        add_subdirectory(apet)
        """)
    cmake(folder, folder / "build")
    run(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")


def path() -> str:
    """Returns PATH, with the folder of this environment's cmake first."""
    return f"{Path(CMAKE).parent}:/usr/bin:/bin"


# ---- calls -----------------------------------------------------------------------------------------------------------


class Plan(ctypes.Structure):
    """The struct apet_cpu_plan_t for ctypes."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("isa", "images_in_flight", "threads_per_image")),
        ("workspace_bytes", ctypes.c_size_t),
        ("estimated_ns", ctypes.c_double * 2),
    ]


ISAS = (
    "generic",
    "avx2",
    "avx512",
    "avx512_bf16",
    "best",
    "neon",
    "neon_bf16",
    "amx",
    "amx_fp16",
)  # by their numbers in apet.h


@dataclass(frozen=True)
class Copy:
    """One loaded copy of the library, with its prefix of function names."""

    library: ctypes.CDLL
    prefix: str

    def function(self, name: str):
        return getattr(self.library, self.prefix + name)

    def version(self) -> str:
        function = self.function("version")
        function.restype = ctypes.c_char_p
        return function().decode()

    def use_isa(self, name: str) -> bool:
        return self.function("use_isa")(ISAS.index(name)) == 0

    def plan(self, problem: abi.Problem) -> Plan:
        plan = Plan()
        assert self.function("plan")(ctypes.byref(problem), 1, ctypes.byref(plan)) == 0
        return plan

    def compress(self, x: Tensor, keep: int, **options: object) -> list[Tensor]:
        """Returns tokens and indices, computed on the calling thread."""
        case = simt_call.compress_case(x, keep, **options)
        plan = self.plan(case.problem)
        room = torch.empty(plan.workspace_bytes + 64, dtype=torch.uint8)
        pointers = {name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()}
        status = self.function("run")(
            ctypes.byref(case.problem),
            ctypes.byref(abi.Tensors(**pointers)),
            None,
            ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64),
            ctypes.c_size_t(plan.workspace_bytes),
        )
        assert status == 0
        return list(case.outputs.values())


class Exported(Copy):
    """A copy whose functions have the header's names."""

    def function(self, name: str):
        return getattr(self.library, f"apet_{name}" if name == "version" else f"apet_cpu_{name}")


def installed() -> Copy:
    return Exported(ctypes.CDLL(str(built("installed", make_installed) / "moved/lib/libapet.so")), "")


def by_hand() -> Copy:
    return Copy(ctypes.CDLL(str(built("by_hand", make_by_hand) / "libengine.so")), "engine_")


def inside() -> Copy:
    return Copy(ctypes.CDLL(str(built("inside", make_inside) / "prefix/lib/libengine.so")), "engine_")


def newer() -> Copy:
    return Exported(ctypes.CDLL(str(built("newer", make_newer) / "prefix/lib/libapet.so")), "")


COPIES = [installed, by_hand, inside, newer]


def each(*copies: Callable[[], Copy]) -> pytest.MarkDecorator:
    """Parametrises `copy` with these copies. All but the installed one are slow, since each compiles the library."""
    parameters = [copy if copy is installed else pytest.param(copy, marks=pytest.mark.slow) for copy in copies]
    return pytest.mark.parametrize("copy", parameters, ids=lambda copy: copy.__name__)
