"""Tells which backends are usable here, and why the others are not. Loads the compiled libraries."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from .ops import DTYPES
from .options import BACKENDS, Backend
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
OLDEST_CAPABILITY = 8  # of NVIDIA GPUs, for both backends
# Parts of CUDA's errors that say nothing about the device: another call may succeed.
TRANSIENT = ("out of memory", "captur", "forked subprocess")
HOW_TO_GET_CUDA = (
    "install nvcc 12 or later, then apet-kernels again from its source: "
    "`APET_CUDA_ARCHS=default pip install --force-reinstall --no-deps .`"
)


def _load(library: Path, op: str, key: str, how: str) -> str | None:
    """Loads a compiled library, unless another copy of this package has loaded its own. Returns None, or why not."""
    if has_kernel(op, key):
        return None
    if not library.exists():
        return f"{library.name} is not part of this installation; {how}"
    try:
        torch.ops.load_library(library)
    except (OSError, RuntimeError) as error:  # the dynamic loader's, and of a registration that torch refuses
        return f"{library.name} does not load ({error}); {how}"
    return None


def why_not_cpu() -> str | None:
    """Loads the CPU kernels. Returns None, or why they are not part of this installation."""
    return _load(LIBRARY, "compress", "CPU", HOW_TO_GET_KERNELS)


@functools.cache
def why_not_triton() -> str | None:
    """Returns None if Triton can be imported, else why it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); `pip install apet-kernels[triton]`"
    return None


def why_not_triton_on(device: torch.device) -> str | None:
    """Returns None if the Triton kernels run on this GPU, else why not."""
    if why := why_not_triton():
        return why
    if torch.version.hip or device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    if major < OLDEST_CAPABILITY:
        return (
            f"the Triton kernels run on GPUs of compute capability {OLDEST_CAPABILITY}.0 or later, not {major}.{minor}"
        )
    return None


def _interpreted() -> bool:
    """Returns whether Triton runs kernels on CPU tensors, by its interpreter."""
    import triton

    return bool(triton.knobs.runtime.interpret)


@functools.cache
def why_not_cuda_library() -> str | None:
    """Loads the CUDA kernels. Returns None, or why they are not part of this installation."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return _load(CUDA_LIBRARY, "_cuda_compress", "CUDA", HOW_TO_GET_CUDA)


@functools.cache
def why_not_cuda(device: torch.device) -> str | None:
    """Returns None if the CUDA kernels run on this device, else why not.

    It plans a call of each dtype, which loads all kernels and starts CUDA on the device. So one call, of any dtype,
    before a capture is enough. Raises RuntimeError for an error that may be gone the next time, as in a capture: a
    process that kept it as an answer would take the other backend, with other bits, until it ends.
    """
    if device.type != "cuda":
        return f"x is on {device}"
    if why := why_not_cuda_library():
        return why
    try:
        with unset_fake_temporarily():  # a fake tensor would say nothing about the device
            for dtype in DTYPES:
                registered._cuda_plan(torch.empty(1, 2, 1, dtype=dtype, device=device), 1)
    except RuntimeError as error:
        if any(part in str(error) for part in TRANSIENT):
            raise RuntimeError(f"{device} could not be asked whether it runs the CUDA kernels: {error}") from error
        return f"the CUDA kernels do not run on {device}: {error}"
    return None


def why_no_kernels(device: torch.device) -> str | None:
    """Returns None if a backend has kernels for tensors on this device, else why none has."""
    if device.type == "cpu":
        return why_not_cpu()
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    why_cuda, why_triton = why_not_cuda(device), why_not_triton_on(device)
    return None if why_cuda is None or why_triton is None else f"{why_cuda}; {why_triton}"


def why_missing(name: Backend) -> str | None:
    """Returns why no tensor can use a backend here, or None if that cannot be said without starting CUDA: a process
    that has started it can fork no workers that use the GPU.

    Raises:
        ValueError: if there is no backend of this name.
    """
    if name == "cpu":
        return why_not_cpu()
    if name == "reference":
        return None
    if name not in BACKENDS:
        raise ValueError(f"backend='{name}' is none of {', '.join(BACKENDS)}")
    if why := why_not_triton() if name == "triton" else why_not_cuda_library():
        return why
    if torch.cuda.device_count():  # asks the driver's management library, where is_available() asks CUDA
        return None
    if name == "cuda":
        return "torch finds no GPU"
    return (
        None if _interpreted() else "torch finds no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"
    )


def why_unavailable(name: Backend) -> str | None:
    """Returns why a backend cannot be used here.

    For "triton" and "cuda" it asks the current GPU, which starts CUDA in this process. So it has to be called after a
    fork, not before it.

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
    if why := why_missing(name):
        return why
    if name in ("cpu", "reference") or (name == "triton" and _interpreted()):
        return None
    if not torch.cuda.is_available():
        return "torch finds no GPU that CUDA can use"
    try:
        return why_not_cuda(torch.device("cuda", torch.cuda.current_device())) if name == "cuda" else None
    except RuntimeError as error:
        return str(error)


def available_backends() -> tuple[Backend, ...]:
    """Returns the backends that can be used here, of "cpu", "triton", "cuda" and "reference", in this order.

    It asks the current GPU, as `why_unavailable` does, so it has to be called after a fork, not before it.

    Example:
        >>> "reference" in apet_kernels.available_backends()
        True
    """
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


def check_usable(backend: Backend, device: torch.device) -> None:
    """Raises ValueError if the backend cannot run here, or takes no tensors on this device."""
    if why := why_missing(backend) or _why_not_on(backend, device):
        raise ValueError(f"backend='{backend}' cannot run here: {why}")


def _why_not_on(backend: Backend, device: torch.device) -> str | None:
    """Returns None if a usable backend takes tensors on this device, else why not."""
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
