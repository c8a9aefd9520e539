"""Imports and includes go one way: csrc knows no torch but for its binding, apet_kernels knows no apet."""

import ast
import re
import sys
from pathlib import Path

import pytest

from apet_kernels import reference

ROOT = Path(__file__).parents[1]
TO_TORCH = {"torch_binding.cpp", "cuda_torch_binding.cpp", "torch_ops.h"}
BINDINGS = TO_TORCH | {"host_module.cpp"}
STAGES = ("s1_basis", "s2_solve", "s3_residual", "s4_topk", "s5_merge")


def imported(path: Path) -> set[str]:
    """Top-level names of everything that a Python file imports, wherever in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def included(path: Path) -> list[str]:
    return re.findall(r"^\s*#\s*include\s*[<\"]([^>\"]+)", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted((ROOT / "apet_kernels").rglob("*.py")), ids=lambda p: p.name)
def test_apet_kernels_imports_torch_and_triton_only(path):
    assert imported(path) - sys.stdlib_module_names <= {"torch", "triton"}


def test_apet_does_not_reach_past_apet_kernels():
    """The command uses the package's functions, not its compiled modules."""
    for path in (ROOT / "python").rglob("*.py"):
        assert "_host" not in path.read_text(), path


def test_the_core_is_free_of_torch():
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in {".h", ".hpp", ".cpp", ".cu", ".cuh", ".inc"}]
    assert any(p.parent.name == "cpu" for p in sources)
    for path in sources:
        outside = [i for i in included(path) if re.match(r"(torch|ATen|c10|pybind11|Python)\b", i)]
        assert not outside or path.name in BINDINGS, f"{path.name} includes {outside}"


def test_one_file_per_library_binds_to_torch():
    """And one header that they share."""
    files = [p for p in (ROOT / "csrc").rglob("*.*") if any(i.startswith("torch") for i in included(p))]
    assert {p.name for p in files} == TO_TORCH


def test_stages_have_one_name():
    """The same stem in the reference, the kernels and the tests; a fused kernel is named by the stages it spans."""
    assert [n for n in STAGES if not hasattr(reference, n)] == []
    kernels = {p.stem for p in (ROOT / "csrc" / "cpu").iterdir() if re.match(r"s\d", p.name)}
    assert kernels == {"s1_s3_sweep", "s4_topk", "s5_merge"}
