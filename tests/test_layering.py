"""Imports and includes go one way: csrc includes torch only in its binding, apet_kernels does not import apet."""

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
    """Returns the top-level names of all imports of a Python file, wherever they are in the file."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


PYTHON = ROOT / "python"


def modules(package: str) -> dict[str, Path]:
    """Returns the file of every module of a package in `python`, by its name."""
    names = {path: path.relative_to(PYTHON).with_suffix("").parts for path in (PYTHON / package).rglob("*.py")}
    return {".".join(parts[:-1] if parts[-1] == "__init__" else parts): path for path, parts in names.items()}


def imports(name: str, known: dict[str, Path]) -> set[str]:
    """Returns the modules among `known` that a module imports, anywhere in its file. The packages around an imported
    module, which Python runs before it, do not count."""
    found = set()
    package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            around = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*around, *([node.module] if node.module else [])])
            found |= {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in node.names}
    return found & {*known}


def cycle(graph: dict[str, set[str]], start: str) -> list[str]:
    """Returns modules that import each other in turn, beginning and ending with `start`; [] if there are none."""
    paths, seen = [[start]], set()
    while paths:
        path = paths.pop()
        for name in graph[path[-1]]:
            if name == start:
                return [*path, start]
            if name not in seen:
                seen.add(name)
                paths.append([*path, name])
    return []


def test_the_hooks_have_no_cycle_of_imports():
    """Late imports count, and so do those for type checkers and those of modules outside of the hooks."""
    known = modules("apet")
    graph = {name: imports(name, known) for name in known}
    hooks = [name for name in known if name.startswith("apet.hooks")]
    assert "apet.hooks.selfcheck" in graph["apet.hooks"]
    assert {"apet.hooks.adapters", "apet.hooks.results"} <= graph["apet.hooks.selfcheck"]
    assert {"apet.hooks.parts", "apet.hooks.adapter"} <= graph["apet.hooks.adapters"]
    assert {name: found for name in hooks if (found := cycle(graph, name))} == {}


def test_a_cycle_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "PYTHON", tmp_path)
    (tmp_path / "one/two").mkdir(parents=True)
    for name, text in {
        "__init__": "",
        "a": "from . import b",
        "b": "def late():\n    from .two import c",
        "two/__init__": "",
        "two/c": "from ..a import name",
        "d": "import one.a",
    }.items():
        (tmp_path / f"one/{name}.py").write_text(text)
    known = modules("one")
    graph = {name: imports(name, known) for name in known}
    assert graph["one.two.c"] == {"one.a"}
    assert cycle(graph, "one.a") == ["one.a", "one.b", "one.two.c", "one.a"]
    assert cycle(graph, "one.d") == []


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
    """One file per library, and one header that they share, include torch."""
    files = [p for p in (ROOT / "csrc").rglob("*.*") if any(i.startswith("torch") for i in included(p))]
    assert {p.name for p in files} == TO_TORCH


# Baselines, other methods and tests in Python that have quantities of the algorithm too.
BESIDE = [
    *(ROOT / f"benchmarks/{name}.py" for name in ("lib/alternatives", "lib/baselines", "lib/check", "lib/selection")),
    ROOT / "benchmarks/stages.py",
    ROOT / "tests/test_reference_published.py",
]
BACKENDS = {
    "reference": [ROOT / "apet_kernels/reference.py"],
    "cpu": sorted((ROOT / "csrc/cpu").iterdir()),
    "cuda": sorted((ROOT / "csrc/cuda").iterdir()),
    "triton": sorted((ROOT / "apet_kernels/triton_kernels").glob("*.py")),
}
# The stems of a backend's stage files.
STEMS = {
    "reference": set(),
    "cpu": {
        *("s1_basis", "s2_solve", "s1_s3_sweep", "s3_residual", "s4_topk"),
        *("s1_pool", "s1_rounds", "s4_clusters", "s4_medoids"),
        *("s5_lists", "s5_assign", "s5_mean"),
    },
    "cuda": {
        *("s1_s3_sweep", "s1_pool", "s1_rounds", "s4_topk", "s5_lists", "s5_assign", "s5_mean"),
        *("s1_s4_group", "s1_s4_rounds", "s4_medoids", "s5_merge", "s1_s5_cluster"),
    },
    "triton": {
        *("s1_norms", "s1_s3_sweep", "s1_pool", "s1_rounds"),
        *("s4_topk", "s4_given_rows", "s4_medoids", "s5_assign", "s5_mean"),
    },
}
# Name in the glossary -> former names of the quantity, which had other meanings in other backends.
RETIRED = {
    "norm_sq": ["sq", "norm2"],
    "dist_sq": ["nearest"],
    "pick_value": ["reach", "measure"],
    "resid_sq": ["energy", "rest", "left"],
    "e_sq": ["e2", "error"],
    "L": ["factor"],
    "inv_diag": ["inv_pivot", "inverse", "inv"],
    "inv_norm": ["target_scale"],
    "target": ["to"],
    "appended": ["extra", "extra_rows"],
    "row_blend": ["source"],
}


def names_in(path: Path) -> set[str]:
    """Returns the names in a source file: in C++ all identifiers outside of comments and strings, in Python variables,
    arguments, and attributes that it sets."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\w+", re.sub(r"//[^\n]*|/\*.*?\*/|\"[^\"\n]*\"", " ", text, flags=re.DOTALL)))
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return names


