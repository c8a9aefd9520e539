"""The fixture `backend` runs a test on every backend of this machine, and on every instruction set of the CPU kernel.

This file also sets the order of the tests: slowest first, or drawn by `--shuffle SEED`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace

import hypothesis
import pytest
import torch
import torch.utils._pytree as pytree

import apet_kernels
from apet_kernels import reference, testing
from apet_kernels.options import PAPER
from tests.simt import build as simt_build
from tests.simt import call as simt_call

# None, or the reason why Triton's interpreter is not reliable here; tests that need it are then skipped.
NO_INTERPRETER: str | None = None
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
    try:
        importlib.import_module("tests.triton_interpreter").install()
    except ImportError as error:
        NO_INTERPRETER = str(error)

# The environment variable with the name of an instruction set: the tests run as if this processor had neither it nor
# those after it. It is no option of pytest, since `backend_ids` is called before pytest parses its options. It has no
# effect on child processes of the tests.
WITHOUT = "APET_TESTS_WITHOUT"
ISAS = ("avx2", "avx512", "avx512_bf16", "amx", "amx_fp16")


def without(isa: str) -> None:
    """Hides an instruction set, and the later ones, which need it, in apet_kernels."""
    if isa not in ISAS:
        raise pytest.UsageError(f"{WITHOUT}={isa} is none of {', '.join(ISAS)}")
    host = apet_kernels.host._host
    if host is None:
        return
    left = [name for name in host.cpu_isa() if name not in ISAS[ISAS.index(isa) :]]

    def use(name: str | None) -> None:
        host.use_cpu_isa("unknown to this processor" if name in ISAS and name not in left else name or left[-1])

    others = {name: getattr(host, name) for name in dir(host) if not name.startswith("__")}
    apet_kernels.host._host = SimpleNamespace(**others | {"cpu_isa": lambda: list(left), "use_cpu_isa": use})
    use(None)


if os.environ.get(WITHOUT):
    without(os.environ[WITHOUT])

hypothesis.settings.register_profile("apet", deadline=None, derandomize=True, database=None, max_examples=25)
hypothesis.settings.load_profile("apet")


@dataclass(frozen=True)
class Backend:
    """The four functions of one backend, with its arguments filled in. Tests that name neither basis nor select get the
    paper's rule (PAPER), from `compress` as from `score`."""

    name: str
    compress: Callable
    compress_varlen: Callable
    score: Callable
    merge: Callable

    @property
    def interpreted(self) -> bool:
        """Whether this processor runs the kernels of a GPU, in about 10 ms per program or launch."""
        return interpreted(self.name)

    @classmethod
    def of(cls, name: str, compress: Callable, compress_varlen: Callable, score: Callable, merge: Callable) -> Backend:
        return cls(name, by_the_paper(compress, 3), by_the_paper(compress_varlen, 7), score, merge)

    def __repr__(self) -> str:
        return self.name


def by_the_paper(function: Callable, positional: int) -> Callable:
    """Returns the function with the options in PAPER as defaults. positional: how many arguments end with `basis`."""

    def run(*args, **kwargs):
        given = PAPER | kwargs
        if len(args) >= positional:
            del given["basis"]
        return function(*args, **given)

    return run


def interpreted(name: str) -> bool:
    """Kernels of a GPU, or of another processor that is emulated (tests/test_arm.py)."""
    return name == "cuda-simt" or name.startswith("arm-") or (name == "triton" and not torch.cuda.is_available())


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
        default=1,
        metavar="N",
        help="how many points of each test's parameter grid run on kernels that are interpreted; 0: all",
    )
    parser.addoption(
        "--points",
        type=int,
        default=2,
        metavar="N",
        help="how many points of each test's parameter grid, per backend, run without `-m rest`; 0: all",
    )
    parser.addoption(
        "--shape",
        type=lambda text: tuple(map(int, text.split(","))),
        action="append",
        metavar="B,N,D,KEEP,BASIS",
        help="shapes for test_ptx.py instead of its own; may be repeated",
    )
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run the tests in the order that this seed draws")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreter: runs kernels in Triton's interpreter")


# The files and tests that take longest. They run first: then the last tests are short, and all workers end at about the
# same time. Only the order of a run depends on this table.
FIRST = (
    "test_library_builds.py::test_every_way_of_building",  # it makes the builds that other tests of these files share
    "test_packaging_install.py",
    "test_gpu_quick.py",
    "test_threads.py",
    "test_tiles.py",
    "test_arm.py",
    "test_ptx.py",
    "test_sass.py",
    "explore/",
    "test_triton_launches.py",
    "test_reload.py",
    "test_cuda_simt_bugs.py",
    "test_triton_offline.py",
    "test_triton_invariance.py",
    "test_simt.py::test_sanitizers",
    "hooks/",
    "test_quality.py::test_the_whole_study",
    "test_packaging",
    "test_library_",
    "test_cli",
    "test_cuda_simt.py",
    "test_eval.py::test_processes_agree",
    "test_benchmarks.py",
)


