"""The package imported again, or twice in one process: the ops are defined once, and do not change."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import apet_kernels

PACKAGE = Path(apet_kernels.__file__).parent
BEFORE = """
import importlib, importlib.util, sys, warnings
warnings.simplefilter("error")  # torch warns where a kernel replaces another
import torch, apet_kernels
from pathlib import Path

x = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(0))
packed = x.flatten(0, 1)

def results(kernels):
    found = [*torch.ops.apet.compress(x, 8), *kernels.compress(x, 8, 4, layout="append"), *kernels.score(x, 4)]
    found += [kernels.merge(x, torch.tensor([[3, 1], [7, 7]])), *kernels.compress_packed(packed, [40, 24], [7, 9])]
    return found + [*kernels.compress(x, 8, 4, backend="reference")]

def same(a, b):
    assert len(a) == len(b) and all(map(torch.equal, a, b))

def import_copy(folder, name):
    init = Path(folder, "__init__.py")
    spec = importlib.util.spec_from_file_location(name, init, submodule_search_locations=[str(init.parent)])
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

"""
FIRST = "before = results(apet_kernels)\n"
COMPILED = """
def compiled():
    return torch.compile(lambda x: torch.ops.apet.compress(x * 1, 8, 3), fullgraph=True, backend="aot_eager")

old = compiled()
traced = old(x)

def still_right(kernels, tokens):
    same(results(kernels), before)
    same(old(x), traced)
    same(compiled()(x), traced)
    y = torch.randn(1, tokens, 16)
    same(old(y), torch.ops.apet.compress(y, 8, 3))  # compiles the old function once more, for another shape
"""
AFTER = """
same(results(apet_kernels), before)
for wrong in (lambda: apet_kernels.compress(x, 99), lambda: apet_kernels.compress(x, 8, layout="sideways")):
    try:
        wrong()
    except ValueError:
        pass
    else:
        raise AssertionError("a wrong argument was taken")
"""


def run(code: str, folder: Path | None = None) -> str:
    """Runs code in a new process; returns its output."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_reload():
    """By importlib, module by module as %autoreload does, and by deleting all modules, as some notebooks do."""
    run(
        BEFORE
        + FIRST
        + COMPILED
        + """
import gc
for _ in range(2):
    importlib.reload(apet_kernels.ops)
    importlib.reload(apet_kernels)
still_right(apet_kernels, 40)
for name in [n for n in sys.modules if n.split(".")[0] == "apet_kernels" and "_host" not in n]:
    importlib.reload(sys.modules[name])
still_right(apet_kernels, 50)
for name in [n for n in sys.modules if n.split(".")[0] == "apet_kernels"]:
    del sys.modules[name]
del apet_kernels
gc.collect()
apet_kernels = importlib.import_module("apet_kernels")
gc.collect()
still_right(apet_kernels, 60)
"""
        + AFTER
    )


@pytest.mark.slow  # starts Python and torch several times
def test_copies_under_other_names(tmp_path):
    """An engine vendors the package beside the installed one: the same files, copies, or only the Python files."""
    shutil.copytree(PACKAGE, tmp_path / "all", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(PACKAGE, tmp_path / "pure", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    folders = [str(PACKAGE), str(tmp_path / "all"), str(tmp_path / "pure")]
    run(
        BEFORE
        + FIRST
        + COMPILED
        + f"""
for n, folder in enumerate({folders}):
    copy = import_copy(folder, f"vendored_kernels_{{n}}")
    assert copy is not apet_kernels and copy.compress is not apet_kernels.compress
    assert copy.why_unavailable("cpu") == apet_kernels.why_unavailable("cpu")
    still_right(copy, 40 + n)
    copy.set_backend("reference")
    assert apet_kernels.dispatch.chosen_backend() == "reference"  # what implements the ops of both
    apet_kernels.set_backend(None)
    assert copy.dispatch.chosen_backend() is None
    importlib.reload(copy.ops)
    still_right(apet_kernels, 50 + n)
"""
        + AFTER
    )


@pytest.mark.slow  # starts Python and torch several times
def test_a_copy_without_kernels_gets_those_of_the_next(tmp_path):
    """The first copy defines the ops; the library of the second copy implements them for both."""
    shutil.copytree(PACKAGE, tmp_path / "vendored", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    run(
        BEFORE.replace("import torch, apet_kernels", "import torch")
        + f"""
copy = import_copy({str(tmp_path / "vendored")!r}, "vendored_kernels")
assert "not part of this installation" in copy.why_unavailable("cpu")
import apet_kernels
if apet_kernels.why_unavailable("cpu") is None:
    assert copy.why_unavailable("cpu") is None
    same(results(copy), results(apet_kernels))
"""
    )


def other(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """Makes a copy of the package with a change in one of its files."""
    folder = tmp_path / "vendored"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    return folder


def rejected(folder: Path) -> str:
    """Returns the error of importing this copy; the first copy continues to work."""
    attempt = f"""
try:
    import_copy({str(folder)!r}, "vendored_kernels")
except ImportError as error:
    print(error)
"""
    (line,) = run(BEFORE + FIRST + attempt + AFTER).splitlines()
    return line


@pytest.mark.slow
def test_another_version(tmp_path):
    """One error that names both versions and both files."""
    version = apet_kernels.__version__
    folder = other(tmp_path, "version.py", version, "99.1.0")
    line = rejected(folder)
    assert f"apet-kernels {version} ({PACKAGE / 'ops.py'})" in line
    assert f"apet-kernels 99.1.0 ({folder / 'ops.py'}) is another version" in line


@pytest.mark.slow  # starts Python and torch several times
def test_other_schemas(tmp_path):
    """The schemas differ, although the version is the same, as during development."""
    folder = other(tmp_path, "ops.py", "float blend=1.0", "float blend=0.5")
    line = rejected(folder)
    assert "has other schemas: restart Python" in line
    assert str(PACKAGE / "ops.py") in line
    assert str(folder / "ops.py") in line


def test_ops_of_something_else():
    """A release without this registry, or another library with the same namespace."""
    said = run(
        """
import torch
library = torch.library.Library("apet", "DEF")
library.define("compress(Tensor x) -> Tensor")
try:
    import apet_kernels
except ImportError as error:
    print(error)
"""
    )
    assert said.startswith("torch.ops.apet is already defined in this process, by an older apet-kernels or by another")
    assert len(said.splitlines()) == 1


def test_the_version_is_that_of_the_c_header():
    """A copy of the Python package needs the version too."""
    header = (PACKAGE.parent / "csrc" / "apet.h").read_text()
    numbers = [line.split()[2] for line in header.splitlines() if line.startswith("#define APET_VERSION_")]
    assert apet_kernels.__version__ == ".".join(numbers)
    assert vars(torch.ops.apet)["_apet_kernels_registry"].version == apet_kernels.__version__
