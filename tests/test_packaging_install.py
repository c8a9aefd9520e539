"""Every way to install: wheels and sdists, with and without torch, a compiler, and isolation."""

from __future__ import annotations

import email
import functools
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from tests import arm
from tests.binaries import (
    RUNTIMES,
    declared_for,
    exported,
    failing,
    needed,
    run,
    used_of_torch,
    version,
)
from tests.test_packaging_setup import COMMANDS
from tools import sass

ROOT = Path(__file__).parents[1]
ISOLATION = pytest.mark.parametrize(
    "isolation", [pytest.param(True, id="isolated", marks=pytest.mark.matrix), pytest.param(False, id="not-isolated")]
)

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
assert apet_kernels.available.CUDA_LIBRARY.exists()
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


@pytest.fixture(scope="module", autouse=True)
def as_locked() -> Iterator[None]:
    """Makes the environments of the tests below, and those of isolated builds, use the versions of the lock."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "UV_CONSTRAINT", "UV_BUILD_CONSTRAINT"):
            patch.setenv(name, str(ROOT / "requirements/dev.txt"))
        yield


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds an sdist in isolation; it needs no torch."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpacks the sdist, as a user does. All installs below start from it, and share its compiled objects."""
    folder = tmp_path_factory.mktemp("source")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    return next(folder.iterdir())


def environment(folder: Path, *requirements: str) -> Path:
    """Makes a new virtual environment with these packages; returns its Python."""
    venv.create(folder, with_pip=True)
    if requirements:
        run(folder / "bin/python", "-m", "pip", "install", "--no-compile", *requirements)
    return folder / "bin/python"


BUILD_TOOLS = ["setuptools>=77", "cmake", "ninja", "pybind11"]


@pytest.fixture(scope="module")
def with_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    requirements = [
        f"torch=={metadata.version('torch').split('+')[0]}",
        "numpy",
        "typer",
        "rich",
        *BUILD_TOOLS,
        "build",
    ]
    return environment(tmp_path_factory.mktemp("venv") / "with_torch", *requirements)


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment(tmp_path_factory.mktemp("venv") / "without_torch", *BUILD_TOOLS)


def files_of(wheel: Path) -> set[str]:
    """Returns the files of a wheel, without the metadata and with plain names for those specific to a Python."""
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    return {re.sub(r"_host\..*", "_host.so", name) for name in names}


def build_wheel(python: Path, source: Path, folder: Path, *options: str, **variables: str) -> tuple[Path, str]:
    """Builds a wheel with this Python; returns it, and the output of the build."""
    said = run(python, "-m", "pip", "wheel", "-v", "--no-deps", *options, "-w", folder, source, **variables)
    (wheel,) = folder.glob("*.whl")
    return wheel, said


@pytest.mark.slow
def test_sdist_builds_and_tests_and_knows_its_commit(source: Path):
    for name in (
        *("CMakeLists.txt", "csrc/apet.h", "tests/test_packaging.py", "tools/sass.py", "LICENSE", "Makefile"),
        *("noxfile.py", "requirements/dev.txt"),
    ):
        assert (source / name).exists(), name
    assert not list(source.rglob("*.so"))
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (source / "COMMIT").read_text().strip().removesuffix("-dirty") == head
    about = email.message_from_string((source / "PKG-INFO").read_text())
    assert (about["Name"], about["Version"]) == ("apet-kernels", version())


@pytest.mark.slow
@ISOLATION
def test_wheel_with_torch(with_torch: Path, source: Path, tmp_path: Path, isolation: bool):
    wheel, said = build_wheel(with_torch, source, tmp_path, *([] if isolation else ["--no-build-isolation"]))
    assert "Collecting torch" not in said
    files = files_of(wheel)
    assert {f"apet_kernels/{n}" for n in ("libapet.so", "libapet_torch.so", "_host.so", "py.typed")} < files
    assert {name.split("/")[0] for name in files} == {"apet", "apet_kernels"}
    data = {name for name in files if Path(name).suffix not in (".py", ".so", ".typed")}
    page = {f"apet/explore/{name}" for name in ("page.css", "page.js", "view.css")}
    assert data == page | {"apet/hooks/tested.json"}
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_KERNELS)
    recorded = (source / "COMMIT").read_text().strip()
    assert recorded in run(with_torch, "-I", "-c", "import apet_kernels; print(apet_kernels.build_info())")


@pytest.mark.matrix
@pytest.mark.slow
def test_wheel_with_cuda(with_torch: Path, source: Path, tmp_path: Path):
    """APET_CUDA_ARCHS is set, so it is compiled. With a torch without CUDA it is not loaded, and all else works."""
    if why := sass.missing():
        pytest.skip(why)
    wheel, _ = build_wheel(with_torch, source, tmp_path, APET_CUDA_ARCHS="90-real")
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