def test_reference_has_every_stage():
    assert [n for n in STAGES if not hasattr(reference, n)] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_stages_have_one_name(backend: str):
    """A stage file is named by the stages it spans, with the same stem in every backend."""
    assert {p.stem for p in BACKENDS[backend] if re.match(r"s\d", p.name)} == STEMS[backend]


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_kernel_has_a_file_of_its_name(backend: str):
    kernel = r"^(?:@jit\ndef|__global__ void [^;{]*?) (\w+)\((?:const Call |\n)"
    found = {(name, path.stem) for path in BACKENDS[backend] for name in re.findall(kernel, path.read_text(), re.M)}
    assert len(found) == {"cuda": 5, "triton": 9}[backend]
    assert {name for name, stem in found if name != stem} == set()


@pytest.mark.parametrize("part", [*BACKENDS, "beside"])
def test_quantities_have_one_name(part: str):
    """Neither backends nor what they are compared with use the former names, which had other meanings elsewhere."""
    retired = {old: new for new, names in RETIRED.items() for old in names}
    paths = BACKENDS.get(part, BESIDE)
    found = {(path.name, name) for path in paths for name in names_in(path) & set(retired)}
    assert {f"{file}: {name} is called {retired[name]}" for file, name in found} == set()


def test_the_glossary_has_these_names():
    """The table of docs/algorithm.md has these names, with their meanings."""
    glossary = (ROOT / "docs/algorithm.md").read_text().partition("## Names")[2].partition("\n## ")[0]
    named = set(re.findall(r"`(\w+)`", glossary))
    assert set(RETIRED) <= named


def code_lines(path: Path) -> int:
    """Returns how many lines the statements of a Python file take, without docstrings, comments and blank lines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return sum(bool(line.strip()) for line in ast.unparse(tree).splitlines())


def families(package: str) -> list[Path]:
    """Returns the files of single families of models in a package of `apet`."""
    shared = {"__init__", "tiled", "budget", "compress", "metrics", "mrope", "processing", "rows", "unsupported"}
    return [path for path in sorted((PYTHON / "apet" / package).glob("*.py")) if path.stem not in shared]


@pytest.mark.parametrize("path", families("hooks/adapters"), ids=lambda path: path.stem)
def test_adapters_of_families_are_short(path: Path) -> None:
    assert code_lines(path) < 40  # docs/add-a-model.md


@pytest.mark.parametrize("path", families("vllm"), ids=lambda path: path.stem)
def test_families_of_the_vllm_plugin_are_short(path: Path) -> None:
    assert code_lines(path) <= 50
