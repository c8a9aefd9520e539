"""csrc/ as other projects take it in: installed, inside their build, by hand; what docs/vendoring.md promises of it."""

from __future__ import annotations

import ctypes
import fcntl
import json
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import apet_kernels
from apet_kernels import testing
from tests.binaries import RUNTIMES, declared, declared_for, exported, needed, run, undefined, version
from tests.data import DTYPES, tokens
from tests.judge import assert_same
from tests.simt import build as simt_build
from tests.simt import call as simt_call
from tests.tools import sass

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc"
HEADER = CSRC / "apet.h"
SOURCES = Path(__file__).parent / "library"
GUIDE = ROOT / "docs/vendoring.md"
EXAMPLE = ROOT / "examples/vendor"
FOLDER = ROOT / ".build/library"
CMAKE = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
CUDA_HEADERS = Path("/usr/local/cuda/include")
STRICT = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]

pytestmark = pytest.mark.skipif(
    not (CMAKE and shutil.which("g++") and HEADER.exists()), reason="needs cmake, g++ and the sources"
)
needs_op = pytest.mark.skipif("cpu" not in apet_kernels.available_backends(), reason="there are no compiled kernels")


# ---- the guide -------------------------------------------------------------------------------------------------------


def block(mark: str) -> str:
    """What stands in the guide's code block under <!-- mark -->."""
    (text,) = re.findall(rf"^<!-- {mark} -->\n```\w*\n(.*?)^```$", GUIDE.read_text(), re.M | re.S)
    return text


def listed(*parts: str) -> set[str]:
    """The files that the guide lists for these parts, relative to csrc/."""
    return {name for part in parts for name in block(f"files: {part}").split()}


def copy_listed(folder: Path, *parts: str) -> Path:
    """A copy of csrc/ in folder that holds these files and no other."""
    for name in listed(*parts):
        (folder / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CSRC / name, folder / "csrc" / name)
    return folder / "csrc"


# ---- every way to build, once for all processes of a test run, and until what goes in changes ------------------------