@functools.cache
def uv_has_an_index() -> bool:
    """Whether uv, which does not read pip's settings, finds packages here."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "-"]
    return subprocess.run(command, input="setuptools", capture_output=True, text=True).returncode == 0


def default_build(front_end: str, python: Path, source: Path, folder: Path) -> list:
    """Returns the default build of a front end; `build` also covers poetry, which calls it."""
    if front_end.startswith("uv") and not uv_has_an_index():
        pytest.skip("uv reaches no package index")
    commands: dict[str, list] = {
        "pip": [python, "-m", "pip", "wheel", "--no-deps", "-w", folder, source],
        "uv": [sys.executable, "-m", "uv", "build", "--wheel", "--python", python, "-o", folder, source],
        "uv-pip": [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--python", python, source],
        "build": [sys.executable, "-m", "build", "--wheel", "-o", folder, source],
    }
    return commands[front_end]


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["pip", "uv", "uv-pip", "build"])
def test_isolated_without_torch_fails_with_the_commands(
    without_torch: Path, source: Path, tmp_path: Path, front_end: str
):
    said = failing(*default_build(front_end, without_torch, source, tmp_path))
    assert "this build finds no torch >= 2.10" in said
    for command in COMMANDS.values():
        assert command in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "front_end", ["pip", "uv-pip", *(pytest.param(n, marks=pytest.mark.matrix) for n in ("uv", "build"))]
)
def test_the_pure_package_is_built_by_name_alone(without_torch: Path, source: Path, tmp_path: Path, front_end: str):
    run(*default_build(front_end, without_torch, source, tmp_path), APET_BUILD="pure")
    if front_end == "uv-pip":
        run(without_torch, "-m", "pip", "uninstall", "--yes", "apet-kernels")
    else:
        (wheel,) = tmp_path.glob("*.whl")
        assert wheel.name.endswith("-py3-none-any.whl")
        assert not any(name.endswith(".so") for name in files_of(wheel))


@pytest.mark.slow
def test_the_pure_package_runs_on_the_reference(with_torch: Path, source: Path, tmp_path: Path):
    wheel, _ = build_wheel(with_torch, source, tmp_path, "--no-build-isolation", APET_BUILD="pure")
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_REFERENCE)


@pytest.mark.slow
def test_the_command_for_uv_builds_the_kernels(with_torch: Path, source: Path):
    uv = [sys.executable, "-m", "uv", "pip", "install", "--python", with_torch]
    run(*uv, "--no-deps", "--reinstall", "--no-build-isolation", source)
    run(with_torch, "-I", "-c", CHECK_KERNELS)


@pytest.mark.matrix  # `make wheel` runs the same command
@pytest.mark.slow
def test_the_command_for_build_builds_the_kernels(with_torch: Path, source: Path, tmp_path: Path):
    run(with_torch, "-m", "build", "--no-isolation", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_KERNELS)


@pytest.mark.slow
def test_without_a_compiler_the_build_fails_and_names_it(with_torch: Path, source: Path, tmp_path: Path):
    said = failing(*default_build("pip", with_torch, source, tmp_path), CXX="no-such-compiler")
    assert "the kernels cannot be compiled without a C++ compiler" in said
    assert "APET_BUILD=pure" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_compilers_error_ends_the_build_in_its_own_words(with_torch: Path, source: Path, tmp_path: Path):
    broken = shutil.copytree(source, tmp_path / "broken", ignore=shutil.ignore_patterns("build"))
    with (broken / "csrc/problem.cpp").open("a") as file:
        file.write("#error broken on purpose\n")
    said = failing(with_torch, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, broken)
    assert "#error broken on purpose" in said
    assert "this command failed with exit code 1" in said
    assert "CMake Error" not in said
    assert "Traceback" not in said


@pytest.mark.slow
@ISOLATION
def test_editable(with_torch: Path, source: Path, isolation: bool):
    options = [] if isolation else ["--no-build-isolation"]
    run(with_torch, "-m", "pip", "install", "--no-deps", *options, "--editable", source)
    run(with_torch, "-I", "-c", CHECK_KERNELS)
    assert str(source) in run(with_torch, "-I", "-c", "import apet_kernels; print(apet_kernels.__file__)")
    run(with_torch.with_name("apet"), "--help")


# ---- other processors (slow) -----------------------------------------------------------------------------------------


@pytest.mark.matrix
@pytest.mark.slow
def test_compiles_for_arm(with_torch: Path, tmp_path: Path):
    """Configured as setup.py does it, for another processor: libapet with every instruction set, and the objects of
    what cannot be linked, because torch and Python are for this one (whose Python.h serves). tests/test_arm.py runs
    the library."""
    if not shutil.which(arm.COMPILER):
        pytest.skip(f"{arm.COMPILER} is not installed (Debian: g++-aarch64-linux-gnu)")
    cmake, ninja = (with_torch.with_name(name) for name in ("cmake", "ninja"))
    pybind11 = run(with_torch, "-c", "import pybind11; print(pybind11.get_cmake_dir())").strip()
    find = "from importlib.util import find_spec; print(find_spec('torch').submodule_search_locations[0])"
    headers = run(with_torch, "-c", "import sysconfig; print(sysconfig.get_path('include'))").strip()
    variables = {"APET_PYTHON": "ON", "TORCH_DIR": run(with_torch, "-c", find).strip(), "pybind11_DIR": pybind11}
    variables |= {"Python_EXECUTABLE": with_torch, "Python_INCLUDE_DIR": headers}
    variables |= {"CMAKE_MAKE_PROGRAM": ninja, "CMAKE_CXX_FLAGS": "-Werror"}
    options = [*arm.CMAKE_OPTIONS, *(f"-D{name}={value}" for name, value in variables.items())]
    run(cmake, "-S", ROOT, "-B", tmp_path, "-G", "Ninja", *options)
    (isas,) = re.findall(r'APET_BUILD_ISAS "(.*)"', (tmp_path / "generated/build_info.h").read_text())
    assert tuple(isas.split()) == arm.ISAS
    objects = [
        f"CMakeFiles/{name}.cpp.o" for name in ("apet_torch.dir/csrc/torch_binding", "_host.dir/csrc/host_module")
    ]
    run(cmake, "--build", tmp_path, "--target", "apet", *objects)
    (library,) = tmp_path.rglob("libapet.so")
    assert "AArch64" in run("readelf", "-h", library)
    assert exported(library) == declared_for("libapet")
    assert needed(library) <= RUNTIMES
