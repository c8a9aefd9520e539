"""The choice of kernels for GPU tensors, tested without a GPU."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import apet_kernels
from apet_kernels import available, choice, dispatch, ops

WITHOUT = "the CUDA kernels do not run on cuda:0: too old"
TRITON_WITHOUT = "Triton does not import"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Resets the choices that are made once per process, for the test and after it. GPUs are new ones."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    cached = [available.why_not_cuda, available.why_not_cuda_library, available.why_not_triton, dispatch._warn_once]
    cached += [choice.lower_estimate]
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Records the calls that reached kernels; the kernels do not run."""
    calls: list[tuple] = []

    def take(backend: str, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        calls.append((backend, args, kwargs))
        return torch.empty(0), torch.empty(0)

    for backend in ("cuda", "triton"):
        monkeypatch.setattr(dispatch, f"run_{backend}", functools.partial(take, backend))
    return calls


def test_every_op_comes_to_the_choice():
    for op in ops.OPS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"apet::{op}", "CUDA")


@pytest.mark.parametrize("op", ops.OPS)
def test_the_cuda_kernels_where_triton_does_not_import(monkeypatch, taken, op):
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(available, "why_not_triton", lambda: TRITON_WITHOUT)
    x = torch.zeros(1, 4, 2)
    dispatch._run_on_gpu(op, x, 2, start=0)
    assert taken == [("cuda", (op, x, 2), {"start": 0})]


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[tuple[float, float]]]:
    """Lets both backends run. Returns the estimates (CUDA, Triton) by D, for the test to fill."""
    by_width: dict[int, list[tuple[float, float]]] = {}
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(available, "why_not_triton", lambda: None)
    monkeypatch.setattr(choice, "estimates", lambda device, D, dtype: by_width[D])
    return by_width


@pytest.mark.parametrize(
    ("estimates", "backend"),
    [
        ([(30.0, 60.0), (200.0, 190.0)], "cuda"),
        ([(30.0, 33.0), (200.0, 100.0)], "triton"),
        ([(30.0, 30.0)], "cuda"),
    ],
)
def test_the_lower_estimate(compared, taken, estimates, backend):
    compared[8] = estimates
    dispatch._run_on_gpu("compress", torch.zeros(1, 4, 8), 2)
    assert [call[0] for call in taken] == [backend]


def test_every_call_with_such_tokens_takes_one_backend(compared, taken):
    """An image has the same bits alone, in a batch and packed, and `merge` those of `compress`: the choice depends on D
    and the dtype alone."""
    compared |= {8: [(30.0, 20.0)], 16: [(20.0, 30.0)]}
    cu = torch.tensor([0, 4, 400]).int()
    for D, backend in ((8, "triton"), (16, "cuda")):
        taken.clear()
        for B in (1, 64):
            for N in (4, 400):
                x = torch.zeros(B, N, D)
                dispatch._run_on_gpu("compress", x, 2, 3, layout="append")
                dispatch._run_on_gpu("score", x)
                dispatch._run_on_gpu("merge", x, torch.zeros(B, 2).long())
        dispatch._run_on_gpu("compress_varlen", torch.zeros(400, D), cu, cu, 4, 400, 4)
        assert {call[0] for call in taken} == {backend}
        assert len(taken) == 13


def test_estimates_are_made_once(compared, taken, monkeypatch):
    asked = []
    monkeypatch.setattr(choice, "estimates", lambda *of: asked.append(of) or [(1.0, 2.0)])
    for _ in range(3):
        for dtype in (torch.float16, torch.float32):
            dispatch._run_on_gpu("score", torch.zeros(1, 4, 8, dtype=dtype))
    cpu = torch.device("cpu")
    assert asked == [(cpu, 8, torch.float16), (cpu, 8, torch.float32)]


