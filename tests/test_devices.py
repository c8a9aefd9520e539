"""Devices without kernels use the CPU kernels on copies, with the bits of the CPU. They need not have float64."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import apet_kernels
from apet_kernels import available, dispatch
from tests.data import tokens
from tests.judge import assert_same
from tests.op_calls import CU, CU_KEEP, WRONG_CALLS, calls, error_of, flat

DEVICES = ("mps", "vulkan")  # for other devices torch would start their runtime, which is not installed
NAMES = list(calls())


class Elsewhere(torch.Tensor):
    """A tensor that claims to be on another device. `inner` holds its values, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Elsewhere:
        options = {"strides": inner.stride(), "dtype": inner.dtype, "device": device}
        tensor = torch.Tensor._make_wrapper_subclass(cls, inner.shape, **options)
        tensor.inner = inner
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} is not for the device that this test stands in for")


class WithoutFloat64(TorchDispatchMode):
    """Carries tensors to a device and back; like MPS, it has no float64."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = torch.device(device, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if kwargs.get("dtype") is torch.float64 and device is not None and torch.device(device) == self.device:
            raise TypeError(f"Cannot convert a tensor to float64 dtype as {self.device} does not support float64.")
        if func is torch.ops.aten._to_copy.default and isinstance(args[0], Elsewhere):
            return func(args[0].inner, **kwargs)
        if func is torch.ops.aten._to_copy.default and device is not None and torch.device(device) == self.device:
            return Elsewhere(args[0], self.device)
        return func(*args, **kwargs)


def there(device: str, value: object) -> object:
    return tree_map_only(Tensor, lambda t: Elsewhere(t, torch.device(device, 0)), value)


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Resets the warning, which is given once per process, for each of these tests."""
    dispatch._warn_once.cache_clear()
    yield
    dispatch._warn_once.cache_clear()


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with WithoutFloat64(request.param):
        yield request.param


