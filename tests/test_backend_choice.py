"""`set_backend` and `use_backend`: which calls they apply to, and for how long."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest
import torch

import apet_kernels
from apet_kernels import available, choice, dispatch, ops
from tests.data import tokens
from tests.judge import assert_same

X = tokens(1, 20, 7, seed=1)
CALLS: dict[str, Callable[[], object]] = {
    "compress": lambda: apet_kernels.compress(X, 5, 3),
    "compress_varlen": lambda: apet_kernels.compress_varlen(X[0], *[torch.tensor([0, 20]).int()] * 2, 20, 20, 20, 3),
    "compress_packed": lambda: apet_kernels.compress_packed(X[0], [8, 12], [3, 4], 2),
    "score": lambda: apet_kernels.score(X, 3),
    "merge": lambda: apet_kernels.merge(X, torch.tensor([[1, 4]])),
}


@pytest.fixture(autouse=True)
def nothing_set() -> Iterator[None]:
    yield
    apet_kernels.set_backend(None)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the ops that the reference ran."""
    names: list[str] = []
    reference = dispatch.run_reference
    monkeypatch.setattr(dispatch, "run_reference", lambda op, *a, **k: names.append(op) or reference(op, *a, **k))
    return names


@pytest.mark.parametrize("name", CALLS)
def test_every_function_does_as_it_is_told(name, ran):
    op = "compress_varlen" if name == "compress_packed" else name
    CALLS[name]()
    assert ran == []
    with apet_kernels.use_backend("reference"):
        CALLS[name]()
    assert ran == [op]
    CALLS[name]()
    apet_kernels.set_backend("reference")
    CALLS[name]()
    assert ran == [op, op]


def test_the_call_goes_before_the_block_and_the_block_before_the_process(ran):
    apet_kernels.set_backend("reference")
    with apet_kernels.use_backend(None):
        apet_kernels.score(X, 3)
        assert ran == []
        with apet_kernels.use_backend("reference"):
            if "cpu" in apet_kernels.available_backends():
                apet_kernels.score(X, 3, backend="cpu")
                assert ran == []
            apet_kernels.score(X, 3)
            assert ran == ["score"]
        apet_kernels.score(X, 3)
        assert ran == ["score"]
    with pytest.raises(ZeroDivisionError), apet_kernels.use_backend(None):
        raise ZeroDivisionError
    apet_kernels.score(X, 3)
    assert ran == ["score", "score"]


def test_threads_and_tasks():
    """`use_backend` applies to one thread and one task, `set_backend` to the whole process."""
    seen: dict[str, object] = {}

    def other() -> None:
        seen["thread"] = dispatch.chosen_backend()

    def in_a_thread() -> object:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        return seen["thread"]

    with apet_kernels.use_backend("reference"):
        assert dispatch.chosen_backend() == "reference"
        assert in_a_thread() is None
    apet_kernels.set_backend("reference")
    assert in_a_thread() == "reference"
    apet_kernels.set_backend(None)

    async def task(name: str, backend: object, begin: asyncio.Event, end: asyncio.Event) -> None:
        with apet_kernels.use_backend(backend):
            end.set()
            await begin.wait()
            seen[name] = dispatch.chosen_backend()

    async def both() -> None:
        a, b = asyncio.Event(), asyncio.Event()
        await asyncio.gather(task("a", "reference", a, b), task("b", None, b, a))

    asyncio.run(both())
    assert (seen["a"], seen["b"]) == ("reference", None)
    assert dispatch.chosen_backend() is None


@pytest.mark.parametrize("choose", [apet_kernels.set_backend, lambda name: apet_kernels.use_backend(name).__enter__()])
def test_what_cannot_be_used(choose, monkeypatch):
    with pytest.raises(ValueError, match=r"^backend='abacus' is none of cpu, triton, cuda, reference$"):
        choose("abacus")
    monkeypatch.setattr(available, "why_missing", lambda name: "torch finds no GPU")
    with pytest.raises(ValueError, match=r"^backend='cuda' cannot run here: torch finds no GPU$"):
        choose("cuda")
    assert dispatch.chosen_backend() is None


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_choosing_starts_no_cuda(name, monkeypatch):
    """A parent may choose before it forks workers, which must be the first to start CUDA."""

    def fail(*_: object) -> None:
        raise AssertionError("CUDA was started")

    for function in ("is_available", "current_device", "init", "_lazy_init", "get_device_properties"):
        monkeypatch.setattr(torch.cuda, function, fail)
    monkeypatch.setattr(torch, "empty", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(available, "why_not_cuda_library", lambda: None)
    monkeypatch.setattr(available, "why_not_triton", lambda: None)
    with apet_kernels.use_backend(name):
        assert dispatch.chosen_backend() == name
    apet_kernels.set_backend(name)
    assert dispatch.chosen_backend() == name
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(available, "_interpreted", lambda: False)
    with pytest.raises(ValueError, match=f"backend='{name}' cannot run here: torch finds no GPU"):
        apet_kernels.set_backend(name)


def test_tensors_that_it_does_not_take(monkeypatch):
    monkeypatch.setattr(available, "why_missing", lambda name: None)
    apet_kernels.set_backend("cuda")
    for call in (lambda: apet_kernels.score(X, 3), lambda: apet_kernels.plan(X, 5, 3)):
        with pytest.raises(ValueError, match="backend='cuda' cannot run here: x is on cpu"):
            call()


@pytest.mark.parametrize("op", ops.OPS)
def test_ops_on_a_gpu_use_the_chosen_backend(op, monkeypatch):
    """The op itself uses the chosen backend for GPU tensors, also in compiled code, by torch's dispatcher."""
    ran = []
    monkeypatch.setattr(available, "why_missing", lambda name: None)
    monkeypatch.setattr(available, "_why_not_on", lambda name, device: None)
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(choice, "lower_estimate", lambda *of: ("cuda", ""))
    for name in ("triton", "cuda"):
        monkeypatch.setattr(dispatch, f"run_{name}", lambda op, *a, name=name, **k: ran.append((name, op)))
    dispatch._run_on_gpu(op, X)
    with apet_kernels.use_backend("triton"):
        dispatch._run_on_gpu(op, X)
    assert ran == [("cuda", op), ("triton", op)]


def test_plans():
    usual = apet_kernels.plan(X, 5, 3)
    with apet_kernels.use_backend("reference"):
        plan = apet_kernels.plan(X, 5, 3)
    assert (plan.backend, plan.launches) == ("reference", 0)
    assert plan.why == "chosen by use_backend or set_backend; the float64 reference"
    with apet_kernels.use_backend(usual.backend):
        assert apet_kernels.plan(X, 5, 3).details == usual.details
    assert apet_kernels.plan(X, 5, 3) == usual


def test_compiled_without_a_graph_break():
    compiled = torch.compile(lambda x: apet_kernels.compress(x, 6, 3)[0], fullgraph=True, backend="eager")
    with apet_kernels.use_backend("reference"):
        assert compiled(X).shape == (1, 6, 7)
    assert_same(compiled(X), apet_kernels.compress(X, 6, 3)[0])
