"""The decisions and messages of setup.py."""

from __future__ import annotations

import runpy
import sys
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


NVCC = "/usr/local/cuda/bin/nvcc"


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