def test_triton_where_no_cuda_path_has_room(compared, taken, monkeypatch):
    def fail(*of: object) -> None:
        raise RuntimeError(f"path best {choice.NO_PATH} none")

    monkeypatch.setattr(choice, "estimates", fail)
    x = torch.zeros(1, 4, 8)
    dispatch._run_on_gpu("score", x)
    assert [call[0] for call in taken] == ["triton"]
    assert choice.gpu_backend(x)[1].endswith(f"do not run with D=8: path best {choice.NO_PATH} none")


def test_another_error_of_the_estimates_is_raised(compared, taken, monkeypatch):
    def fail(*of: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(choice, "estimates", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        dispatch._run_on_gpu("score", torch.zeros(1, 4, 8))
    assert taken == []


@pytest.mark.parametrize("x", [torch.zeros(()), torch.zeros(3), torch.zeros(1, 4, 0), torch.zeros(1, 4, 8).double()])
def test_wrong_tokens_come_to_the_check_of_the_op(compared, taken, x):
    dispatch._run_on_gpu("score", x)
    assert [call[0] for call in taken] == ["cuda"]


@pytest.mark.parametrize("op", ops.OPS)
def test_triton_where_the_cuda_kernels_do_not_run(monkeypatch, taken, op):
    monkeypatch.setattr(available, "why_not_cuda", lambda device: WITHOUT)
    monkeypatch.setattr(available, "why_not_triton", lambda: None)
    x = torch.zeros(1, 4, 2)
    dispatch._run_on_gpu(op, x, 2, start=0)
    assert taken == [("triton", (op, x, 2), {"start": 0})]


# ---- the conditions for the CUDA kernels


def cuda_device(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Simulates an installation with CUDA kernels, and records calls of its plan."""
    library = tmp_path / "libapet_cuda_torch.so"
    library.write_text("")
    seen = SimpleNamespace(loaded=[], planned=[], error=None)

    def plan(x: torch.Tensor, keep: int) -> None:
        seen.planned.append((tuple(x.shape), x.dtype))
        if seen.error:
            raise RuntimeError(seen.error)

    empty = torch.empty
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(available, "CUDA_LIBRARY", library)
    monkeypatch.setattr(torch.ops, "load_library", seen.loaded.append)
    monkeypatch.setattr(torch.ops.apet, "_cuda_plan", plan, raising=False)
    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **kw: empty(*shape, device="meta", **kw))
    return seen


def test_a_device_is_asked_once(cuda):
    for _ in range(3):
        assert available.why_not_cuda(cuda_device(0)) is None
        assert available.why_not_cuda(cuda_device(1)) is None
    assert cuda.loaded == [available.CUDA_LIBRARY]
    assert cuda.planned == [((1, 2, 1), dtype) for dtype in ops.DTYPES] * 2, "each dtype has its own kernels"


def test_a_device_that_fails(cuda):
    cuda.error = "a call of the CUDA runtime failed: no kernel image is available"
    for _ in range(2):
        assert available.why_not_cuda(cuda_device(1)) == f"the CUDA kernels do not run on cuda:1: {cuda.error}"
    assert len(cuda.planned) == 1


@pytest.mark.parametrize(
    "error",
    [
        "a call of the CUDA runtime failed: operation not permitted when stream is capturing",
        "a call of the CUDA runtime failed: operation failed due to a previous error during capture",
        "CUDA out of memory. Tried to allocate 2.00 MiB",
        "Cannot re-initialize CUDA in forked subprocess",
    ],
)
def test_an_error_that_may_be_gone_the_next_time(cuda, error, monkeypatch):
    """It is raised, and no answer for ever: a call would silently take the other backend, with other bits."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    cuda.error = error
    for _ in range(2):
        with pytest.raises(RuntimeError, match=f"^cuda:1 could not be asked .*: {error}$"):
            available.why_not_cuda(cuda_device(1))
    assert str(apet_kernels.why_unavailable("cuda")).endswith(error), "a query gives the reason"
    cuda.error = None
    assert available.why_not_cuda(cuda_device(1)) is None
    assert apet_kernels.why_unavailable("cuda") is None


def test_a_tensor_elsewhere(cuda):
    assert available.why_not_cuda(torch.device("cpu")) == "x is on cpu"
    assert not cuda.loaded


def test_a_torch_without_cuda(cuda, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert available.why_not_cuda(cuda_device()) == "this torch is built without CUDA"
    assert not cuda.loaded


def test_an_installation_without_the_kernels(cuda):
    available.CUDA_LIBRARY.unlink()
    assert "libapet_cuda_torch.so is not part of this installation; install nvcc" in available.why_not_cuda(
        cuda_device()
    )
    assert not cuda.loaded


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_library_that_does_not_load(cuda, monkeypatch, error):
    """RuntimeError: torch raises it where the library registers an op that it refuses."""

    def fail(path: Path) -> None:
        raise error("undefined symbol: aoti_torch_get_current_cuda_stream")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    why = available.why_not_cuda(cuda_device())
    assert "libapet_cuda_torch.so does not load (undefined symbol: aoti_torch_get_current_cuda_stream)" in why
    assert not cuda.planned


def test_backends_ask_the_current_device(cuda, monkeypatch):
    assert apet_kernels.why_unavailable("cuda") == "torch finds no GPU"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert apet_kernels.why_unavailable("cuda") == "torch finds no GPU that CUDA can use"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    assert apet_kernels.why_unavailable("cuda") is None
    available.why_not_cuda.cache_clear()
    cuda.error = "too old"
    assert apet_kernels.why_unavailable("cuda") == "the CUDA kernels do not run on cuda:2: too old"


# ---- backend="cuda"


@pytest.mark.parametrize("op", ops.OPS)
def test_forced(monkeypatch, taken, op):
    monkeypatch.setattr(available, "why_missing", lambda name: None)
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    x, lengths = torch.zeros(1, 4, 2), torch.tensor([0, 4], dtype=torch.int32)
    args = {
        "compress": (x, 2),
        "compress_varlen": (x[0], lengths, lengths, 4, 4, 4),
        "score": (x,),
        "merge": (x, torch.zeros(1, 2, dtype=torch.int64)),
    }[op]
    getattr(apet_kernels, op)(*args, backend="cuda")
    ((backend, (name, *given), _),) = taken
    assert (backend, name) == ("cuda", op)
    assert all(a is b for a, b in zip(given, args, strict=False))
    with pytest.raises(ValueError, match="requires grad"):
        getattr(apet_kernels, op)(args[0].clone().requires_grad_(), *args[1:], backend="cuda")
    assert len(taken) == 1


def test_forced_where_it_cannot_run(monkeypatch, taken):
    x = torch.zeros(1, 4, 2)
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: this torch is built without CUDA"):
        apet_kernels.compress(x, 2, backend="cuda")
    monkeypatch.setattr(available, "why_missing", lambda name: None)
    with pytest.raises(ValueError, match="backend='cuda' cannot run here: x is on cpu"):
        apet_kernels.compress(x, 2, backend="cuda")
    assert not taken


# ---- plans


class OnGpu:
    """A tensor that plan() treats like one on a GPU."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.device = x, cuda_device()

    def __getattr__(self, name: str):
        return getattr(self.x, name)


def test_plan_of_the_cuda_kernels(monkeypatch):
    figures = ("fused with 8 CTAs", "fused", 1, 8, 1, 72, 70, 0, 0, 4096, 27.5)
    asked = []
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(choice, "lower_estimate", lambda *of: ("cuda", "twice as fast"))
    monkeypatch.setattr(
        torch.ops.apet, "_cuda_plan", lambda *args, **kwargs: asked.append((args, kwargs)) or figures, raising=False
    )
    x = OnGpu(torch.empty(1, 576, 1024, device="meta"))
    assert apet_kernels.plan(x, 64, 10, layout="append", select="fps", ridge=0.5) == apet_kernels.Plan(
        backend="cuda",
        why="fused with 8 CTAs" + "; twice as fast" * (available.why_not_triton() is None),
        launches=1,
        workspace_bytes=4096,
        details={
            "path": "fused",
            "images_in_flight": 1,
            "ctas_per_image": 8,
            "rows_per_cta": 72,
            "rows_in_shared_memory": 70,
            "tile": 0,
            "tile_rows": 0,
            "estimated_us": 27.5,
        },
    )
    options = {"basis": 10, "layout": "append", "select": "fps", "start": -1, "ridge": 0.5, "blend": 1.0, "refine": 0}
    assert asked == [((x, 64), options)]


@pytest.mark.skipif(available.why_not_triton() is not None, reason="Triton is not installed")
def test_plan_of_triton_says_why_not_cuda(monkeypatch):
    from apet_kernels.triton_kernels import configs

    monkeypatch.setattr(available, "why_not_cuda", lambda device: WITHOUT)
    monkeypatch.setattr(configs, "device_class", lambda device: "sm_80")
    plan = apet_kernels.plan(OnGpu(torch.empty(1, 576, 1024, device="meta")), 64)
    assert plan.backend == "triton"
    assert WITHOUT in plan.why


# ---- without CUDA


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA")
def test_nothing_of_cuda_is_loaded_without_it():
    code = """
import torch, apet_kernels
apet_kernels.available_backends()
apet_kernels.compress(torch.randn(1, 8, 4), 4, 2)
assert "apet_cuda" not in open("/proc/self/maps").read()
assert not [s for s in torch._C._dispatch_get_all_op_names() if s.startswith("apet::_cuda")]
assert "apet_kernels.triton_kernels.launch" not in __import__("sys").modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- tensors without memory of their own


@pytest.mark.parametrize("backend", ["triton", "cuda", "reference"])
def test_fakes_have_the_shapes_of_results(monkeypatch, taken, backend):
    """Whatever backend is set: their address is 0."""
    monkeypatch.setattr(available, "check_usable", lambda name, device: None)
    with FakeTensorMode() as mode:
        x = mode.from_tensor(torch.zeros(2, 20, 8))
        kept, indices = apet_kernels.compress(x, 5, 3, backend=backend)
    assert (kept.shape, indices.shape) == ((2, 5, 8), (2, 5))
    assert not taken


def test_wrapped_tensors_raise_where_a_backend_is_asked_for(monkeypatch, taken):
    monkeypatch.setattr(available, "check_usable", lambda name, device: None)
    x = TwoTensor(torch.zeros(2, 20, 8), torch.zeros(2, 20, 8))
    with pytest.raises(ValueError, match="backend='triton' cannot take a TwoTensor"):
        apet_kernels.compress(x, 5, 3, backend="triton")
    assert not taken


def test_a_fake_mode_does_not_decide_whether_a_device_runs_the_kernels(monkeypatch):
    """A fake plan would raise, and the answer would be kept."""
    asked = []
    monkeypatch.setattr(available, "why_not_cuda_library", lambda: None)
    monkeypatch.setattr(available, "registered", SimpleNamespace(_cuda_plan=lambda x, keep: asked.append(type(x))))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, **more: empty(*sizes, **more))
    with FakeTensorMode():
        assert available.why_not_cuda(torch.device("cuda", 0)) is None
    assert asked == [torch.Tensor] * 3


def test_negative_views_are_resolved(monkeypatch):
    """Their memory has the other sign."""
    launch = pytest.importorskip("apet_kernels.triton_kernels.launch")
    seen = []

    def compress(x: Tensor, *args: object, weights: Tensor) -> SimpleNamespace:
        seen.extend([x, weights])
        return SimpleNamespace(run=lambda: [x, x])

    monkeypatch.setattr(launch, "compress", compress)
    z = torch.complex(torch.zeros(2, 20, 1), torch.ones(2, 20, 1))
    x, weights = torch.imag(z.conj()), torch.imag(torch.complex(torch.zeros(2, 20), torch.ones(2, 20)).conj())
    assert x.is_neg()
    assert weights.is_neg()
    dispatch.run_triton("compress", x, 5, 3, weights=weights)
    assert not any(t.is_neg() for t in seen)
    assert all((t == -1).all() for t in seen)
