"""The C header and the binary interface of the library, and the functions of other libraries that it uses."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.binaries import RUNTIMES, declared, declared_for, exported, needed, run, undefined, version
from tests.data import tokens
from tests.judge import assert_same
from tests.library.copies import (
    CSRC,
    HEADER,
    ISAS,
    SOURCES,
    STRICT,
    Copy,
    Plan,
    built,
    each,
    installed,
    listed,
    make_by_hand,
    make_installed,
    needs_sources,
    newer,
)
from tests.simt import abi
from tests.simt import call as simt_call

pytestmark = needs_sources


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
    """tests/library/abi.c has every type, member, enumerator and function of apet.h."""
    code, pinned = header_code(), re.sub(r"\s+", " ", (SOURCES / "abi.c").read_text())
    found = re.findall(r"typedef (?:struct|enum) \w+ \{(.*?)\} (\w+);", code, re.S)
    bodies = {name: body for body, name in found}
    assert len(bodies) == 12
    wanted = {f"SIZE({name}, " for name in bodies}
    for name, body in bodies.items():
        if "," in body and ";" not in body:
            wanted |= {f"VALUE({enumerator}, " for enumerator in re.findall(r"APET_\w+", body)}
        else:
            declarators = re.findall(r"\(\*(\w+)\)\(|(\w+)(?:\[\d+\])?;", body)
            wanted |= {f"MEMBER({name}, {pointer or plain}, " for pointer, plain in declarators}
    wanted |= {f"{name}(" for name in declared(HEADER)} | {"VALUE(APET_MAX_BASIS, "}
    assert len(wanted) > 110
    assert {entry for entry in wanted if entry not in pinned} == set()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("int64_t keep; ", "int32_t keep; "),
        ("int32_t images_in_flight; ", "int32_t images_in_flight, more; "),
        ("APET_QR = 1", "APET_QR = 2"),
        ("#define APET_VERSION_MINOR 2", "#define APET_VERSION_MINOR 3"),
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
    problem = abi.Problem()
    numbers = abi.status_numbers()
    assert len(numbers) == 31
    for status in [*numbers.values(), 31]:
        text = ctypes.create_string_buffer(256)
        length = library.apet_error_message(ctypes.byref(problem), status, text, ctypes.c_size_t(256))
        assert length == len(text.value) < 256
        assert library.apet_error_message(None, status, None, ctypes.c_size_t(0)) > 0
        cut = ctypes.create_string_buffer(b"xxxxxxxx", 8)
        assert library.apet_error_message(ctypes.byref(problem), status, cut, ctypes.c_size_t(5)) == length
        assert cut.raw[:4] + cut.raw[4:] == text.value[:4] + b"\0xxx"
        messages.add(text.value.decode())
    assert len(messages) == 32
    assert {s for s in messages if "unknown" in s} == {"status 31 is unknown"}


@pytest.mark.parametrize("op", ["SCORE", "MERGE"])
def test_ragged_images_can_only_be_compressed(op: str):
    """The results of score and merge have a fixed size per image, so ragged images could write past their end."""
    library = installed().library
    cu_seqlens, cu_keep = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 10, 30], [0, 4, 9]))
    problem = simt_call.compress_varlen_case(tokens(30, 8), cu_seqlens, cu_keep, 9, 20, 5).problem
    assert library.apet_check(ctypes.byref(problem)) == 0
    problem.op = getattr(abi, op)
    status = library.apet_check(ctypes.byref(problem))
    text = ctypes.create_string_buffer(256)
    library.apet_error_message(ctypes.byref(problem), status, text, ctypes.c_size_t(256))
    assert text.value.decode() == f"ragged images need op=compress, got op={op.lower()}"


@pytest.mark.parametrize(
    ("ragged", "field", "most"),
    [
        (False, "tokens", 2**31 - 65537),
        (False, "dim", 2**31 - 1),
        (False, "images", 2**31 - 1),
        (True, "total_tokens", 2**31 - 65537),
        (True, "tokens", 2**31 - 1),
    ],
)
def test_the_largest_sizes(ragged, field, most):
    copy, x = installed(), tokens(30, 8)
    if ragged:
        offsets = (torch.tensor(o, dtype=torch.int32) for o in ([0, 10, 30], [0, 4, 9]))
        problem = simt_call.compress_varlen_case(x, *offsets, 9, 20, 5, select="qr").problem
    else:
        problem = simt_call.compress_case(x[None], 9, 5).problem
    for value, status in ((most, 0), (most + 1, 18)):  # APET_TOO_LARGE
        setattr(problem, field, value)
        assert copy.library.apet_check(ctypes.byref(problem)) == status


@pytest.mark.parametrize(("keep", "status"), [(1 << 20, "APET_OK"), (1 << 30, "APET_TOO_LARGE")])
def test_a_workspace_beyond_the_addresses_is_an_error(keep: int, status: str):
    """Its bytes would not fit into size_t: the size that is left of them must not pass for it."""
    copy, problem = installed(), simt_call.compress_case(tokens(1, 30, 8), 9).problem
    problem.tokens, problem.keep = 2**31 - 65537, keep
    plan = Plan()
    assert copy.library.apet_cpu_plan(ctypes.byref(problem), 1, ctypes.byref(plan)) == abi.status_numbers()[status]
    assert plan.workspace_bytes == 0 or plan.workspace_bytes > 4 * problem.tokens * keep


def test_members_that_an_op_does_not_use_are_ignored():
    """Whatever they point at."""
    copy, x, nowhere = installed(), tokens(2, 40, 8), 8
    indices = torch.arange(9).repeat(2, 1)
    room = torch.empty(1 << 20, dtype=torch.uint8)
    for case in (simt_call.score_case(x, 5), simt_call.merge_case(x, indices)):
        used = {name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()}
        found = []
        for unused in ({}, dict.fromkeys(abi.NAMES, nowhere)):
            tensors = abi.Tensors(**{**unused, "kept_targets": None, **used})
            workspace = ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64)
            arguments = (ctypes.byref(case.problem), ctypes.byref(tensors), None, workspace)
            assert copy.library.apet_cpu_run(*arguments, ctypes.c_size_t(len(room) - 64)) == 0
            found.append([t.clone() for t in case.outputs.values()])
        for got, wanted in zip(*found, strict=True):
            assert_same(got, wanted)


def test_bounds_of_ragged_images_that_none_can_reach():
    """A caller may give "no limit": the workspace is laid out for what is possible."""
    copy, x = installed(), tokens(30, 8)
    offsets = (torch.tensor(o, dtype=torch.int32) for o in ([0, 10, 30], [0, 4, 9]))
    case = simt_call.compress_varlen_case(x, *offsets, 9, 20, 5, select="qr")
    tensors = abi.Tensors(**{name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()})
    room = torch.empty(1 << 20, dtype=torch.uint8)
    workspace = ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64)
    found = []
    for bounds in ({}, {"keep": 1 << 62}, {"keep": (1 << 63) - 1, "tokens": (1 << 31) - 1}):
        for name, value in bounds.items():
            setattr(case.problem, name, value)
        size = copy.plan(case.problem).workspace_bytes
        assert size <= 1 << 16
        arguments = (ctypes.byref(case.problem), ctypes.byref(tensors), None, workspace, ctypes.c_size_t(size))
        assert copy.library.apet_cpu_run(*arguments) == 0
        found.append([t.clone() for t in case.outputs.values()])
    for other in found[1:]:
        for got, wanted in zip(other, found[0], strict=True):
            assert_same(got, wanted)


class Pool(ctypes.Structure):
    """The struct apet_pool for ctypes."""

    _fields_ = [("threads", ctypes.c_int32), ("context", ctypes.c_void_p), ("run", ctypes.c_void_p)]


def test_a_pool_without_a_function_raises():
    library, case = installed().library, simt_call.compress_case(tokens(8, 300, 64), 30)
    room = torch.empty(1 << 24, dtype=torch.uint8)
    tensors = abi.Tensors(**{name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()})
    pool, workspace = Pool(threads=8), ctypes.c_void_p((room.data_ptr() + 63) // 64 * 64)
    arguments = (ctypes.byref(case.problem), ctypes.byref(tensors))
    status = library.apet_cpu_run(*arguments, ctypes.byref(pool), workspace, ctypes.c_size_t(len(room) - 64))
    assert status == abi.status_numbers()["APET_NULL_POINTER"]


@each(installed, newer)
def test_exports_exactly_the_header(copy: Callable[[], Copy]):
    assert exported(Path(copy().library._name)) == declared_for("libapet")


@each(installed, newer)
def test_name_and_calls_of_a_shared_library(copy: Callable[[], Copy]):
    """Its soname contains the compatible version, and its internal calls cannot reach another copy."""
    library = Path(copy().library._name)
    abi = ".".join(copy().version().split(".")[:2])
    assert f"Library soname: [libapet.so.{abi}]" in run("readelf", "-d", library)
    assert not re.findall(r"apet_\w+", run("readelf", "-r", library))


@pytest.mark.slow
def test_two_versions_side_by_side():
    """Each has its own state, and both give the same bits, called in turn and at once."""
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


# ---- functions of other libraries ------------------------------------------------------------------------------------


def test_uses_nothing_that_allocates_waits_or_throws():
    """Lists all functions of other libraries that libapet calls, besides those of the caller's pool."""
    allowed = {"memcpy", "memmove", "memset", "snprintf", "sched_yield", "__cxa_guard_acquire", "__cxa_guard_release"}
    allowed |= {"syscall"}  # once: asks Linux for the permission to use AMX's tiles
    # Some compilers call these by default.
    hardened = {"__memcpy_chk", "__memset_chk", "__snprintf_chk", "__stack_chk_fail"}
    library = Path(installed().library._name)
    assert {"memcpy", "snprintf"} < undefined(library) <= allowed | hardened
    assert needed(library) <= RUNTIMES


def test_compiles_without_exceptions_and_rtti():
    for name in sorted(listed("cpu")):
        if name.endswith(".cpp") and not name.startswith(("cpu/isa_avx", "cpu/isa_neon")):
            options = ["-std=c++17", "-fno-exceptions", "-fno-rtti", "-fsyntax-only"]
            run("g++", *options, CSRC / name)


@pytest.mark.parametrize("copy", ["shared", pytest.param("static", marks=pytest.mark.slow)])
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
    """Lists all functions of the CUDA runtime that are called; the last two are called by kernels."""
    text = "\n".join(re.sub(r"//.*", "", path.read_text()) for path in sorted((CSRC / "cuda").glob("*.cu*")))
    assert set(re.findall(r"\b(cuda[A-Z]\w+)\(", text)) == {
        *("cudaGetDevice", "cudaDeviceGetAttribute", "cudaFuncSetAttribute", "cudaGetErrorString", "cudaGetLastError"),
        *("cudaOccupancyMaxActiveBlocksPerMultiprocessor", "cudaOccupancyMaxActiveClusters"),
        *("cudaLaunchKernelEx", "cudaMemsetAsync"),
        *("cudaGridDependencySynchronize", "cudaTriggerProgrammaticLaunchCompletion"),
    }
