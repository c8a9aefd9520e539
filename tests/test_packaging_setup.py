"""The decisions and messages of setup.py."""

from __future__ import annotations

import runpy
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.binaries import (
    failing,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rules(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Returns the functions that setup.py defines."""
    monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("APET_BUILD", raising=False)
    return runpy.run_path("setup.py")


# For each front end, the command that builds.
COMMANDS = {
    "pip": "pip install .",
    "uv": "uv pip install --no-build-isolation .",
    "build": "python -m build --no-isolation",
    "poetry": "poetry run pip install --no-build-isolation .",
}


def test_a_build_without_torch_says_what_to_do_instead(rules: dict):
    said = rules["no_torch"]()
    for command in COMMANDS.values():
        assert command in said
    assert said.count("pip install torch setuptools cmake ninja pybind11\n") == 3
    commands = [line for line in said.splitlines() if line.startswith("  ")]
    assert len(commands) == 9
    assert max(map(len, commands)) <= 70  # uv breaks longer lines


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


@pytest.fixture
def nvcc(tmp_path: Path) -> Callable[[str], str]:
    """Makes a program that says that it is nvcc of a CUDA version."""

    def made(version: str) -> str:
        program = tmp_path / f"cuda-{version}/bin/nvcc"
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {version}, V{version}.9'\n")
        program.chmod(0o755)
        return str(program)

    return made


@pytest.fixture
def cuda_archs(rules: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str | None], str]:
    """Runs setup.py's rule for a torch/version.py with this line and this nvcc."""
    monkeypatch.delenv("APET_CUDA_ARCHS", raising=False)
    rule = rules["cuda_archs"]

    def decide(line: str, nvcc: str | None) -> str:
        (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
        return rule(tmp_path, nvcc)

    return decide


@pytest.mark.parametrize(
    ("line", "version", "expected"),
    [
        ("cuda: Optional[str] = '13.0'", "13.0", "default"),
        ("cuda = '12.8'", "12.8", "default"),
        ("cuda: Optional[str] = None", "13.0", ""),
        ("cuda: Optional[str] = None\nhip: Optional[str] = '7.0'", "13.0", ""),
        ("cuda: Optional[str] = '13.0'", None, ""),
        ("cuda: Optional[str] = '12.8'", "11.5", ""),
    ],
)
def test_unasked_cuda_kernels_are_built_where_torch_runs_them(
    cuda_archs: Callable, nvcc: Callable, line: str, version: str | None, expected: str, capsys
):
    assert cuda_archs(line, version and nvcc(version)) == expected
    if version == "11.5":
        assert "is of CUDA 11.5, older than 12: the CUDA kernels are left out" in capsys.readouterr().err


def test_what_apet_cuda_archs_asks_for_is_built(cuda_archs: Callable, nvcc: Callable, monkeypatch: pytest.MonkeyPatch):
    new, old = nvcc("13.0"), nvcc("11.5")
    cpu, cuda = "cuda: Optional[str] = None", "cuda: Optional[str] = '13.0'"
    monkeypatch.setenv("APET_CUDA_ARCHS", "80-real;90")
    assert cuda_archs(cpu, new) == "80-real;90"
    with pytest.raises(SystemExit, match=f"but {old} is of CUDA 11.5, and they need nvcc 12 or newer"):
        cuda_archs(cuda, old)
    with pytest.raises(SystemExit, match="APET_CUDA_ARCHS=80-real;90 asks for CUDA kernels, but there is no nvcc"):
        cuda_archs(cuda, None)
    monkeypatch.setenv("APET_CUDA_ARCHS", "none")
    assert cuda_archs(cuda, new) == ""


def test_the_nvcc_of_cuda_home_goes_before_that_on_the_path(
    rules: dict, nvcc: Callable, monkeypatch: pytest.MonkeyPatch
):
    """As in torch's own builds. CUDACXX goes before both."""
    on_path, at_home = (Path(nvcc(version)) for version in ("11.5", "12.8"))
    monkeypatch.delenv("CUDACXX", raising=False)
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.setenv("CUDA_HOME", str(at_home.parents[1]))
    assert rules["find_nvcc"]() == str(at_home)
    monkeypatch.delenv("CUDA_HOME")
    assert rules["find_nvcc"]() == str(on_path)
    monkeypatch.setenv("CUDACXX", str(at_home))
    assert rules["find_nvcc"]() == str(at_home)


def test_packages_bring_the_programs_that_are_used(rules: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In pip's isolated build other ones, perhaps too old, are beside the Python that is installed into."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/ninja").write_text("#!/bin/sh\n")
    (tmp_path / "bin/ninja").chmod(0o755)
    (tmp_path / "ninja.py").write_text(f"BIN_DIR = {str(tmp_path / 'bin')!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "ninja", raising=False)
    assert rules["find_program"]("ninja") == str(tmp_path / "bin/ninja")


def test_libraries_of_this_python_are_removed_before_new_ones(rules: dict, tmp_path: Path):
    """Those of another one, built in the same checkout, stay."""
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    for name in ("libapet.so", "libapet_cuda_torch.so", f"_host{suffix}", "_host.cpython-399-other.so", "core.py"):
        (tmp_path / name).touch()
    rules["remove_libraries"](tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"_host.cpython-399-other.so", "core.py"}


def test_a_folder_for_packagers_does_not_reach_cmake(rules: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """DESTDIR would install the libraries elsewhere, and leave the wheel without."""
    monkeypatch.setenv("DESTDIR", str(tmp_path))
    rules["run"](sys.executable, "-c", "import os, sys; sys.exit('DESTDIR' in os.environ)")
