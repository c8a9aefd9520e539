"""What is shipped: one version, typed packages, a library that exports apet.h and needs no torch, every install."""

from __future__ import annotations

import ctypes
import email
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path

import pytest

from tests import sass
from tests.binaries import HEADER, RUNTIMES, declared_for, exported, needed, run, version

ROOT = Path(__file__).parents[1]
PACKAGE = Path(util.find_spec("apet_kernels").origin).parent
LIBRARY = PACKAGE / "libapet.so"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="installed without the compiled kernels")


# ---- what is installed here -----------------------------------------------------------------------------------------


def test_version_is_the_same_in_the_header_and_the_installed_metadata():
    assert metadata.version("apet-kernels") == version()


@needs_library
def test_version_is_the_same_in_the_library():
    function = ctypes.CDLL(str(LIBRARY)).apet_version
    function.restype = ctypes.c_char_p
    assert function().decode() == version()


def test_metadata():
    about = metadata.metadata("apet-kernels")
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.10"
    required = {re.match(r"[\w-]+", r)[0] for r in about.get_all("Requires-Dist") if "extra ==" not in r}
    assert required == {"torch", "typer", "rich"}
    (command,) = (e for e in metadata.entry_points(group="console_scripts") if e.name == "apet")
    assert command.value == "apet.cli:main"


def test_building_never_asks_for_torch():
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    assert "torch" not in requires


@pytest.mark.parametrize("package", ["apet_kernels", "apet"])
def test_packages_are_typed(package: str):
    assert Path(util.find_spec(package).origin).with_name("py.typed").exists()


def test_cmake_lists_every_source():
    """Those of the libraries in csrc/, their bindings above it; no source twice."""
    texts = {folder: re.sub(r"#.*", "", (folder / "CMakeLists.txt").read_text()) for folder in (ROOT, ROOT / "csrc")}
    listed = [folder / name for folder, text in texts.items() for name in re.findall(r"[\w/]+\.(?:cpp|cu)\b", text)]
    isas = re.findall(r"^ *apet_isa\((\w+)", texts[ROOT / "csrc"], re.M)
    listed += [ROOT / f"csrc/cpu/isa_{isa}.cpp" for isa in isas]
    sources = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    assert sorted(path for path in listed if path.is_relative_to(ROOT / "csrc")) == sorted(sources)


# ---- the torch-free library ------------------------------------------------------------------------------------------


TORCH_FREE = sorted({LIBRARY, *PACKAGE.glob("libapet_cuda.so")})


@needs_library
@pytest.mark.parametrize("library", TORCH_FREE, ids=lambda path: path.stem)
def test_library_exports_exactly_its_part_of_the_header(library: Path):
    assert exported(library) == declared_for(library.stem)


@needs_library
@pytest.mark.parametrize("library", TORCH_FREE, ids=lambda path: path.stem)
def test_library_needs_no_torch_and_no_python(library: Path):
    """Nor a CUDA runtime, which is linked into it."""
    assert needed(library) <= RUNTIMES | ({"libapet"} if library != LIBRARY else set())
    assert "torch" not in run("nm", "-D", "--undefined-only", library)


