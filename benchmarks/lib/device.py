"""The devices that a benchmark runs on, and their clocks: a CPU, a GPU (CUDA or ROCm), or a CPU that interprets
kernels."""

from __future__ import annotations

import abc
import gc
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import apet_kernels
from benchmarks.lib import machine

NO_GPU = "torch finds no GPU here, and this measures one: run it on a machine with a CUDA or ROCm GPU"
NO_INTERPRETER = (
    "without a GPU --smoke needs TRITON_INTERPRET=1 in the environment: Triton's interpreter runs its kernels"
)
# Bytes of the cache that the dies of gfx942 and gfx950 share; the device properties contain only the L2 of one die.
INFINITY_CACHE = 256 * 2**20


class Device(abc.ABC):
    """The operations that differ between devices."""

    type: str  # as torch calls it: "cuda" (ROCm too) or "cpu"
    name: str
    cache_bytes: int  # of the last cache before memory
    memory_bytes: int

    @abc.abstractmethod
    def seconds(self, call: Callable[[], object]) -> float:
        """Returns the seconds of `call`, until all work that it started has ended."""

    @abc.abstractmethod
    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Returns `call` with its launches replayed from a graph; it returns the tensors that they write.

        A replay reads the same addresses again, so inputs must be changed in place.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, str]:
        """Returns a description for the head of a table."""

    def release(self) -> None:
        """Frees the memory that a case has held."""
        gc.collect()

    def close(self) -> None:
        """Releases the device after the last case."""
        self.release()


class Cpu(Device):
    type = "cpu"
    name = "CPU"

    def __init__(self) -> None:
        self.cache_bytes, self.memory_bytes = machine.last_level_cache(), machine.available_memory()

    def seconds(self, call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """Returns `call` itself, called once: a CPU has no graphs."""
        call()
        return call

    def describe(self) -> dict[str, str]:
        return {}


class Gpu(Device):
    type = "cuda"

    def __init__(self) -> None:
        from apet_kernels.triton_kernels import configs

        current = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(current)
        self.name = properties.name
        self.cache_bytes = INFINITY_CACHE if torch.version.hip else properties.L2_cache_size
        self.memory_bytes = properties.total_memory
        self._class = configs.device_class(current)
        self._processors = properties.multi_processor_count

    def seconds(self, call: Callable[[], object]) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graphed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        side = torch.cuda.Stream()  # a first call may allocate, compile or load, which a capture does not allow
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def describe(self) -> dict[str, str]:
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        import triton

        return {
            "device": f"{self.name} ({self._class}), {self._processors} processors, "
            f"{self.memory_bytes / 2**30:.0f} GiB, L2 {self.cache_bytes / 2**20:.0f} MiB",
            "driver": f"{_driver()}, {runtime}",
            "triton": triton.__version__,
        }

    def release(self) -> None:
        super().release()
        torch.cuda.empty_cache()


class DryRun(Cpu):
    name = "dry run on a CPU"

    def __init__(self) -> None:
        self.cache_bytes, self.memory_bytes = 0, 2**30

    def describe(self) -> dict[str, str]:
        return {"device": "none: a DRY RUN on a CPU with Triton's interpreter; no figure means anything"}


def cpu(smoke: bool = False) -> Device:
    """Returns the CPU. Raises RuntimeError if there is no CPU kernel."""
    reason = apet_kernels.why_unavailable("cpu")
    if reason is not None:
        raise RuntimeError(f"there is no CPU kernel to measure: {reason}")
    return Cpu()


def gpu(smoke: bool = False) -> Device:
    """Returns the GPU; with --smoke and without a GPU a dry run. Raises RuntimeError if neither is possible."""
    if torch.cuda.is_available():
        return Gpu()
    if not smoke:
        raise RuntimeError(NO_GPU)
    if "triton" not in apet_kernels.available_backends():
        raise RuntimeError(NO_INTERPRETER)
    return DryRun()


def _driver() -> str:
    """Returns the version of the NVIDIA or AMD kernel driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        version = Path("/sys/module/amdgpu/version")
        return version.read_text().strip() if version.exists() else "of unknown version"
