"""The backend "cuda" for CPU tensors: csrc/cuda_torch_binding.cpp over the simulated GPU (torch_binding.cpp)."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from apet_kernels import dispatch, ops

from . import build, call

_keep: list[torch.library.Library] = []  # as long as the process lives


@functools.cache
def load() -> None:
    """Registers the ops `_cuda_*` on the CPU key."""
    torch_folder = Path(torch.__file__).parent
    options = ["-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra", "-DUSE_CUDA"]
    options += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{build.CSRC}", f"-isystem{torch_folder / 'include'}"]
    source = build.HERE / "torch_binding.cpp"
    files = [source, build.CSRC / "cuda_torch_binding.cpp", build.CSRC / "torch_ops.h", build.CSRC / "apet.h"]
    libraries = [
        str(build.library()),
        "-Wl,--no-as-needed",
        *(f"{torch_folder}/lib/{name}.so" for name in ("libtorch", "libtorch_cpu")),
    ]
    digest = build.digest(torch.__version__, *options, *libraries, *(file.read_text() for file in files))
    path = build.make(build.FOLDER / f"libsimt_torch-{digest}.so", ["g++", *options, str(source), *libraries])
    library = torch.library.Library("apet", "FRAGMENT")
    if not torch.version.cuda:  # else apet_kernels has defined them
        for schema in ops.CUDA_SCHEMAS:
            library.define(schema)
    torch.ops.load_library(path)
    _keep.append(library)


def use_device(device: call.Device) -> None:
    """Sets the device that the binding plans for from now on."""
    traits = (device.capability, device.multiprocessors, device.shared_per_block)
    call.load().simt_use_device(*traits, device.shared_per_multiprocessor, device.largest_cluster)


def stand_ins(device: call.Device) -> dict[str, object]:
    """Loads the ops; returns what `apet_kernels.dispatch` needs for `backend="cuda"` to take CPU tensors."""
    load()
    use_device(device)
    usable = dispatch.why_unavailable
    return {
        "why_unavailable": lambda name: None if name == "cuda" else usable(name),
        "why_not_cuda": lambda device: None,
    }
