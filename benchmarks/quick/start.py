"""The first steps: they describe the machine, and make the package that all later steps import."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quick import build
from benchmarks.quick.items import Item, NotPossible, Options

ROOT = Path(__file__).parents[2]


def card(options: Options) -> Iterator[Item]:
    yield Item("versions", lambda: {"versions": versions()})
    yield Item("device", functools.partial(_device, options))
    yield Item("nvidia-smi", functools.partial(_smi, options))


def versions() -> dict[str, str]:
    """Returns the versions of everything that can matter."""
    found = {"python": platform.python_version(), "machine": platform.platform()}
    for name in ("torch", "triton", "numpy", "transformers", "flash_attn", "pytest"):
        if importlib.util.find_spec(name):
            module = importlib.import_module(name) if name in ("torch", "triton", "numpy") else None
            found[name] = getattr(module, "__version__", None) or importlib.metadata.version(name.replace("_", "-"))
        else:
            found[name] = "not installed"
    compiler = build.nvcc()
    found["nvcc"] = build.version(compiler) if compiler else "none"
    for name in ("cmake", "ninja", "g++", "compute-sanitizer"):
        found[name] = shutil.which(name) or "none"
    from benchmarks.lib import machine

    return {**found, "commit": machine.commit()}


def _device(options: Options) -> dict[str, Any]:
    import torch

    if options.rehearse:
        return {"device": {"name": "a rehearsal", "capability": [9, 0], "sms": 16}}
    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here; --rehearse runs this on a CPU")
    p = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": {
            "name": p.name,
            "capability": [p.major, p.minor],
            "sms": p.multi_processor_count,
            "memory": p.total_memory,
            "l2": p.L2_cache_size,
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        }
    }


def _smi(options: Options) -> dict[str, Any]:
    if options.rehearse:
        raise NotPossible("a rehearsal has no GPU")
    query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,mig.mode.current"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv"]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotPossible(f"nvidia-smi: {error}") from None
    return {"smi": said.strip().splitlines()}


# ---- build: the package that all later steps import


def libraries(options: Options) -> Iterator[Item]:
    yield Item("package", lambda: build.make_package(options.package))
    yield Item("CUDA", functools.partial(_cuda_libraries, options))
    yield Item("CPU", functools.partial(_cpu_libraries, options))


def _cuda_libraries(options: Options) -> dict[str, Any]:
    import torch

    into = options.package / "apet_kernels"
    if torch.version.hip:
        raise NotPossible("an AMD GPU: Triton alone")
    if options.carried:
        return {"built": vars(build.take(Path(options.carried), into))}
    major, minor = (9, 0) if options.rehearse else torch.cuda.get_device_capability()
    return {"built": vars(build.build(into, f"{major}{minor}-real", build.cores()))}


def _cpu_libraries(options: Options) -> dict[str, Any]:
    """Uses the checkout's CPU libraries if none were built or carried in this run."""
    into = options.package / "apet_kernels"
    if (into / build.CPU[0]).exists():
        return {"said": "with the CUDA kernels"}
    found = [ROOT / "apet_kernels" / name for name in build.CPU]
    if not all(path.exists() for path in found):
        raise NotPossible("no CPU kernels were built: CPU tensors get the float64 reference")
    for path in found:
        shutil.copy(path, into)
    return {"said": "those of the checkout"}
