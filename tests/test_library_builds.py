"""Every way to build csrc/ into another project, as docs/vendoring.md describes: the bits, and the installed files."""

from __future__ import annotations

import json
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from apet_kernels import testing
from apet_kernels.options import LAYOUTS, PAPER
from tests.binaries import RUNTIMES, declared_for, exported, needed, run, version
from tests.data import DTYPES, tokens
from tests.judge import assert_same
from tests.library.copies import (
    CMAKE,
    COPIES,
    CSRC,
    CUDA_HEADERS,
    FOLDER,
    GUIDE,
    SOURCES,
    Copy,
    block,
    built,
    by_hand,
    cmake,
    copy_listed,
    each,
    inside,
    listed,
    make_inside,
    make_installed,
    needs_op,
    needs_sources,
    path,
)
from tests.simt import abi
from tools import sass

pytestmark = needs_sources


def cases() -> list[tuple[Tensor, int, dict[str, object]]]:
    """Returns arguments of compress: every dtype and layout, with tokens that fast math would break."""
    hostile = tokens(2, 90, 40, seed=3)
    hostile[0, 7, 3], hostile[0, 50, 0], hostile[1, 0] = float("nan"), float("inf"), 0
    everyday = [
        (tokens(3, 200, 65, dtype=dtype, kind="clustered"), 24, {**PAPER, "layout": layout})
        for dtype in DTYPES
        for layout in LAYOUTS
    ]
    return [*everyday, (hostile, 20, PAPER), (hostile, 20, {"basis": 10}), (hostile, 20, {})]


@needs_op
@each(*COPIES)
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
    assert checked >= 12


def test_the_guide_lists_what_is_compiled_and_nothing_else():
    """The lists are compared with the files that the compiler reads; for CUDA, with the simulated GPU's headers."""
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


@pytest.mark.slow
def test_flags_of_a_project_around_it_do_not_reach_it():
    commands = json.loads((built("inside", make_inside) / "flags/compile_commands.json").read_text())
    ours = {Path(c["file"]).name: c["command"].split() for c in commands if "/csrc/" in c["file"]}
    elsewhere = ("isa_neon", "isa_neon_bf16") if platform.machine() == "x86_64" else ("isa_avx", "isa_amx")
    here = {Path(name).name for name in listed("cpu") if name.endswith(".cpp")}
    assert set(ours) == {name for name in here if not name.startswith(elsewhere)}
    for name, words in ours.items():
        assert "-ffast-math" in words, "the project's flags are the test"
        assert words.index("-fno-fast-math") > words.index("-ffast-math"), name
        assert words.index("-ffp-contract=off") > words.index("-ffp-contract=fast"), name
        assert "-O3" in words, name
        assert "-std=c++17" in words, name


@pytest.mark.slow
def test_a_project_around_it_installs_nothing_of_it():
    prefix = built("inside", make_inside) / "prefix"
    assert [p.name for p in prefix.rglob("*") if p.is_file()] == ["libengine.so"]


@each(by_hand, inside)
def test_an_engine_exports_nothing_of_the_copy_inside(copy: Callable[[], Copy]):
    assert exported(Path(copy().library._name)) == {f"engine_{name}" for name in ("version", "plan", "run", "use_isa")}


# ---- the installed package -------------------------------------------------------------------------------------------


def test_what_is_installed():
    prefix = built("installed", make_installed) / "moved"
    full, abi = version(), ".".join(version().split(".")[:2])
    files = {str(p.relative_to(prefix)) for p in prefix.rglob("*") if not p.is_dir()}
    package = {f"lib/cmake/apet/apet-{name}.cmake" for name in ("config", "config-version", "cpu", "cpu-release")}
    headers = {"include/apet.h", "include/apet_testing.h"}
    assert files == headers | {"lib/libapet.so", f"lib/libapet.so.{abi}", f"lib/libapet.so.{full}"} | package
    for name in package:
        assert str(FOLDER) not in (prefix / name).read_text(), f"{name} knows where it was built"