def used_of_torch(binding: Path) -> set[str]:
    """The symbols of torch that a binding uses; fails if one is not declared by torch's C shims."""
    include = Path(util.find_spec("torch").origin).parent / "include/torch/csrc"
    shims = [include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"]
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", "\n".join(shim.read_text() for shim in shims)))
    assert len(declared) > 100
    ours = set(re.findall(r"\b(apet_\w+)\(", HEADER.read_text()))
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", binding).splitlines()]
    # With a version: the C and C++ runtimes'. With _ITM or __gmon: weak, of the compiler's start-up files.
    others = {name for name in symbols if "@" not in name and not name.startswith(("_ITM_", "__gmon_"))}
    assert others - declared - ours == set()
    return others & declared


@needs_library
@pytest.mark.parametrize("binding", sorted(PACKAGE.glob("libapet*_torch.so")), ids=lambda path: path.stem)
def test_bindings_keep_to_the_stable_abi(binding: Path):
    """Of torch they use what its C shims declare, and nothing of C++: so a build runs on later releases of torch."""
    assert used_of_torch(binding)


def test_the_cuda_binding_keeps_to_the_stable_abi(tmp_path: Path):
    """The same without nvcc, since the binding is plain C++: all that it knows of CUDA is a stream of torch's."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    include = Path(util.find_spec("torch").origin).parent / "include"
    source, library = ROOT / "csrc/cuda_torch_binding.cpp", tmp_path / "binding.so"
    defined = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    run(
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        *defined,
        "-isystem",
        include,
        source,
        "-o",
        library,
    )
    used = used_of_torch(library)
    assert {name for name in used if "cuda" in name} == {
        "aoti_torch_device_type_cuda",
        "aoti_torch_get_current_cuda_stream",
    }


@needs_library
def test_libraries_find_each_other_wherever_they_lie():
    for library in PACKAGE.glob("*.so"):
        dynamic = run("readelf", "-d", library)
        assert set(re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)) == {"$ORIGIN"}, library.name


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512", "avx512_bf16"])
def test_code_of_one_instruction_set_stays_in_its_file(instruction_set: str):
    """The linker keeps any one of the equal inline functions of several files: the AVX-512 copy would then run, and
    crash, on every processor. So these files may define nothing that another could."""
    objects = sorted((ROOT / "build").glob(f"*/csrc/CMakeFiles/apet.dir/cpu/isa_{instruction_set}.cpp.o"))
    if not objects:
        pytest.skip("not built in this checkout")
    for file in objects:
        symbols = run("nm", "--demangle", "--defined-only", file).splitlines()
        assert [line for line in symbols if line.split()[1] == "W"] == [], file


# ---- whether CUDA kernels are built ----------------------------------------------------------------------------------

NVCC = "/usr/local/cuda/bin/nvcc"


@pytest.fixture
def cuda_archs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], str]:
    """setup.py's rule, for a torch/version.py with this line and this nvcc."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("APET_CUDA_ARCHS", raising=False)
    rule = runpy.run_path("setup.py")["cuda_archs"]

    def decide(line: str, nvcc: str | None) -> str:
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
        return rule(tmp_path, nvcc)

    return decide


@pytest.mark.parametrize(
    ("line", "nvcc", "expected"),
    [
        ("cuda: Optional[str] = '13.0'", NVCC, "default"),
        ("cuda = '12.8'", NVCC, "default"),
        ("cuda: Optional[str] = None", NVCC, ""),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'", NVCC, ""),
        ("cuda: Optional[str] = '13.0'", None, ""),
    ],
)
def test_unasked_cuda_kernels_are_built_where_torch_runs_them(
    cuda_archs: Callable, monkeypatch: pytest.MonkeyPatch, line: str, nvcc: str | None, expected: str
):
    monkeypatch.setenv("APET_REQUIRE_NATIVE", "1")  # concerns what is asked for
    assert cuda_archs(line, nvcc) == expected


def test_what_apet_cuda_archs_asks_for_is_built(
    cuda_archs: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    cpu, cuda = "cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'"
    monkeypatch.setenv("APET_CUDA_ARCHS", "80-real;90")
    assert cuda_archs(cpu, NVCC) == "80-real;90"
    assert cuda_archs(cuda, None) == ""
    assert "the CUDA kernels that APET_CUDA_ARCHS=80-real;90 asks for are left out" in capsys.readouterr().err
    monkeypatch.setenv("APET_REQUIRE_NATIVE", "1")
    with pytest.raises(SystemExit, match="APET_REQUIRE_NATIVE is set, but there is no nvcc"):
        cuda_archs(cuda, None)
    monkeypatch.setenv("APET_CUDA_ARCHS", "none")
    assert cuda_archs(cuda, NVCC) == ""


# ---- every way to install (slow) -------------------------------------------------------------------------------------

CHECK_KERNELS = """
import warnings; warnings.simplefilter("error")
import torch, apet_kernels
assert apet_kernels.why_unavailable("cpu") is None, apet_kernels.why_unavailable("cpu")
x = torch.randn(2, 64, 32)
tokens, indices = torch.ops.apet.compress(x, 16)
expected, expected_indices = apet_kernels.reference.compress(x, 16)
assert torch.equal(indices, expected_indices) and torch.allclose(tokens, expected, atol=1e-5)
"""

CHECK_CUDA = """
import torch, apet_kernels
info = apet_kernels.build_info()
assert info["cuda_archs"] == "90-real" and info["cuda_compiler"].startswith("NVIDIA"), info
assert apet_kernels.dispatch.CUDA_LIBRARY.exists()
assert apet_kernels.why_unavailable("cuda") == "this torch is built without CUDA"
apet_kernels.compress(torch.randn(1, 64, 32), 16)
assert "apet_cuda" not in open("/proc/self/maps").read()
"""

CHECK_REFERENCE = """
import torch, apet_kernels
assert apet_kernels.why_unavailable("cpu") is not None
tokens, indices = torch.ops.apet.compress(torch.randn(2, 64, 32), 16)
assert tokens.shape == (2, 16, 32) and indices.shape == (2, 16)
"""


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user has who unpacks the sdist: all installs below start from it, and share its compiled objects."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def environment(folder: Path, *requirements: str) -> Path:
    """The Python of a new virtual environment with these packages."""
    venv.create(folder, with_pip=True)
    if requirements:
        run(folder / "bin/python", "-m", "pip", "install", "--no-compile", *requirements)
    return folder / "bin/python"


BUILD_TOOLS = ["setuptools>=77", "cmake", "ninja", "pybind11"]


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requirements = [f"torch=={metadata.version('torch').split('+')[0]}", "numpy", "typer", "rich", *BUILD_TOOLS]
    return environment(tmp_path_factory.mktemp("venv") / "with_torch", *requirements)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("venv") / "without_torch", *BUILD_TOOLS)


def files_of(wheel: Path) -> set[str]:
    """The files of a wheel, less the metadata and with plain names for the Python-specific ones."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    return {re.sub(r"_host\..*", "_host.so", name) for name in names}


def build_wheel(python: Path, source: Path, folder: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """The wheel that this Python builds, and what the build printed."""
    said = run(python, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", folder, source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


@pytest.mark.slow
def test_sdist_builds_and_tests_and_knows_its_commit(source: Path):
    for name in ("CMakeLists.txt", "csrc/apet.h", "tests/test_packaging.py", "LICENSE", "Makefile", "README.md"):
        assert (source / name).exists(), name
    assert not list(source.rglob("*.so"))
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (source / "COMMIT").read_text().strip().removesuffix("-dirty") == head
    about = email.message_from_string((source / "PKG-INFO").read_text())
    assert (about["Name"], about["Version"]) == ("apet-kernels", version())


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not-isolated"])
def test_wheel_with_torch(with_torch: Path, source: Path, tmp_path: Path, isolation: bool):
    wheel, said = build_wheel(with_torch, source, tmp_path, *([] if isolation else ["--no-build-isolation"]))
    assert "Collecting torch" not in said
    files = files_of(wheel)
    assert {f"apet_kernels/{n}" for n in ("libapet.so", "libapet_torch.so", "_host.so", "py.typed")} < files
    assert {name.split("/")[0] for name in files} == {"apet", "apet_kernels"}
    assert {Path(name).suffix for name in files} <= {".py", ".so", ".typed"}
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_KERNELS)
    recorded = (source / "COMMIT").read_text().strip()
    assert recorded in run(with_torch, "-I", "-c", "import apet_kernels; print(apet_kernels.build_info())")


@pytest.mark.matrix
@pytest.mark.slow
def test_wheel_with_cuda(with_torch: Path, source: Path, tmp_path: Path):
    """Compiled because it is asked for; beside a torch without CUDA nothing of it is loaded, and all else works."""
    if why := sass.missing():
        pytest.skip(why)
    wheel, _ = build_wheel(with_torch, source, tmp_path, APET_CUDA_ARCHS="90-real", APET_REQUIRE_NATIVE="1")
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_KERNELS)
    run(with_torch, "-I", "-c", CHECK_CUDA)
    zipfile.ZipFile(wheel).extractall(tmp_path)
    package = tmp_path / "apet_kernels"
    assert used_of_torch(package / "libapet_cuda_torch.so")
    assert exported(package / "libapet_cuda.so") == declared_for("libapet_cuda")
    assert needed(package / "libapet_cuda.so") <= RUNTIMES | {"libapet"}
    images = re.findall(r"\.(sm_\w+)\.cubin", run(sass.tools()["cuobjdump"], "--list-elf", package / "libapet_cuda.so"))
    assert len(images) >= len(sass.DTYPES)
    assert set(images) == {"sm_90"}


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not-isolated"])
def test_wheel_without_torch(without_torch: Path, source: Path, tmp_path: Path, isolation: bool):
    wheel, said = build_wheel(without_torch, source, tmp_path, *([] if isolation else ["--no-build-isolation"]))
    assert "Collecting torch" not in said
    assert "the torch binding is left out; install torch first" in said
    assert {name for name in files_of(wheel) if name.endswith(".so")} == {
        "apet_kernels/libapet.so",
        "apet_kernels/_host.so",
    }


@pytest.mark.slow
def test_wheel_without_a_compiler(with_torch: Path, source: Path, tmp_path: Path):
    wheel, said = build_wheel(with_torch, source, tmp_path, CXX="no-such-compiler")
    assert "they need a C++ compiler" in said
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in files_of(wheel))
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_REFERENCE)


@pytest.mark.slow
def test_a_required_native_build_fails_with_a_sentence(without_torch: Path, source: Path, tmp_path: Path):
    with pytest.raises(AssertionError, match="APET_REQUIRE_NATIVE is set, but no torch"):
        build_wheel(without_torch, source, tmp_path, "--no-build-isolation", APET_REQUIRE_NATIVE="1")


@pytest.mark.slow
@pytest.mark.parametrize("isolation", [True, False], ids=["isolated", "not-isolated"])
def test_editable(with_torch: Path, source: Path, isolation: bool):
    options = [] if isolation else ["--no-build-isolation"]
    run(with_torch, "-m", "pip", "install", "--no-deps", *options, "--editable", source)
    run(with_torch, "-I", "-c", CHECK_KERNELS)
    assert str(source) in run(with_torch, "-I", "-c", "import apet_kernels; print(apet_kernels.__file__)")
    run(with_torch.with_name("apet"), "--help")


# ---- other processors (slow) -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generic_build_compiles_for_arm(without_torch: Path, tmp_path: Path):
    compiler, cmake = shutil.which("aarch64-linux-gnu-g++"), without_torch.with_name("cmake")
    if not compiler:
        pytest.skip("aarch64-linux-gnu-g++ is not installed (Debian: g++-aarch64-linux-gnu)")
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={compiler}"]
    run(cmake, "-S", ROOT / "csrc", "-B", tmp_path, *target, "-DCMAKE_CXX_FLAGS=-Werror", "-DBUILD_SHARED_LIBS=ON")
    run(cmake, "--build", tmp_path)
    assert "AArch64" in run("readelf", "-h", tmp_path / "libapet.so")