def ordered(items: list[pytest.Item], seed: int | None) -> list[pytest.Item]:
    """Orders the tests by the table above, or at random by the seed. Every worker must get the same order."""
    if seed is not None:
        return random.Random(seed).sample(items, len(items))

    def place(item: pytest.Item) -> int:
        inside = item.nodeid.removeprefix("tests/")
        return next((n for n, start in enumerate(FIRST) if inside.startswith(start)), len(FIRST))

    return sorted(items, key=place)  # stable


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if item.get_closest_marker("rest_interpreted") and params.get("backend") == "triton" and interpreted("triton"):
            item.add_marker(pytest.mark.rest)
    cut_grids(config, items)
    mark_points(config.getoption("--points"), items)
    if NO_INTERPRETER is not None:
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if params.get("backend") == "triton" or item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason=NO_INTERPRETER))
    items[:] = ordered(items, config.getoption("--shuffle"))


def cut_grids(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Reduces the grids of tests whose GPU kernels this processor runs, in about 10 ms per program or launch.

    Whole grids run on a GPU, or with --interpret 0 (`make test-triton`).
    """
    points = config.getoption("--interpret")
    if not points:
        return
    cut: set[pytest.Item] = set()
    for (name, backend, _), grid in grids(items).items():
        if interpreted(backend):
            cut.update(set(grid) - spread(name, grid, points))
    config.hook.pytest_deselected(items=list(cut))
    items[:] = [item for item in items if item not in cut]


def mark_points(points: int, items: list[pytest.Item]) -> None:
    """Marks all but `points` points of a test's grid, per backend, with `rest`: `make test` runs some points of every
    test, and `make test-rest` the others.

    Slow tests of a backend or of a family of models have the same number of points; the others are marked `matrix`.
    """
    for (name, backend, slow), grid in grids(items).items():
        if points and (backend or not slow):
            for item in set(grid) - spread(name, grid, points):
                item.add_marker(pytest.mark.matrix if slow else pytest.mark.rest)


def grids(items: list[pytest.Item]) -> dict[tuple[str, str, bool], list[pytest.Item]]:
    """The tests by function, backend, and whether they are slow (slow ones are usually deselected); slow ones also by
    family of models, in the place of the backend."""
    found: dict[tuple[str, str, bool], list[pytest.Item]] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        backend, family = params.get("backend"), params.get("family")
        slow = item.get_closest_marker("slow") is not None
        group = str(getattr(family, "name", family)) if slow and family else ""
        key = (item.nodeid.partition("[")[0], backend if isinstance(backend, str) else group, slow)
        found.setdefault(key, []).append(item)
    return found


def spread(name: str, grid: list[pytest.Item], points: int) -> set[pytest.Item]:
    """Returns `points` points of a grid, both ends included. A single point is one of the ends, by a hash of `name`."""
    last = len(grid) - 1
    one = {last * (zlib.crc32(name.encode()) % 2)}
    return {grid[i] for i in (one if points == 1 else {i * last // (points - 1) for i in range(points)})}


@pytest.fixture(params=backend_ids())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, _, isa = request.param.partition("-")
    if request.param == "cuda-simt":
        functions = simt_call.Functions()  # so every test starts with the same schedules
        yield Backend.of(request.param, *(getattr(functions, f) for f in FUNCTIONS))
    elif name == "reference":
        yield Backend.of(name, *(getattr(reference, f) for f in FUNCTIONS))
    elif name == "cpu":
        testing.use_cpu_isa(isa)
        try:
            yield Backend.of(
                request.param, *(functools.partial(getattr(apet_kernels, f), backend=name) for f in FUNCTIONS)
            )
        finally:
            testing.use_cpu_isa(None)
    else:
        yield Backend.of(name, *(on_gpu(getattr(apet_kernels, f), name) for f in FUNCTIONS))


def on_gpu(function: Callable, backend: str) -> Callable:
    """`function` by a GPU backend for tensors on the CPU. If there is a GPU, inputs and results are copied."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(*args, **kwargs):
        args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: to_device(t, device), (args, kwargs))
        return pytree.tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args, **kwargs, backend=backend))

    return run


def to_device(t: torch.Tensor, device: str) -> torch.Tensor:
    """Copies t to the device, with its strides and, where possible, its offset from an aligned address."""
    if t.device.type == device:
        return t
    storage = torch.empty(0, dtype=t.dtype, device=device).set_(t.untyped_storage().to(device))
    return storage.as_strided(t.shape, t.stride(), t.storage_offset())


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sets one thread, since a second one makes tensors this small slower; test_invariance.py sets more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """Fills new tensors with NaN or the largest integer, so that an element that is not written is noticed."""
    torch.use_deterministic_algorithms(True)  # with torch.utils.deterministic.fill_uninitialized_memory, on by default
    yield
    torch.use_deterministic_algorithms(False)
