"""`backend`: one test body, every backend that this machine can run, the CPU kernel once per instruction set."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hypothesis
import pytest
import torch

import apet_kernels
from apet_kernels import reference

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

    def __repr__(self) -> str:
        return self.name


FUNCTIONS = ("compress", "compress_varlen", "score", "merge")


def backend_ids() -> list[str]:
    """The reference, and the CPU kernel on every instruction set of this machine, if it is built."""
    cpu = apet_kernels.cpu_isa() if apet_kernels.backends()["cpu"] is None else []
    return ["reference", *(f"cpu-{isa}" for isa in cpu)]


@pytest.fixture(params=backend_ids())
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    name, _, isa = request.param.partition("-")
    if name == "reference":
        yield Backend(request.param, *(getattr(reference, f) for f in FUNCTIONS))
        return
    apet_kernels.use_cpu_isa(isa)
    try:
        yield Backend(request.param, *(functools.partial(getattr(apet_kernels, f), backend=name) for f in FUNCTIONS))
    finally:
        apet_kernels.use_cpu_isa(None)


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
