"""Models on several devices, on a machine that has none: tensors that say which device they are on.

Within `devices()` a new tensor is on the device that it is made for. An operation on tensors of two devices raises an
error, as torch does, and any other one is computed on the CPU. Parameters and buffers fit to every device, so modules
need not be moved: `place` gives a module the device that its inputs are moved to, as accelerate's hooks do.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

import apet_kernels

CPU, plain_tensor = torch.device("cpu"), torch.tensor
MIXES = ("aten::copy_", "aten::_to_copy")  # operations that read from another device
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_")  # these take indices that are on the CPU


class Placed(Tensor):
    """A tensor that says that it is on a device. `inner` has its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Placed:
        layout: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=device, **layout)
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.inner.tolist()

    def __repr__(self) -> str:
        return f"Placed({self.inner}, {self.device})"


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU, and places its results. Raises RuntimeError for tensors of two devices."""
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Placed)]
    name = func.name().partition(".")[0]
    larger = [t.device for t in given if t.dim() or t.device != CPU]  # a number on the CPU fits to every device
    if name in INDEXES:
        larger = [device for device in larger if device != CPU or args[0].device == CPU]
    if len({*larger}) > 1 and name not in MIXES:
        found = ", ".join(map(str, larger))
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {found}")
    wanted = kwargs.get("device")
    plain = any(isinstance(t, Tensor) and not isinstance(t, Placed) for t in tree_leaves((args, kwargs)))
    first = args[0] if args and isinstance(args[0], Placed) and name in MIXES else None
    device = torch.device(wanted) if wanted is not None else first.device if first is not None else None
    device = device or (larger or [None if plain and not given else CPU])[0]
    if wanted is not None:
        kwargs = kwargs | {"device": CPU}
    found = func(*bare(args), **bare(kwargs))
    if device is None:
        return found
    return tree_map(lambda t: Placed(t, device) if isinstance(t, Tensor) and not isinstance(t, Placed) else t, found)


def bare(value: Any) -> Any:
    """Returns the values of placed tensors."""
    return tree_map(lambda t: t.inner if isinstance(t, Placed) else t, value)


@contextmanager
def devices() -> Iterator[None]:
    """Places new tensors on the devices that they are made for, for the length of a with block."""
    with pytest.MonkeyPatch.context() as patch, Devices():
        patch.setattr(torch, "tensor", tensor)
        for name in ("compress", "compress_packed"):
            patch.setattr(apet_kernels, name, on_the_cpu(getattr(apet_kernels, name)))
        yield


class Devices(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def on_the_cpu(function: Any) -> Any:
    """Returns a function that computes with plain tensors, and returns its results on the device of its arguments."""

    @functools.wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Placed))
        with _disable_current_modes():
            found = function(*bare(args), **bare(kwargs))
        return tree_map(lambda t: Placed(t, device) if isinstance(t, Tensor) else t, found)

    return changed


def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
    """Replaces `torch.tensor`, which makes its tensors where no mode sees them."""
    if _get_current_dispatch_mode() is None:
        return plain_tensor(data, *args, device=device, **kwargs)
    with _disable_current_modes():
        return Placed(plain_tensor(bare(data), *args, **kwargs), torch.device(device or CPU))


def place(module: nn.Module, device: torch.device) -> None:
    """Gives a module a device: its inputs are moved there, and its outputs stay there."""
    forward = module.forward

    @functools.wraps(forward)
    def moved(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, (args, kwargs))
        return forward(*args, **kwargs)

    module.forward = moved
