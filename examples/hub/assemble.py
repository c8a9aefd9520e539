"""Writes a repository of kernels for `kernels.get_kernel` of Hugging Face, from this checkout.

    python examples/hub/assemble.py FOLDER [--compiled]

It writes into FOLDER: build/torch-cuda and build/torch-rocm (Python and Triton, for any torch); build.toml and
torch-ext/, from which kernel-builder can make the same builds; and the card. --compiled adds the CPU kernels of this
processor's architecture, as build/torch-stable-abi210-cpu-.... They use the stable ABI of torch, and work with torch
2.10 and newer and any Python.

`kernels.get_local_kernel(Path(FOLDER))` loads it; `kernels upload` or `hf upload` publishes it. Every build has its own
id and its ops are `torch.ops.ID.*`, so that a process can load several versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAME = "apet-kernels"
NAMESPACE = 'NAMESPACE = "apet"'  # the line of registry.py that sets the namespace of the ops
STABLE_ABI = "210"  # of torch 2.10, the oldest that CMakeLists.txt supports
NOARCH = ("cuda", "rocm")


def main() -> None:
    """Writes the repository."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a folder that does not exist yet")
    parser.add_argument("--compiled", action="store_true", help="also the CPU kernels, compiled here")
    options = parser.parse_args()
    if options.folder.exists():
        parser.error(f"{options.folder} exists already")
    for name in ("build.toml", "CARD.md"):
        put(HERE / name, options.folder / name)
    put(HERE / "CARD.md", options.folder / "README.md")
    put(ROOT / "LICENSE", options.folder / "LICENSE")
    sources(options.folder / "torch-ext/apet_kernels", "apet")
    for backend in NOARCH:
        variant(options.folder / f"build/torch-{backend}", backend)
    if options.compiled:
        system = f"{platform.machine()}-{platform.system().lower()}"
        folder = options.folder / f"build/torch-stable-abi{STABLE_ABI}-cpu-{system}"
        compile_into(folder, variant(folder, "cpu"))


def put(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def sources(folder: Path, namespace: str) -> None:
    """The Python files of the package, with their ops in `torch.ops.NAMESPACE`."""
    for path in sorted((ROOT / "apet_kernels").rglob("*.py")):
        put(path, folder / path.relative_to(ROOT / "apet_kernels"))
    put(ROOT / "apet_kernels/py.typed", folder / "py.typed")
    registry = folder / "registry.py"
    text = registry.read_text()
    if text.count(NAMESPACE) != 1:
        raise SystemExit(f"{registry.name} no longer has the line: {NAMESPACE}")
    registry.write_text(text.replace(NAMESPACE, f'NAMESPACE = "{namespace}"'))


def variant(folder: Path, backend: str) -> str:
    """A build of the Python files for one backend. Returns its id."""
    identity = f"_{NAME.replace('-', '_')}_{backend}_{commit()}"
    sources(folder, identity)
    metadata = {
        "name": NAME,
        "id": identity,
        "version": int(re.findall(r"^version = (\d+)$", (HERE / "build.toml").read_text(), re.MULTILINE)[0]),
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    return identity


def commit() -> str:
    """Seven digits of the commit, after a "d" (dirty) if files differ from it."""
    said = subprocess.check_output(
        ["git", "-C", ROOT, "describe", "--always", "--dirty=-dirty", "--abbrev=7", "--exclude=*"], text=True
    ).strip()
    digits, _, dirty = said.partition("-")
    return f"d{digits}" if dirty else digits


def compile_into(folder: Path, namespace: str) -> None:
    """Compiles the CPU library and its torch binding. The module _host is left out: it needs one version of Python."""
    with tempfile.TemporaryDirectory() as build:
        torch_dir = Path(torch.__file__).parent
        cmake = [sys.executable, "-m", "cmake"] if shutil.which("cmake") is None else ["cmake"]
        python = [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11_dir()}", "-DAPET_PYTHON=ON"]
        names = [f"-DTORCH_DIR={torch_dir}", f"-DAPET_OPS_NAMESPACE={namespace}"]
        subprocess.check_call([*cmake, "-S", ROOT, "-B", build, *python, *names], stdout=subprocess.DEVNULL)
        targets = ["--target", "apet", "apet_torch"]
        subprocess.check_call([*cmake, "--build", build, "--parallel", *targets], stdout=subprocess.DEVNULL)
        for pattern in ("libapet_*.so", "csrc/libapet_*.so"):
            for library in Path(build).glob(pattern):
                put(library, folder / library.name)


def pybind11_dir() -> str:
    import pybind11

    return str(pybind11.get_cmake_dir())


if __name__ == "__main__":
    main()
