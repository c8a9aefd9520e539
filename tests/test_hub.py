"""The repository that examples/hub assembles for the Hugging Face Hub, loaded by `kernels` from a folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # compiles
pytest.importorskip("kernels", reason="kernels is not installed: `make test-hub` brings it along")

LOAD = """
import pathlib, sys, torch
from kernels import get_local_kernel
hub = get_local_kernel(pathlib.Path(sys.argv[1]))
import apet_kernels
x = torch.randn(2, 50, 64, generator=torch.Generator().manual_seed(0))
backend = sys.argv[2]
assert hub.why_unavailable(backend) is None, hub.why_unavailable(backend)
namespace = hub.registry.NAMESPACE
assert hub.__name__ == namespace != "apet"
for dtype in (torch.float32, torch.float16):
    for keep, options in ((10, {}), (20, {"layout": "overwrite"}), (7, {"layout": "append", "select": "qr"})):
        ours = apet_kernels.compress(x.to(dtype), keep, 5, backend=backend, **options)
        its = hub.compress(x.to(dtype), keep, 5, backend=backend, **options)
        assert all(map(torch.equal, ours, its)), (dtype, keep, options)
op = getattr(torch.ops, namespace).compress
assert torch.equal(torch.compile(lambda x: op(x, 10)[0], backend="eager", fullgraph=True)(x), op(x, 10)[0])
files = {line.split()[-1] for line in open("/proc/self/maps") if "/libapet" in line}
print(len(files))
"""


def assemble(folder: Path, *options: str) -> Path:
    subprocess.check_call([sys.executable, ROOT / "examples/hub/assemble.py", folder, *options])
    return folder


def loaded(folder: Path, backend: str, **environment: str) -> int:
    """Loads it beside the installed package and compares the two. Returns how many apet libraries were loaded."""
    command = [sys.executable, "-c", LOAD, folder, backend]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_compiled_beside_the_installed_package(tmp_path: Path) -> None:
    """Two builds, each with its own library and ops, give the same bits in one process."""
    folder = assemble(tmp_path / "hub", "--compiled")
    assert loaded(folder, "cpu") == 4
    from kernels._rust import Build

    Build.open(folder)  # raises the errors of kernel-builder


def test_triton_for_any_torch(tmp_path: Path) -> None:
    """The build that names no architecture. Its kernels are interpreted here, so no GPU is needed."""
    folder = assemble(tmp_path / "hub")
    assert sorted(path.name for path in (folder / "build").iterdir()) == ["torch-cuda", "torch-rocm"]
    metadata = json.loads((folder / "build/torch-cuda/metadata.json").read_text())
    assert re.fullmatch(r"_apet_kernels_cuda_d?[0-9a-f]{7}", metadata["id"])
    other = tmp_path / "interpreted/build/torch-cpu"
    shutil.copytree(folder / "build/torch-cuda", other)
    (other / "metadata.json").write_text(json.dumps({**metadata, "backend": {"type": "cpu"}}))
    pytest.importorskip("triton")
    assert loaded(tmp_path / "interpreted", "triton", TRITON_INTERPRET="1") <= 2  # those of the installed package


def test_a_folder_that_exists_is_left_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, ROOT / "examples/hub/assemble.py", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{tmp_path} exists already" in done.stderr
