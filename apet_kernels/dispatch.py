"""Which kernels a call gets: loading of the compiled libraries, what is usable here, and the choice for each device.

    CPU         the compiled library, which registers its own implementations (csrc/torch_binding.cpp)
    CUDA, ROCm  the CUDA kernels where they run, else the Triton kernels; decided on the first call on a device
    others      the CPU kernels on copies; so does a GPU that neither of its kernels runs on

Without the compiled library, CPU tensors get the float64 reference. Both of these last resorts warn once.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from . import ops, reference
from .options import BACKENDS, Backend, Options
from .registry import has_kernel, registered

# The binding of the compiled library; absent from a pure wheel (APET_BUILD=pure).
LIBRARY = Path(__file__).with_name("libapet_torch.so")
# The binding of the CUDA kernels; absent where there was no nvcc, or a torch without CUDA, when they were built.
CUDA_LIBRARY = Path(__file__).with_name("libapet_cuda_torch.so")
HOW_TO_GET_KERNELS = (
    "install torch >= 2.10 and a C++ compiler, then apet-kernels again from its source: "
    "`pip install --force-reinstall --no-deps .`, or with uv "
    "`uv pip install --reinstall --no-deps --no-build-isolation .`"
)
HOW_TO_GET_CUDA = (
    "install nvcc 12 or later, then apet-kernels again from its source: "
    "`APET_CUDA_ARCHS=default pip install --force-reinstall --no-deps .`"
)


DEFAULT = Options()


# ---- what is usable here: None, or the reason why it is not


def _load(library: Path, op: str, key: str, how: str) -> str | None:
    """Loads a compiled library, unless another copy of this package has loaded its own; None, or why it is unusable."""
    if has_kernel(op, key):
        return None
    if not library.exists():
        return f"{library.name} is not part of this installation; {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load ({error}); {how}"
    return None


def why_not_cpu() -> str | None:
    """None where the CPU kernels are part of this installation and, from then on, loaded; else why they are not."""
    return _load(LIBRARY, "compress", "CPU", HOW_TO_GET_KERNELS)


@functools.cache
def why_not_triton() -> str | None:
    """None where Triton can be imported, else why it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); `pip install apet-kernels[triton]`"
    return None


def _interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors, by its interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def why_not_cuda_library() -> str | None:
    """None where the CUDA kernels are part of this installation and, from then on, loaded; else why they are not."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return _load(CUDA_LIBRARY, "_cuda_compress", "CUDA", HOW_TO_GET_CUDA)


@functools.cache
def why_not_cuda(device: torch.device) -> str | None:
    """None where the CUDA kernels run on this device, else why not."""
    if device.type != "cuda":
        return f"x is on {device}"
    if why := why_not_cuda_library():
        return why
    x = torch.empty(1, 2, 1, device=device)
    try:
        registered._cuda_plan(x, 1)
    except RuntimeError as error:
        return f"the CUDA kernels do not run on {device}: {error}"
    return None


def why_no_kernels(device: torch.device, options: Options = DEFAULT) -> str | None:
    """None where one of the backends has kernels for tensors on this device and these options, else why none has."""
    if device.type == "cpu":
        return why_not_cpu()
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    why_cuda = why_not_cuda(device) or why_not_with("cuda", options)
    why_triton = why_not_triton() or why_not_with("triton", options)
    return None if why_cuda is None or why_triton is None else f"{why_cuda}; {why_triton}"


def why_unavailable(name: Backend) -> str | None:
    """Why a backend cannot be used here.

    Args:
        name: "cpu", "triton", "cuda" or "reference".

    Returns:
        None where the backend can be used, else the reason, with what to install where that would help.

    Raises:
        ValueError: if there is no backend of this name.

    Example:
        >>> apet_kernels.why_unavailable("reference") is None
        True
    """
    if name == "cpu":
        return why_not_cpu()
    if name == "triton":
        if why := why_not_triton():
            return why
        if torch.cuda.is_available() or _interpreted():
            return None
        return "torch finds no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"
    if name == "cuda":
        if why := why_not_cuda_library():
            return why
        if not torch.cuda.is_available():
            return "torch finds no GPU"
        return why_not_cuda(torch.device("cuda", torch.cuda.current_device()))
    if name == "reference":
        return None
    raise ValueError(f"backend='{name}' is none of {', '.join(BACKENDS)}")


def available_backends() -> tuple[Backend, ...]:
    """The backends that can be used here, of "cpu", "triton", "cuda" and "reference", in this order.

    Example:
        >>> "reference" in apet_kernels.available_backends()
        True
    """
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


# The backends whose kernels neither pick a basis in rounds nor have medoid steps.
WITHOUT_ROUNDS: tuple[Backend, ...] = ("cuda",)


def why_not_with(backend: Backend, options: Options) -> str | None:
    """None where a backend has all that the options ask for, else what it lacks."""
    if backend not in WITHOUT_ROUNDS or not (options.in_rounds or options.refine):
        return None
    asked = f"basis={options.basis}" if options.in_rounds else f"refine={options.refine}"
    lacks = "picks no basis in rounds" if options.in_rounds else "has no medoid steps"
    return f"the {backend} backend {lacks} yet ({asked}); the backends cpu, triton and reference do"


def _options(op: str, *args: Any, **kwargs: Any) -> Options:
    """The options of a call, given the arguments after x."""
    place = {"compress": 1, "compress_varlen": 5, "score": 0}.get(op)
    if place is None:
        return Options()
    return Options(args[place] if len(args) > place else kwargs.get("basis", 10), refine=kwargs.get("refine", 0))


# ---- implementations


def run_triton(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op by the Triton kernels, for x on a GPU, or on the CPU under Triton's interpreter."""
    from .triton_kernels import launch

    ops.check_in_op(op, x, *args, **kwargs)
    with torch.cuda.device_of(x):
        results = getattr(launch, op)(x, *args, **kwargs).run()
    return results if len(results) > 1 else results[0]