def built(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` has filled."""
    folder = FOLDER / name
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        read = [GUIDE, ROOT / "CMakeLists.txt", Path(__file__)]
        read += sorted(path for source in (CSRC, SOURCES, EXAMPLE) for path in source.rglob("*.*"))
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
    """Makes the header that of the next minor version; returns that."""
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
    """As the guide says, from the files that it lists, and then moved."""
    copy_listed(folder, "cpu", "cmake")
    commands = block("commands: install")
    assert "/opt/apet" in commands
    run("sh", "-ec", commands.replace("/opt/apet", str(folder / "first")), folder=folder, PATH=path())
    (folder / "first").rename(folder / "moved")
    shutil.rmtree(folder / "build")


def make_example(folder: Path) -> None:
    """As its README says, beside the package that was moved."""
    (commands,) = re.findall(r"^```sh\n(.*?)^```$", (EXAMPLE / "README.md").read_text(), re.M | re.S)
    assert "/opt/apet" in commands
    commands = commands[: commands.index("build/vendor/compress")]  # which needs tokens: see below
    (folder / "examples").mkdir()
    shutil.copytree(EXAMPLE, folder / "examples/vendor")
    prefix = built("installed", make_installed) / "moved"
    run("sh", "-ec", commands.replace("/opt/apet", str(prefix)), folder=folder, PATH=path())


def make_by_hand(folder: Path) -> None:
    """As the guide says, but for -O3, which is four times the work of a compiler and changes no bit (`newer`)."""
    copy_listed(folder, "cpu")
    commands = block("commands: cpu")
    assert "-O3" in commands
    run("sh", "-ec", commands.replace("-O3", "-O1"), folder=folder)
    flags = ["-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-DAPET_STATIC", "-Wl,--no-undefined"]
    run("g++", *flags, f"-I{folder}/csrc", SOURCES / "engine.cpp", folder / "libapet.a", "-o", folder / "libengine.so")


def make_inside(folder: Path) -> None:
    """A copy of csrc/ inside of a project with flags of its own, all of which harm; that says no build type."""
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
    run(CMAKE, "-S", folder, "-B", folder / "flags")  # of which only the flags are read
    cmake(folder, folder / "build", "-DCMAKE_CXX_FLAGS_RELEASE=-O1 -DNDEBUG")
    run(CMAKE, "--install", folder / "build", "--prefix", folder / "prefix")


def make_newer(folder: Path) -> None:
    """The whole repository's files for C++, of the next version, inside of a project; shared, hardly optimised."""
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
    """PATH with the cmake that is used here in front."""
    return f"{Path(CMAKE).parent}:/usr/bin:/bin"


# ---- calling them ----------------------------------------------------------------------------------------------------


class Plan(ctypes.Structure):
    """apet_cpu_plan_t."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("isa", "images_in_flight", "threads_per_image")),
        ("workspace_bytes", ctypes.c_size_t),
        ("estimated_ns", ctypes.c_double * 2),
    ]


ISAS = ("generic", "avx2", "avx512", "avx512_bf16", "best")


@dataclass(frozen=True)
class Copy:
    """One copy of the library, loaded; with the functions' names before what they have in common."""

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

    def plan(self, problem: simt_call.Problem) -> Plan:
        plan = Plan()
        assert self.function("plan")(ctypes.byref(problem), 1, ctypes.byref(plan)) == 0
        return plan

    def compress(self, x: Tensor, keep: int, **options: object) -> list[Tensor]:
        """tokens and indices, on the calling thread."""
        case = simt_call.compress_case(x, keep, **options)
        plan = self.plan(case.problem)
        room = torch.empty(plan.workspace_bytes + 64, dtype=torch.uint8)
        pointers = {name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()}
        status = self.function("run")(
            ctypes.byref(case.problem),
            ctypes.byref(simt_call.Tensors(**pointers)),
            None,
            ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64),
            ctypes.c_size_t(plan.workspace_bytes),
        )
        assert status == 0
        return list(case.outputs.values())


class Exported(Copy):
    """One whose functions have the header's names."""

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


def cases() -> list[tuple[Tensor, int, dict[str, object]]]:
    """Arguments of compress: every dtype and layout; tokens that fast math would not survive among them."""
    hostile = tokens(2, 90, 40, seed=3)
    hostile[0, 7, 3], hostile[0, 50, 0], hostile[1, 0] = float("nan"), float("inf"), 0
    everyday = [
        (tokens(3, 200, 65, dtype=dtype, kind="clustered"), 24, {"layout": layout})
        for dtype in DTYPES
        for layout in ("inplace", "overwrite", "append")
    ]
    return [*everyday, (hostile, 20, {}), (hostile, 20, {"select": "qr"})]


@needs_op
@pytest.mark.parametrize(
    "copy",
    [COPIES[0], *(pytest.param(copy, marks=pytest.mark.slow) for copy in COPIES[1:])],  # each compiles the library
    ids=lambda copy: copy.__name__,
)
def test_every_way_of_building_gives_the_bits_of_the_op(copy: Callable[[], Copy]):
    library = copy()
    checked = 0
    for isa in testing.cpu_isa():
        assert library.use_isa(isa), isa
        testing.use_cpu_isa(isa)
        try:
            for x, keep, options in cases():
                expected = torch.ops.apet.compress(x, keep, **options)
                for got, wanted in zip(library.compress(x, keep, **options), expected, strict=True):
                    assert_same(got, wanted, f"{isa}, {x.dtype}, {options}")
                checked += 1
        finally:
            testing.use_cpu_isa(None)
            library.use_isa("best")
    assert checked >= 11


def test_the_guide_lists_what_is_compiled_and_nothing_else():
    """By what the compiler reads, for CUDA with the headers of the simulated GPU."""
    have = [f"-DAPET_HAVE_{isa}" for isa in ("AVX2", "AVX512", "AVX512_BF16")]
    vectors = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"]

    def read(parts: str, *options: object) -> set[str]:
        sources = [CSRC / name for name in listed(parts) if name.endswith((".cpp", ".cu"))]
        rules = run("g++", "-std=c++17", "-MM", "-x", "c++", *options, *sources).replace("\\\n", " ")
        paths = [Path(word) for word in rules.split() if not word.endswith(":")]
        return {str(p.resolve().relative_to(CSRC)) for p in paths if p.resolve().is_relative_to(CSRC)}

    assert read("cpu", *have, *vectors) == listed("cpu")
    assert read("cuda", f"-I{SOURCES.parent / 'simt/include'}") - listed("cpu") == listed("cuda")
    rest = {str(p.relative_to(CSRC)) for p in CSRC.rglob("*") if p.is_file()} - listed("cpu", "cuda", "cmake")
    assert rest == {"torch_binding.cpp", "cuda_torch_binding.cpp", "torch_ops.h", "host_module.cpp", "build_info.h.in"}


def test_flags_of_a_project_around_it_do_not_reach_it():
    commands = json.loads((built("inside", make_inside) / "flags/compile_commands.json").read_text())
    ours = {Path(c["file"]).name: c["command"].split() for c in commands if "/csrc/" in c["file"]}
    assert set(ours) == {Path(name).name for name in listed("cpu") if name.endswith(".cpp")}
    for name, words in ours.items():
        assert "-ffast-math" in words, "the project's flags are the test"
        assert words.index("-fno-fast-math") > words.index("-ffast-math"), name
        assert words.index("-ffp-contract=off") > words.index("-ffp-contract=fast"), name
        assert "-O3" in words, name
        assert "-std=c++17" in words, name


def test_a_project_around_it_installs_nothing_of_it():
    prefix = built("inside", make_inside) / "prefix"
    assert [p.name for p in prefix.rglob("*") if p.is_file()] == ["libengine.so"]


@pytest.mark.parametrize("copy", [by_hand, inside], ids=lambda copy: copy.__name__)
def test_an_engine_exports_nothing_of_the_copy_inside(copy: Callable[[], Copy]):
    assert exported(Path(copy().library._name)) == {f"engine_{name}" for name in ("version", "plan", "run", "use_isa")}


# ---- the installed package -------------------------------------------------------------------------------------------


def test_what_is_installed():
    prefix = built("installed", make_installed) / "moved"
    full, abi = version(), ".".join(version().split(".")[:2])
    files = {str(p.relative_to(prefix)) for p in prefix.rglob("*") if not p.is_dir()}
    package = {f"lib/cmake/apet/apet-{name}.cmake" for name in ("config", "config-version", "cpu", "cpu-release")}
    assert files == {"include/apet.h", "lib/libapet.so", f"lib/libapet.so.{abi}", f"lib/libapet.so.{full}"} | package
    for name in package:
        assert str(FOLDER) not in (prefix / name).read_text(), f"{name} knows where it was built"


def find(folder: Path, request: str, prefix: Path) -> tuple[int, str]:
    """Exit code and output of a project that asks for the package."""
    (folder / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.25)
        project(user LANGUAGES CXX)
        find_package(apet {request})
        message(STATUS "found ${{apet_FOUND}}, version ${{apet_VERSION}}, cuda ${{apet_cuda_FOUND}}")
        """)
    command = [CMAKE, "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.mark.parametrize("request_", ["REQUIRED", "0.1 REQUIRED", "0.1.0 EXACT REQUIRED COMPONENTS cpu"])
def test_find_package_finds(tmp_path: Path, request_: str):
    code, said = find(tmp_path, request_, built("installed", make_installed) / "moved")
    assert code == 0, said
    assert f"found 1, version {version()}, cuda FALSE" in said


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ("0.0 REQUIRED", 'compatible with requested version "0.0"'),
        ("0.2 REQUIRED", 'compatible with requested version "0.2"'),
        ("1 REQUIRED", 'compatible with requested version "1"'),
        ("REQUIRED COMPONENTS cuda", "apet has no component cuda here: its CUDA kernels are not installed"),
        ("REQUIRED COMPONENTS rocm", "apet has no component rocm here"),
    ],
)
def test_find_package_refuses(tmp_path: Path, request_: str, message: str):
    code, said = find(tmp_path, request_, built("installed", make_installed) / "moved")
    assert code != 0
    assert message in said, said


def test_an_optional_component_that_is_missing_is_no_failure(tmp_path: Path):
    prefix = built("installed", make_installed) / "moved"
    code, said = find(tmp_path, "OPTIONAL_COMPONENTS cuda", prefix)
    assert code == 0, said
    assert f"found 1, version {version()}, cuda FALSE" in said


# ---- the header and the binary interface -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compiler", "language", "file"),
    [
        ("cc", ["-std=c99"], "header.c"),
        ("cc", ["-std=c11"], "header.c"),
        ("c++", ["-std=c++17", "-x", "c++"], "header.c"),
        ("cc", ["-std=c11"], "abi.c"),
        ("c++", ["-std=c++17", "-x", "c++"], "abi.c"),
    ],
    ids=["c99", "c11", "c++17", "abi-c11", "abi-c++17"],
)
@pytest.mark.parametrize("static", [[], ["-DAPET_STATIC"]], ids=["shared", "static"])
def test_header_compiles(tmp_path: Path, compiler: str, language: list[str], file: str, static: list[str]):
    if not shutil.which(compiler):
        pytest.skip(f"{compiler} is not installed")
    run(compiler, *language, *STRICT, *static, "-I", CSRC, "-c", SOURCES / file, "-o", tmp_path / "object.o")


def header_code() -> str:
    return re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.S)


def test_abi_pins_all_of_the_header():
    """Every type, member, enumerator and function of apet.h stands in tests/library/abi.c."""
    code, pinned = header_code(), re.sub(r"\s+", " ", (SOURCES / "abi.c").read_text())
    found = re.findall(r"typedef (?:struct|enum) \w+ \{(.*?)\} (\w+);", code, re.S)
    bodies = {name: body for body, name in found}
    assert len(bodies) == 13
    wanted = {f"SIZE({name}, " for name in bodies}
    for name, body in bodies.items():
        if "," in body and ";" not in body:
            wanted |= {f"VALUE({enumerator}, " for enumerator in re.findall(r"APET_\w+", body)}
        else:
            declarators = re.findall(r"\(\*(\w+)\)\(|(\w+)(?:\[\d+\])?;", body)
            wanted |= {f"MEMBER({name}, {pointer or plain}, " for pointer, plain in declarators}
    wanted |= {f"{name}(" for name in declared()} | {"VALUE(APET_MAX_BASIS, "}
    assert len(wanted) > 110
    assert {entry for entry in wanted if entry not in pinned} == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int64_t keep; ", "int32_t keep; "),
        ("int32_t images_in_flight; ", "int32_t images_in_flight, more; "),
        ("APET_QR = 1", "APET_QR = 2"),
        ("#define APET_VERSION_MINOR 1", "#define APET_VERSION_MINOR 2"),
        ("apet_check(const apet_problem* problem)", "apet_check(apet_problem* problem)"),
    ],
    ids=["member", "added", "enumerator", "version", "function"],
)
def test_abi_notices_a_change(tmp_path: Path, old: str, new: str):
    text = re.sub(r" +", " ", HEADER.read_text())
    assert old in text
    (tmp_path / "apet.h").write_text(text.replace(old, new))
    shutil.copy(SOURCES / "abi.c", tmp_path)
    done = subprocess.run(
        ["cc", "-std=c11", "-c", tmp_path / "abi.c", "-o", tmp_path / "abi.o"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "the binary interface has changed" in done.stderr or "conflicting types" in done.stderr


def test_every_status_has_a_message_and_no_other_number():
    library = installed().library
    library.apet_error_message.restype = ctypes.c_size_t
    messages = set()
    problem = simt_call.Problem()
    numbers = simt_call.status_numbers()
    assert len(numbers) == 25
    for status in [*numbers.values(), 25]:
        text = ctypes.create_string_buffer(256)
        length = library.apet_error_message(ctypes.byref(problem), status, text, ctypes.c_size_t(256))
        assert length == len(text.value) < 256
        assert library.apet_error_message(None, status, None, ctypes.c_size_t(0)) > 0
        cut = ctypes.create_string_buffer(b"xxxxxxxx", 8)
        assert library.apet_error_message(ctypes.byref(problem), status, cut, ctypes.c_size_t(5)) == length
        assert cut.raw[:4] + cut.raw[4:] == text.value[:4] + b"\0xxx"
        messages.add(text.value.decode())
    assert len(messages) == 26
    assert {s for s in messages if "unknown" in s} == {"status 25 is unknown"}


@pytest.mark.parametrize("op", ["SCORE", "MERGE"])
def test_ragged_images_can_only_be_compressed(op: str):
    """score and merge lay their results out by image, and would write past them."""
    library = installed().library
    cu_seqlens, cu_keep = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 10, 30], [0, 4, 9]))
    problem = simt_call.compress_varlen_case(tokens(30, 8), cu_seqlens, cu_keep, 9, 20, 5).problem
    assert library.apet_check(ctypes.byref(problem)) == 0
    problem.op = getattr(simt_call, op)
    status = library.apet_check(ctypes.byref(problem))
    text = ctypes.create_string_buffer(256)
    library.apet_error_message(ctypes.byref(problem), status, text, ctypes.c_size_t(256))
    assert text.value.decode() == f"ragged images can be compressed, but op is {op.lower()}"


class Pool(ctypes.Structure):
    """apet_pool."""

    _fields_ = [("threads", ctypes.c_int32), ("context", ctypes.c_void_p), ("run", ctypes.c_void_p)]


def test_a_pool_without_a_function_is_refused():
    library, case = installed().library, simt_call.compress_case(tokens(8, 300, 64), 30)
    room = torch.empty(1 << 24, dtype=torch.uint8)
    tensors = simt_call.Tensors(**{name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()})
    pool, workspace = Pool(threads=8), ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64)
    arguments = (ctypes.byref(case.problem), ctypes.byref(tensors))
    status = library.apet_cpu_run(*arguments, ctypes.byref(pool), workspace, ctypes.c_size_t(len(room) - 64))
    assert status == simt_call.status_numbers()["APET_NULL_POINTER"]


@pytest.mark.parametrize("copy", [installed, newer], ids=lambda copy: copy.__name__)
def test_exports_exactly_the_header(copy: Callable[[], Copy]):
    assert exported(Path(copy().library._name)) == declared_for("libapet")


@pytest.mark.parametrize("copy", [installed, newer], ids=lambda copy: copy.__name__)
def test_name_and_calls_of_a_shared_library(copy: Callable[[], Copy]):
    """Its name holds the version that is compatible; its calls to itself can end in no other copy."""
    library = Path(copy().library._name)
    abi = ".".join(copy().version().split(".")[:2])
    assert f"Library soname: [libapet.so.{abi}]" in run("readelf", "-d", library)
    assert not re.findall(r"apet_\w+", run("readelf", "-r", library))


def test_two_versions_side_by_side():
    """Each keeps its own state, and both give the same bits, called in turn and at once."""
    old, new = installed(), newer()
    major, minor, patch = map(int, version().split("."))
    assert (old.version(), new.version()) == (version(), f"{major}.{minor + 1}.{patch}")
    x = tokens(2, 150, 64)
    problem = simt_call.compress_case(x, 20).problem
    assert new.use_isa("generic")
    try:
        assert new.plan(problem).isa == ISAS.index("generic")
        best = old.plan(problem).isa
    finally:
        new.use_isa("best")
    assert best == new.plan(problem).isa
    expected = old.compress(x, 20)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(library.compress, x, 20) for _ in range(20) for library in (old, new)]
        for result in both:
            for got, wanted in zip(result.result(), expected, strict=True):
                assert_same(got, wanted)


# ---- what it does not do ---------------------------------------------------------------------------------------------


def test_uses_nothing_that_allocates_waits_or_throws():
    """All that libapet takes from elsewhere. A call through the caller's pool is the only one that leaves it."""
    allowed = {"memcpy", "memmove", "memset", "snprintf", "sched_yield", "__cxa_guard_acquire", "__cxa_guard_release"}
    hardened = {"__memcpy_chk", "__memset_chk", "__snprintf_chk", "__stack_chk_fail"}  # of compilers that do so unasked
    library = Path(installed().library._name)
    assert {"memcpy", "snprintf"} < undefined(library) <= allowed | hardened
    assert needed(library) <= RUNTIMES


def test_compiles_without_exceptions_and_rtti():
    for name in sorted(listed("cpu")):
        if name.endswith(".cpp") and "isa_avx" not in name:
            options = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-fsyntax-only"]
            run("g++", *options, CSRC / name)


@pytest.mark.parametrize("copy", ["shared", "static"])
def test_allocates_nothing(tmp_path: Path, copy: str):
    program = tmp_path / "allocations"
    options = ["-std=c++17", "-O1", *STRICT[:2], "-I", CSRC, SOURCES / "allocations.cpp", "-o", program]
    if copy == "static":
        run("g++", *options, "-DAPET_STATIC", built("by_hand", make_by_hand) / "libapet.a")
    else:
        folder = built("installed", make_installed) / "moved/lib"
        run("g++", *options, f"-L{folder}", "-lapet", f"-Wl,-rpath,{folder}")
    calls, allocations = re.fullmatch(r"(\d+) calls, (\d+) allocations\n", run(program)).groups()
    assert int(calls) >= 100
    assert int(allocations) == 0


def test_cuda_neither_allocates_nor_waits():
    """Every function of the CUDA runtime that is called; the last two by kernels, for the launch before and after."""
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in sorted((CSRC / "cuda").glob("*.cu*")))
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\(", text)) == {
        *("cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"),
        *("cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaOccupancyMaxActiveClusters"),
        *("cudaLaunchKernelEx", "cudaMemsetAsync"),
        *("cudaGridDependencySynchronize", "cudaTriggerProgrammaticLaunchCompletion"),
    }


# ---- the example -----------------------------------------------------------------------------------------------------


def compress_file(folder: Path, x: np.ndarray, *arguments: object, n: object = None) -> subprocess.CompletedProcess:
    """The example on tokens x [..., N, D]; arguments: KEEP or KEEP and THREADS. n: another N than that of x."""
    x.tofile(folder / "tokens.f32")
    keep, *threads = arguments
    sizes = [x.shape[-2] if n is None else n, x.shape[-1], keep]
    words = ["compress", "tokens.f32", *sizes, "kept.f32", "indices.i64", *threads]
    program = built("example", make_example) / "build/vendor/compress"
    return subprocess.run([str(w) for w in words], executable=program, cwd=folder, capture_output=True, text=True)


@needs_op
@pytest.mark.parametrize("threads", [(), (1,), (2,), (7,)], ids=["default", "1", "2", "7"])
@pytest.mark.parametrize("shape", [(1, 576, 256), (5, 200, 65)], ids=str)
def test_example_gives_the_bits_of_the_op(tmp_path: Path, shape: tuple[int, ...], threads: tuple):
    x = tokens(*shape, kind="clustered")
    done = compress_file(tmp_path, x.numpy(), 64, *threads)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"apet {version()}, ")
    kept, indices = torch.ops.apet.compress(x, 64)
    assert_same(torch.from_file(str(tmp_path / "kept.f32"), size=kept.numel()), kept.flatten(), "kept")
    found = torch.from_file(str(tmp_path / "indices.i64"), size=indices.numel(), dtype=torch.int64)
    assert_same(found, indices.flatten(), "indices")
    assert (tmp_path / "kept.f32").stat().st_size == kept.nbytes


@pytest.mark.parametrize(
    ("arguments", "n", "message"),
    [
        ((5,), None, "keep=5 is outside 1..4, the tokens of an image"),
        ((-1,), None, "keep=-1 is outside 1..4, the tokens of an image"),
        (("many",), None, "KEEP is 'many', not a number"),
        (("9" * 30,), None, f"KEEP is '{'9' * 30}', not a number"),
        ((1,), 0, "x has 0 tokens per image; at least 1 is needed"),
        ((1,), 3, "tokens.f32 does not hold whole images of 9 float32"),
        ((2, 0), None, "THREADS is 0, outside 1..256"),
        ((2, 257), None, "THREADS is 257, outside 1..256"),
        ((2, "x"), None, "THREADS is 'x', not a number"),
    ],
)
def test_example_reports_errors(tmp_path: Path, arguments: tuple, n: int | None, message: str):
    done = compress_file(tmp_path, np.zeros((4, 3), np.float32), *arguments, n=n)
    assert (done.returncode, done.stderr) == (1, f"{message}\n")
    assert not (tmp_path / "kept.f32").exists()


def test_example_reports_files_that_it_cannot_open(tmp_path: Path):
    program = built("example", make_example) / "build/vendor/compress"
    np.zeros((4, 3), np.float32).tofile(tmp_path / "x")
    for files, message in (
        (("none", "a", "b"), "none cannot be opened"),
        (("x", "no/a", "b"), "no/a cannot be opened"),
        (("x", "/dev/full", "b"), "/dev/full cannot be written"),
    ):
        words = [program, files[0], "4", "3", "1", *files[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"{message}\n")
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")


# ---- the guide's snippets --------------------------------------------------------------------------------------------


def call_guide(library: ctypes.CDLL, x: Tensor, keep: int) -> tuple[Tensor, Tensor, str]:
    """The snippet's compress(): outputs, and what it says."""
    images, n, dim = x.shape
    out, indices = x.new_empty(images, keep, dim), torch.empty(images, keep, dtype=torch.int64)
    sizes, wrong = (ctypes.c_int64 * 4)(images, n, dim, keep), ctypes.create_string_buffer(512)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, indices)]
    library.guide_compress(pointers[0], sizes, *pointers[1:], wrong, ctypes.c_size_t(512))
    return out, indices, wrong.value.decode()


@needs_op
def test_the_snippet_for_the_cpu_runs(tmp_path: Path):
    (tmp_path / "snippet.cpp").write_text(block("snippet: cpu"))
    archive = built("by_hand", make_by_hand) / "libapet.a"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", *STRICT[:2], "-DAPET_STATIC", f"-I{tmp_path}", f"-I{CSRC}"]
    run("g++", *options, SOURCES / "guide_cpu.cpp", archive, "-o", tmp_path / "libguide.so")
    library, x = ctypes.CDLL(str(tmp_path / "libguide.so")), tokens(2, 100, 48)
    *got, wrong = call_guide(library, x, 12)
    assert wrong == ""
    for result, wanted in zip(got, torch.ops.apet.compress(x, 12), strict=True):
        assert_same(result, wanted)
    assert call_guide(library, x, 700)[2] == "keep=700 is outside 1..100, the tokens of an image"


@pytest.mark.skipif(simt_build.missing() is not None, reason=str(simt_build.missing()))
def test_the_snippet_for_cuda_runs_on_the_simulated_gpu(tmp_path: Path):
    (tmp_path / "snippet.cpp").write_text(block("snippet: cuda"))
    simulated = simt_build.library()
    options = [*simt_build.FLAGS, "-O1", "-shared", f"-I{tmp_path}", f"-I{CSRC}", f"-I{simt_build.HERE / 'include'}"]
    options += [SOURCES / "guide_cuda.cpp", simulated, f"-Wl,-rpath,{simulated.parent}"]
    run("g++", *options, "-o", tmp_path / "libguide.so")
    x, how = tokens(2, 100, 48, dtype=torch.float16), simt_call.How(seed=5)
    device = how.device
    simt_call.load().simt_use_device(
        *(device.capability, device.multiprocessors, device.shared_per_block),
        *(device.shared_per_multiprocessor, device.largest_cluster),
    )
    library = ctypes.CDLL(str(tmp_path / "libguide.so"))
    *got, wrong = call_guide(library, x, 12)
    assert wrong == ""
    assert simt_call.finish(seed=5)
    with simt_call.always(how) as functions:
        for result, wanted in zip(got, functions.compress(x, 12), strict=True):
            assert_same(result, wanted)
    assert call_guide(library, x, 700)[2] == "keep=700 is outside 1..100, the tokens of an image"


@pytest.mark.skipif(not CUDA_HEADERS.exists(), reason=f"the headers of CUDA are not at {CUDA_HEADERS}")
def test_the_snippets_for_cuda_compile_against_its_headers(tmp_path: Path):
    source = tmp_path / "snippets.cpp"
    source.write_text(block("snippet: cuda") + block("snippet: graph"))
    run("g++", "-std=c++17", "-fsyntax-only", *STRICT, f"-I{CSRC}", f"-isystem{CUDA_HEADERS}", source)


# ---- CUDA, where there is nvcc (slow) --------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(not sass.nvcc(), reason="there is no nvcc")
ARCHS = "90-real"

# A program in C: the target brings the header, libapet, and whatever else has to be linked.
PLAN = """
#include <apet.h>
#include <stdio.h>
int main(void) {
  apet_problem p = {0};
  apet_cuda_plan_t plan;
  apet_status status;
  p.images = 1, p.tokens = 64, p.dim = 32, p.keep = 8, p.basis = 10, p.start = -1, p.blend = 1;
  p.stride_xn = 32, p.stride_xd = 1;
  status = apet_cuda_plan(&p, NULL, &plan);
  printf("%s %d %s\\n", apet_version(), (int)status, status == APET_OK ? plan.why : apet_cuda_error());
  return !(status == APET_OK || status == APET_CUDA_FAILED);
}
"""


def check_planned(said: str) -> None:
    """With a GPU the plan, without one the words of the runtime that is linked in."""
    ok = "0 " if torch.cuda.is_available() else f"{simt_call.status_numbers()['APET_CUDA_FAILED']} "
    assert said.startswith(f"{version()} {ok}"), said
    assert len(said.split()) > 4


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("shared", ["ON", pytest.param("OFF", marks=pytest.mark.matrix)])
def test_the_cuda_library_is_found_where_it_is_installed(tmp_path: Path, shared: str):
    source = copy_listed(tmp_path, "cpu", "cuda", "cmake")
    compiler = f"-DCMAKE_CUDA_COMPILER={sass.nvcc()}"
    cmake(source, tmp_path / "build", f"-DBUILD_SHARED_LIBS={shared}", f"-DAPET_CUDA_ARCHS={ARCHS}", compiler)
    run(CMAKE, "--install", tmp_path / "build", "--prefix", tmp_path / "prefix")
    if shared == "ON":
        library = tmp_path / "prefix/lib/libapet_cuda.so"
        assert exported(library) == declared_for("libapet_cuda")
        assert needed(library) <= RUNTIMES | {"libapet"}
    (tmp_path / "user").mkdir()
    (tmp_path / "user/plan.c").write_text(PLAN)
    (tmp_path / "user/CMakeLists.txt").write_text("""
        cmake_minimum_required(VERSION 3.25)
        project(user LANGUAGES C CXX)
        find_package(apet 0.1 REQUIRED COMPONENTS cpu cuda)
        add_executable(plan plan.c)
        target_link_libraries(plan PRIVATE apet::cuda)
        """)
    cmake(tmp_path / "user", tmp_path / "user/build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    check_planned(run(tmp_path / "user/build/plan"))


@needs_nvcc
@pytest.mark.slow
def test_the_cuda_library_is_built_by_hand(tmp_path: Path):
    copy_listed(tmp_path, "cpu", "cuda")
    nvcc = Path(sass.nvcc())
    run("sh", "-ec", block("commands: cpu") + block("commands: cuda"), folder=tmp_path, PATH=f"{nvcc.parent}:{path()}")
    (tmp_path / "plan.c").write_text(PLAN)
    (link,) = re.findall(r"Link `(libapet_cuda.a .*?)`", GUIDE.read_text(), re.S)
    toolkit = next(p for p in (CUDA_HEADERS.parent / "lib64", nvcc.resolve().parents[1] / "lib64") if p.exists())
    words = ["-std=c99", "-DAPET_STATIC", f"-I{CSRC}", f"-L{toolkit}", tmp_path / "plan.c", *link.split(), "-lstdc++"]
    run("cc", *words, "-o", tmp_path / "plan", folder=tmp_path)
    check_planned(run(tmp_path / "plan"))
