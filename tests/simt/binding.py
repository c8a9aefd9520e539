"""The backend "cuda" for CPU tensors: csrc/cuda_torch_binding.cpp over the simulated GPU (torch_binding.cpp)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch

from apet_kernels import available, ops

from . import build, call

_keep: list[torch.library.Library] = []  # keeps the registrations until the process ends


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
    if not torch.version.cuda:  # with CUDA, apet_kernels has defined them
        for schema in ops.CUDA_SCHEMAS:
            library.define(schema)
    torch.ops.load_library(path)
    _keep.append(library)


def stand_in(device: call.Device, set_attribute: Callable[[object, str, object], None] = setattr) -> None:
    """Loads the ops, and makes `backend="cuda"` take CPU tensors, on this simulated device."""
    load()
    call.use_device(device)
    for query in ("why_missing", "why_unavailable"):
        usable = getattr(available, query)
        set_attribute(available, query, lambda name, usable=usable: None if name == "cuda" else usable(name))
    set_attribute(available, "why_not_cuda", lambda device: None)