def run_cuda(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op by the CUDA kernels, which check their arguments, for x on a device for which `why_not_cuda` is None."""
    return getattr(registered, f"_cuda_{op}").default(x, *args, **kwargs)


def run_reference(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op by the reference, for x on a device that has float64."""
    ops.check_in_op(op, x, *args, **kwargs)
    return getattr(reference, op)(x, *args, **kwargs)


def _run_on_gpu(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op for a CUDA or ROCm tensor."""
    if (backend := chosen_backend()) is not None:
        return forced(op, backend, x)(x, *args, **kwargs)
    options = _options(op, *args, **kwargs)
    if (why_not_cuda(x.device) or why_not_with("cuda", options)) is None:
        return run_cuda(op, x, *args, **kwargs)
    if (why_not_triton() or why_not_with("triton", options)) is None:
        return run_triton(op, x, *args, **kwargs)
    return _run_on_cpu(op, x, *args, **kwargs)


def _run_on_cpu(op: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op for a tensor that no kernel takes where it is: by the CPU kernels on a copy, and the results copied back.

    So it needs neither float64 nor a compiler on x's device, and gives the same bits as for x on the CPU.
    """
    ops.check_in_op(op, x, *args, **kwargs)
    _warn_once(x.device.type, why_no_kernels(x.device, _options(op, *args, **kwargs)))
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
why_not_cpu()  # loads the library: its ops are there from now on


# ---- a backend that the caller names: in the call, for a block, or for the process

_for_process: Backend | None = None
# A tuple, so that a block can also choose None: what the dispatcher chooses.
_for_block: contextvars.ContextVar[tuple[Backend | None] | None] = contextvars.ContextVar("apet_backend", default=None)


def set_backend(name: Backend | None) -> None:
    """Sets the backend of every later call in this process, in all of its threads, that names none itself.

    It is as if these calls said `backend=name`: they raise ValueError for a tensor that the backend does not take.
    That holds for the functions of `apet_kernels`, for hooks and plugins built on them, and, with tensors on a GPU, for
    `torch.ops.apet.*` itself, also in compiled code. Code that torch.compile makes for tensors on the CPU calls the op,
    whose CPU kernel runs whatever is set.

    Args:
        name: "cpu", "triton", "cuda" or "reference"; None: the dispatcher chooses again.

    Raises:
        ValueError: if there is no such backend, or it cannot be used here; the message says why.

    Example:
        >>> apet_kernels.set_backend("reference")
        >>> apet_kernels.set_backend(None)
    """
    global _for_process
    _check_name(name)
    _for_process = name


@contextlib.contextmanager
def use_backend(name: Backend | None) -> Iterator[None]:
    """`set_backend` for the calls in a `with` block, of this thread or asyncio task alone; blocks may be nested.

    Args:
        name: as in `set_backend`. None: the dispatcher chooses, whatever `set_backend` says.

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
    """The backend of `use_backend` or, outside of such a block, of `set_backend`; None: the dispatcher chooses."""
    block = _for_block.get()
    return _for_process if block is None else block[0]


def _check_name(name: Backend | None) -> None:
    if name is not None and (why := why_unavailable(name)):
        raise ValueError(f"backend='{name}' cannot run here: {why}")


def check_usable(backend: Backend, device: torch.device) -> None:
    """Raises ValueError if the backend cannot run here, or takes no tensors on this device."""
    if why := why_unavailable(backend) or _why_not_on(backend, device):
        raise ValueError(f"backend='{backend}' cannot run here: {why}")


def forced(op: str, backend: Backend, x: Tensor) -> Callable[..., Any]:
    """The op by one backend; like the op, it raises RuntimeError for wrong arguments.

    Raises:
        ValueError: if the backend cannot run here, or not on x's device; its result also for options that it lacks.
    """
    check_usable(backend, x.device)
    if backend == "cpu":
        return getattr(registered, op)  # type: ignore[no-any-return]
    run = {"triton": run_triton, "cuda": run_cuda, "reference": run_reference}[backend]

    def without_grad(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        ops.check_grad(*(a for a in (x, *args, *kwargs.values()) if isinstance(a, Tensor)))
        if why := why_not_with(backend, _options(op, *args, **kwargs)):
            raise ValueError(f"backend='{backend}' cannot run this: {why}")
        return run(op, x, *args, **kwargs)

    return without_grad


def _why_not_on(backend: Backend, device: torch.device) -> str | None:
    """None where a usable backend takes tensors on this device, else why not."""
    if backend == "cuda":
        return why_not_cuda(device)
    if backend == "cpu" and device.type != "cpu":
        return f"x is on {device}"
    if backend == "triton" and device.type != "cuda" and not (device.type == "cpu" and _interpreted()):
        return f"x is on {device}"
    if backend == "reference":
        try:
            torch.zeros(1, dtype=torch.float64, device=device)
        except (TypeError, RuntimeError) as error:  # MPS raises the first, XPU the second
            return f"apet_kernels.reference needs float64, which {device} does not have ({error}); leave out backend="
    return None