@pytest.mark.parametrize("name", NAMES)
def test_the_bits_of_the_cpu(device, name):
    op, args, options = calls()[name]
    expected = flat(op(*args, **options))
    away, away_options = there(device, (args, options))
    with pytest.warns(UserWarning, match=f"apet ops on {device} tensors run on the CPU, on copies") as caught:
        got = flat(dispatch._run_on_cpu(op.__name__, *away, **away_options))
    assert len(caught) == 1
    for one, wanted in zip(got, expected, strict=True):
        assert one.device == torch.device(device, 0)
        assert_same(one.inner, wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch._run_on_cpu(op.__name__, *away, **away_options)


@pytest.mark.parametrize(("name", "args", "options", "words"), WRONG_CALLS, ids=[f"{r[0]}-{r[3]}" for r in WRONG_CALLS])
def test_rejected_as_on_the_cpu(name, args, options, words):
    said = error_of(getattr(torch.ops.apet, name), args, options)
    with WithoutFloat64("mps"), warnings.catch_warnings():
        warnings.simplefilter("error")
        args, options = there("mps", (args, options))
        assert error_of(dispatch._run_on_cpu, (name, *args), options) == said


def test_the_others_have_to_be_beside_x():
    with WithoutFloat64("mps"):
        x = there("mps", tokens(20, 7, seed=1))
        said = error_of(dispatch._run_on_cpu, ("compress_varlen", x, CU, CU_KEEP, 9, 11, 5), {})
    assert said == "cu_seqlens is on cpu, but x is on mps:0"


def test_the_warning_says_why(device):
    with pytest.warns(UserWarning, match=f"and wait for the device; there are no kernels for {device}"):
        dispatch._run_on_cpu("compress", there(device, tokens(1, 6, 4)), 3, 2)


def test_a_gpu_without_kernels(monkeypatch):
    """Such a GPU also uses the CPU kernels, with the reasons of both of its backends."""
    monkeypatch.setattr(available, "why_not_cuda", lambda device: "the CUDA kernels do not run here")
    monkeypatch.setattr(available, "why_not_triton", lambda: "Triton does not import")
    why = "the CUDA kernels do not run here; Triton does not import"
    assert available.why_no_kernels(torch.device("cuda", 0)) == why
    x = tokens(1, 6, 4)
    with WithoutFloat64("mps"), pytest.warns(UserWarning, match="on copies"):
        got = dispatch._run_on_gpu("compress", there("mps", x), 3, 2)
    for one, wanted in zip(got, torch.ops.apet.compress(x, 3, 2), strict=True):
        assert_same(one.inner, wanted)
    monkeypatch.setattr(available, "why_not_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert available.why_no_kernels(torch.device("cuda", 0)) is None


def test_gpus_older_than_the_kernels(monkeypatch):
    """Triton could compile for them, but not with these tiles; AMD's have other numbers."""
    monkeypatch.setattr(available, "why_not_triton", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda", 0)
    assert available.why_not_triton_on(device) == (
        "the Triton kernels run on GPUs of compute capability 8.0 or later, not 7.5"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert available.why_not_triton_on(device) is None


def test_the_reference_is_asked_for_where_there_is_no_float64():
    """backend="reference" runs on the device of x, or raises with the reason."""
    x = there("mps", tokens(1, 32, 16))
    with WithoutFloat64("mps"):
        said = error_of(apet_kernels.compress, (x, 8), {"backend": "reference"})
    assert said.startswith(
        "backend='reference' cannot run here: apet_kernels.reference needs float64, which mps:0 does not have"
    )
    assert "leave out backend=" in said


def test_no_float64_anywhere():
    """A dispatch mode replaces a device without float64."""

    class Nowhere(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if (kwargs or {}).get("dtype") is torch.float64:
                raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support it.")
            return func(*args, **(kwargs or {}))

    x = tokens(1, 32, 16)
    expected = apet_kernels.compress(x, 8)
    with Nowhere():
        assert "apet_kernels.reference needs float64" in error_of(
            apet_kernels.compress, (x, 8), {"backend": "reference"}
        )
        if available.why_not_cpu() is None:
            for got, wanted in zip(apet_kernels.compress(x, 8), expected, strict=True):
                assert_same(got, wanted)


@pytest.mark.parametrize("kind", DEVICES)
def test_plan(kind):
    x = there(kind, tokens(1, 64, 32))
    plan = apet_kernels.plan(x, 8)
    if available.why_not_cpu() is None:
        assert plan.backend == "cpu"
        assert plan.why.startswith(
            f"x is copied to the CPU (there are no kernels for {kind}), whose best instruction set"
        )
    else:
        assert plan.backend == "reference"


@pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices written in Python",
)
def test_a_device_of_its_own():
    """A device registered with torch's dispatcher: from the op to this fallback and back."""
    code = """
import warnings
import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("toy")

class Toy(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        tensor = torch._C._acc.create_empty_tensor(inner.shape, inner.dtype)
        tensor.__class__ = Toy
        return tensor
    def __init__(self, inner):
        self.inner = inner

library = torch.library.Library("aten", "IMPL")

def empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    if dtype is torch.float64:
        raise RuntimeError("Required aspect fp64 is not supported on the device")
    return Toy(torch.empty_strided(size, stride, dtype=dtype))

def empty(size, *, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return empty_strided(size, torch.empty(size, device="meta").stride(), dtype=dtype)

def copy_from(source, target, non_blocking=False):
    (target.inner if isinstance(target, Toy) else target).copy_(source.inner if isinstance(source, Toy) else source)
    return target

library.impl("empty_strided", empty_strided, "PrivateUse1")
library.impl("empty.memory_format", empty, "PrivateUse1")
library.impl("_copy_from", copy_from, "PrivateUse1")

import apet_kernels
x = torch.randn(2, 20, 7)
away = Toy(x)
assert away.device.type == "toy"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    tokens, indices = torch.ops.apet.compress(away, 6, 3)
    apet_kernels.score(away, 3)
assert len([w for w in caught if "apet ops on toy tensors run on the CPU" in str(w.message)]) == 1
expected = torch.ops.apet.compress(x, 6, 3)
assert tokens.device.type == indices.device.type == "toy"
assert tokens.cpu().equal(expected[0]) and indices.cpu().equal(expected[1])
try:
    apet_kernels.compress(away, 6, 3, backend="reference")
except ValueError as error:
    assert "float64, which toy:0 does not have" in str(error), error
else:
    raise AssertionError("the reference ran without float64")
try:
    torch.ops.apet.compress(away, 60, 3)
except RuntimeError as error:
    assert "keep=60 is outside 1..20" in str(error), error
else:
    raise AssertionError("keep=60 was taken")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