def find(folder: Path, request: str, prefix: Path) -> tuple[int, str]:
    """Returns exit code and output of a project that looks for the package."""
    (folder / "CMakeLists.txt").write_text(f"""
        cmake_minimum_required(VERSION 3.25)
        project(user LANGUAGES CXX)
        find_package(apet {request})
        message(STATUS "found ${{apet_FOUND}}, version ${{apet_VERSION}}, cuda ${{apet_cuda_FOUND}}")
        """)
    command = [CMAKE, "-S", folder, "-B", folder / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, re.sub(r"\s+", " ", done.stdout + done.stderr)


@pytest.mark.parametrize("request_", ["REQUIRED", "0.2 REQUIRED", "0.2.0 EXACT REQUIRED COMPONENTS cpu"])
def test_find_package_finds(tmp_path: Path, request_: str):
    code, said = find(tmp_path, request_, built("installed", make_installed) / "moved")
    assert code == 0, said
    assert f"found 1, version {version()}, cuda FALSE" in said


MAJOR, MINOR = map(int, version().split(".")[:2])
OTHERS = [f"{MAJOR}.{MINOR - 1}", f"{MAJOR}.{MINOR + 1}", f"{MAJOR + 1}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        *((f"{other} REQUIRED", f'compatible with requested version "{other}"') for other in OTHERS),
        ("REQUIRED COMPONENTS cuda", "apet has no component cuda here: its CUDA kernels are not installed"),
        ("REQUIRED COMPONENTS rocm", "apet has no component rocm here"),
    ],
)
def test_find_package_rejects(tmp_path: Path, request_: str, message: str):
    code, said = find(tmp_path, request_, built("installed", make_installed) / "moved")
    assert code != 0
    assert message in said, said


def test_an_optional_component_that_is_missing_is_no_failure(tmp_path: Path):
    prefix = built("installed", make_installed) / "moved"
    code, said = find(tmp_path, "OPTIONAL_COMPONENTS cuda", prefix)
    assert code == 0, said
    assert f"found 1, version {version()}, cuda FALSE" in said


# ---- CUDA, with nvcc (slow) ------------------------------------------------------------------------------------------

needs_nvcc = pytest.mark.skipif(not sass.nvcc(), reason="there is no nvcc")
ARCHS = "90-real"

# A program in C: the target provides the header, libapet, and all else that must be linked.
PLAN = """
#include <apet.h>
#include <stdio.h>
int main(void) {
  apet_problem p = {0};
  apet_cuda_plan_t plan;
  apet_status status;
  p.images = 1, p.tokens = 64, p.dim = 32, p.keep = 8, p.basis = 10, p.start = -1, p.blend = 1;
  p.stride_xn = 32, p.stride_xd = 1;
  status = apet_cuda_plan(&p, &plan);
  printf("%s %d %s\\n", apet_version(), (int)status, status == APET_OK ? plan.why : apet_cuda_error());
  return !(status == APET_OK || status == APET_CUDA_FAILED);
}
"""


def check_planned(said: str) -> None:
    """Checks the plan on a machine with a GPU, else the message of the CUDA runtime that is linked in."""
    ok = "0 " if torch.cuda.is_available() else f"{abi.status_numbers()['APET_CUDA_FAILED']} "
    assert said.startswith(f"{version()} {ok}"), said
    assert len(said.split()) > 4


@needs_nvcc
@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("shared", ["ON", "OFF"])
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
        find_package(apet 0.2 REQUIRED COMPONENTS cpu cuda)
        add_executable(plan plan.c)
        target_link_libraries(plan PRIVATE apet::cuda)
        """)
    cmake(tmp_path / "user", tmp_path / "user/build", f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}")
    check_planned(run(tmp_path / "user/build/plan"))


@needs_nvcc
@pytest.mark.matrix
@pytest.mark.slow
def test_the_cuda_library_is_built_by_hand(tmp_path: Path):
    copy_listed(tmp_path, "cpu", "cuda")
    nvcc = Path(sass.nvcc())
    run("sh", "-ec", block("commands: cpu") + block("commands: cuda"), folder=tmp_path, PATH=f"{nvcc.parent}:{path()}")
    (tmp_path / "plan.c").write_text(PLAN)
    (link,) = re.findall(r"Link `(libapet_cuda.a .*?)`", GUIDE.read_text(), re.S)
    toolkit = next(p for p in (CUDA_HEADERS.parent / "lib64", nvcc.resolve().parents[1] / "lib64") if p.exists())
    words = ["-std=c99", "-DAPET_STATIC", f"-I{CSRC}", f"-L{toolkit}", tmp_path / "plan.c", *link.split()]
    words += ["-lstdc++", "-lm"]
    run("cc", *words, "-o", tmp_path / "plan", folder=tmp_path)
    check_planned(run(tmp_path / "plan"))
