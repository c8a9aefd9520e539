"""`backend`: one test body, every backend that this machine can run, the CPU kernel once per instruction set."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch
import torch.utils._pytree as pytree
from simt import build as simt_build
from simt import call as simt_call

import apet_kernels
from apet_kernels import reference, testing

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    importlib.import_module("triton_interpreter").install()

hypothesis.settings.register_profile("apet", deadline=None, derandomize=True, database=None, max_examples=40)
hypothesis.settings.load_profile("apet")


@dataclass(frozen=True)
class Backend:
    """The four functions of one backend, with its arguments filled in."""

    name: str
    compress: Callable
    compress_varlen: Callable
    score: Callable
    merge: Callable

    @property
    def interpreted(self) -> bool:
        """Kernels of a GPU run by this processor, in 10 ms or so a program or a launch."""
        return interpreted(self.name)

    def __repr__(self) -> str:
        return self.name


def interpreted(name: str) -> bool:
    return name == "cuda-simt" or (name == "triton" and not torch.cuda.is_available())


FUNCTIONS = ("compress", "compress_varlen", "score", "merge")


def backend_ids() -> list[str]:
    """The reference, the CPU kernel on every instruction set of this machine, Triton (on a GPU, or interpreted), CUDA
    (on a GPU), and the CUDA sources compiled for the CPU (tests/simt)."""
    usable = apet_kernels.available_backends()
    cpu = testing.cpu_isa() if "cpu" in usable else []
    gpu = [name for name in usable if name in ("triton", "cuda")]
    simt = [] if simt_build.missing() else ["cuda-simt"]
    return ["reference", *(f"cpu-{isa}" for isa in cpu), *gpu, *simt]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interpret",
        type=int,
        default=2,
        metavar="N",
        help="how many points of each test's parameter grid run on kernels that are interpreted; 0: all",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Cuts the grids of kernels of a GPU that this processor runs, at 10 ms or so for each program or launch.

    What is left is spread evenly over the grid, both ends included; the compiled backends run all of it, and so does
    Triton on a GPU, or with --interpret 0 (`make test-triton`).
    """
    points = config.getoption("--interpret")
    if not points:
        return
    grids: dict[tuple[str, str], list[pytest.Item]] = {}
    for item in items:
        backend = item.callspec.params.get("backend") if getattr(item, "callspec", None) else None
        if isinstance(backend, str) and interpreted(backend):
            grids.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    cut: set[pytest.Item] = set()
    for grid in grids.values():
        last, steps = len(grid) - 1, max(points - 1, 1)
        cut.update(set(grid) - {grid[i * last // steps] for i in range(min(points, len(grid)))})
    config.hook.pytest_deselected(items=list(cut))
    items[:] = [item for item in items if item not in cut]


@pytest.fixture(params=backend_ids())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, _, isa = request.param.partition("-")
    if request.param == "cuda-simt":
        functions = simt_call.Functions()  # which starts every test with the same schedules
        yield Backend(request.param, *(getattr(functions, f) for f in FUNCTIONS))
    elif name == "reference":
        yield Backend(name, *(getattr(reference, f) for f in FUNCTIONS))
    elif name == "cpu":
        testing.use_cpu_isa(isa)
        try:
            yield Backend(
                request.param, *(functools.partial(getattr(apet_kernels, f), backend=name) for f in FUNCTIONS)
            )
        finally:
            testing.use_cpu_isa(None)
    else:
        yield Backend(name, *(on_gpu(getattr(apet_kernels, f), name) for f in FUNCTIONS))


def on_gpu(function: Callable, backend: str) -> Callable:
    """`function` by one of the GPU backends for tensors on the CPU, which are carried over and back if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(*args, **kwargs):
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, device), (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args, **kwargs, backend=backend))

    return run


def to_device(t: torch.Tensor, device: str) -> torch.Tensor:
    """t on the device in the same form: its strides and, where they can be kept, its offset from an aligned address."""
    if t.device.type == device:
        return t
    storage = torch.empty(0, dtype=t.dtype, device=device).set_(t.untyped_storage().to(device))
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On tensors this small a second thread costs more than it gives; test_invariance.py asks for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fresh tensors hold NaN or the largest integer, so that an element that nobody writes is seen."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    yield
    torch.use_deterministic_algorithms(False)
