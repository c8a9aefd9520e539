"""The implementations of the ops, and the choice among them for each device.

    CPU         the compiled library, which registers its own implementations (csrc/torch_binding.cpp)
    CUDA, ROCm  the CUDA or the Triton kernels (choice.py)
    others      the CPU kernels on copies; the same for a GPU that runs neither CUDA nor Triton kernels

Without the compiled library, the float64 reference computes CPU tensors. Each of these two fallbacks warns once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from . import available, choice, ops, reference
from .options import Backend
from .registry import registered

# ---- implementations


def run_triton(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the op by the Triton kernels, for x on a GPU, or on the CPU under Triton's interpreter."""
    from .triton_kernels import launch

    ops.check_in_op(op, x, *args, **kwargs)
    # A view that negates (torch.imag of a conjugate) has the sign outside of its memory.
    x, args, kwargs = tree_map_only(Tensor, Tensor.resolve_neg, (x, args, kwargs))
    with torch.cuda.device_of(x):
        results = getattr(launch, op)(x, *args, **kwargs).run()
    return results if len(results) > 1 else results[0]


def run_cuda(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the op by the CUDA kernels, which check their arguments, for x on a GPU that runs them."""
    return getattr(registered, f"_cuda_{op}").default(x, *args, **kwargs)


def run_reference(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the op by the reference, for x on a device that has float64."""
    ops.check_in_op(op, x, *args, **kwargs)
    return getattr(reference, op)(x, *args, **kwargs)


def _run_on_gpu(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the op for a CUDA or ROCm tensor."""
    if (backend := chosen_backend()) is not None:
        return forced(op, backend, x)(x, *args, **kwargs)
    name, _ = choice.gpu_backend(x)
    if name == "cpu":
        return _run_on_cpu(op, x, *args, **kwargs)
    return (run_cuda if name == "cuda" else run_triton)(op, x, *args, **kwargs)


def _run_on_cpu(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Runs the op for a tensor on a device without kernels: by the CPU kernels on a copy. The results are copied back.

    This needs neither float64 nor a compiler on x's device, and gives the same bits as for x on the CPU.
    """
    ops.check_in_op(op, x, *args, **kwargs)
    _warn_once(x.device.type, available.why_no_kernels(x.device))
    if x.device.type == "cpu":
        return getattr(reference, op)(x, *args, **kwargs)
    x_cpu, args, kwargs = tree_map_only(Tensor, Tensor.cpu, (x, args, kwargs))
    results = getattr(registered, op)(x_cpu, *args, **kwargs)
    return tree_map_only(Tensor, lambda t: t.to(x.device), results)


@functools.cache
def _warn_once(device: str, why: str | None) -> None:
    if device == "cpu":
        text = f"apet ops on cpu tensors run the float64 reference, orders of magnitude slower than a kernel; {why}"
    else:
        text = f"apet ops on {device} tensors run on the CPU, on copies, and wait for the device; {why}"
    warnings.warn(text, stacklevel=4)


for _op in ops.OPS:
    ops.REGISTRY.implement(_op, "CUDA", functools.partial(_run_on_gpu, _op))
    ops.REGISTRY.implement(_op, "CompositeExplicitAutograd", functools.partial(_run_on_cpu, _op))
available.why_not_cpu()  # loads the library, which registers its ops


# ---- the backend that a caller sets: for a call, for a block, or for the process

# Kept with the ops, which one copy of this package implements for all: what another one sets must reach them.
_SET: Any = vars(ops.REGISTRY).setdefault("set_backend", {"process": None})
# A tuple, because a block may also set None, the dispatcher's choice.
_for_block: contextvars.ContextVar[tuple[Backend | None] | None] = _SET.setdefault(
    "block", contextvars.ContextVar("apet_backend", default=None)
)


def set_backend(name: Backend | None) -> None:
    """Sets the backend of every later call without a `backend` argument, in all threads of this process.

    These calls behave as with `backend=name`: they raise ValueError for a tensor that the backend cannot take. This
    includes the functions of `apet_kernels`, the hooks and plugins that use them, and, for tensors on a GPU,
    `torch.ops.apet.*`, also in compiled code. Code that torch.compile makes for tensors on the CPU always runs the CPU
    kernel.

    Args:
        name: "cpu", "triton", "cuda" or "reference"; None: the dispatcher chooses again.

    It does not start CUDA, so it may be called before a fork.

    Raises:
        ValueError: if there is no such backend, it is not installed, or there is no GPU; the message says why.

    Example:
        >>> apet_kernels.set_backend("reference")
        >>> apet_kernels.set_backend(None)
    """
    _check_name(name)
    _SET["process"] = name


@contextlib.contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """`set_backend` for a `with` block, in this thread or asyncio task only; blocks may be nested.

    Args:
        name: as in `set_backend`. None: the dispatcher chooses, even after `set_backend`.

    Raises:
        ValueError: as `set_backend` does.

    Example:
        >>> import torch
        >>> with apet_kernels.use_backend("reference"):
        ...     tokens, indices = apet_kernels.compress(torch.randn(1, 20, 8), keep=4, basis=3)
    """
    _check_name(name)
    token = _for_block.set((name,))
    try:
        yield
    finally:
        _for_block.reset(token)


def chosen_backend() -> Backend | None:
    """Returns the backend of `use_backend` or, outside of one, of `set_backend`; None: the dispatcher chooses."""
    block = _for_block.get()
    return cast("Backend | None", _SET["process"]) if block is None else block[0]


def _check_name(name: Backend | None) -> None:
    # Only what is known without starting CUDA: a parent may set a backend for the workers that it forks. Every call
    # asks the rest (available.check_usable).
    if name is not None and (why := available.why_missing(name)):
        raise ValueError(f"backend='{name}' cannot run here: {why}")


def forced(op: str, backend: Backend, x: Tensor) -> Callable[..., Any]:
    """Returns the op by one backend. Like the op, the returned function raises RuntimeError for wrong arguments.

    Raises:
        ValueError: if the backend cannot run here, or not on x's device.
    """
    available.check_usable(backend, x.device)
    if backend == "cpu" or is_fake(x):  # a fake has no data that a backend could read, only the op's fake results
        return getattr(registered, op)  # type: ignore[no-any-return]
    if is_traceable_wrapper_subclass(x):
        raise ValueError(f"backend='{backend}' cannot take a {type(x).__name__}: give its local tensors, or no backend")
    run = {"triton": run_triton, "cuda": run_cuda, "reference": run_reference}[backend]

    def without_grad(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        ops.check_grad(*(a for a in (x, *args, *kwargs.values()) if isinstance(a, Tensor)))
        return run(op, x, *args, **kwargs)

    return without_grad
