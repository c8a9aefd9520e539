"""The ops `torch.ops.apet.*`: schemas, what they refuse, and fakes; once, for every backend.

Implementations: on the CPU key the compiled library registers its own (csrc/torch_binding.cpp). On the CUDA key, which
is ROCm's too, stands the choice below, made once for each device: the CUDA kernels where they run, else the Triton
kernels; either is loaded on the first call. Other devices run the float64 reference, with a warning that says so.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

LAYOUTS = ("inplace", "overwrite", "append")
SELECTS = ("fps", "qr")
MAX_BASIS = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("compress", "compress_varlen", "score", "merge")
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

_BASIS_OPTIONS = 'str select="fps", int start=-1, float ridge=1e-5'
_OPTIONS = f'str layout="inplace", {_BASIS_OPTIONS}, float blend=1.0'
_SCHEMAS = (
    f"compress(Tensor x, SymInt keep, int basis=10, *, {_OPTIONS}) -> (Tensor tokens, Tensor indices)",
    "compress_varlen(Tensor x, Tensor cu_seqlens, Tensor cu_keep, SymInt total_keep, SymInt max_seqlen, "
    f"SymInt max_keep, int basis=10, *, {_OPTIONS}) -> (Tensor tokens, Tensor indices)",
    f"score(Tensor x, int basis=10, *, {_BASIS_OPTIONS}) -> (Tensor residual, Tensor basis_indices)",
    "merge(Tensor x, Tensor indices, *, Tensor? targets=None) -> Tensor",
)
# What csrc/cuda_torch_binding.cpp registers: the ops again, for `_run_on_gpu` to call, and how compress would run.
CUDA_SCHEMAS = (
    *(f"_cuda_{schema}" for schema in _SCHEMAS),
    f"_cuda_plan(Tensor x, SymInt keep, int basis=10, *, {_OPTIONS}) -> (str why, str path, int launches, int group, "
    "int groups, int slice, int resident, int workspace_bytes, float estimated_us)",
)
_library = torch.library.Library("apet", "DEF")
for _schema in _SCHEMAS:
    _library.define(_schema)
_library.define("_empty(Tensor x) -> Tensor")  # does nothing: what benchmarks/test_overhead.py measures against
if torch.version.cuda:
    for _schema in CUDA_SCHEMAS:
        _library.define(_schema)


# ---- what is refused, in the words of csrc/problem.cpp and csrc/torch_ops.h


def check_grad(*tensors: Tensor | None) -> None:
    """Inference only: refused here, since a result that is silently detached would train nothing."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            "an input requires grad, but apet ops have no derivative; call them under torch.no_grad(), or on x.detach()"
        )


def _check_tokens(x: Tensor, dims: int) -> None:
    shape = "[T, D]" if dims == 2 else "[B, N, D]"
    torch._check(x.dim() == dims, lambda: f"x has {x.dim()} dimensions; {shape} is needed")
    torch._check(x.dtype in DTYPES, lambda: f"x has dtype {_name(x.dtype)}; Float, Half or BFloat16 is needed")
    torch._check(x.shape[-1] >= 1, lambda: f"x has {x.shape[-1]} features per token; at least 1 is needed")
    torch._check(
        x.stride(-1) == 1 or x.shape[-1] == 1,
        lambda: f"the last dimension of x has stride {x.stride(-1)}; it must be contiguous (stride 1)",
    )
    if dims == 3:
        torch._check(x.shape[1] >= 1, lambda: f"x has {x.shape[1]} tokens per image; at least 1 is needed")


def _check_basis(tokens: int, basis: int, select: str, start: int, ridge: float) -> None:
    torch._check(select in SELECTS, lambda: f"select='{select}' is none of {', '.join(SELECTS)}")
    torch._check(1 <= basis <= MAX_BASIS, lambda: f"basis={basis} is outside 1..{MAX_BASIS}")
    torch._check(
        start in (-1, 0) or 0 < start < tokens, lambda: f"start={start} is outside -1..{max(int(tokens) - 1, 0)}"
    )
    torch._check(ridge >= 0 and math.isfinite(ridge), lambda: f"ridge={ridge:g} must be finite and at least 0")


def _check_layout(layout: str, blend: float) -> None:
    torch._check(layout in LAYOUTS, lambda: f"layout='{layout}' is none of {', '.join(LAYOUTS)}")
    torch._check(0 <= blend <= 1, lambda: f"blend={blend:g} is outside 0..1")
    torch._check(
        blend == 1 or layout == "overwrite",
        lambda: f"blend={blend:g} needs layout='overwrite', got layout='{layout}'",
    )


def _check_keep(keep: int, tokens: int, name: str = "keep") -> None:
    for holds in (keep >= 1, keep <= tokens):
        torch._check(holds, lambda: f"{name}={keep} is outside 1..{tokens}, the tokens of an image")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    torch._check(tensor.device == x.device, lambda: f"{name} is on {tensor.device}, but x is on {x.device}")


def _check_offsets(name: str, cu: Tensor, x: Tensor) -> None:
    _check_device(name, cu, x)
    torch._check(
        cu.dim() == 1 and cu.dtype == torch.int32 and cu.shape[0] >= 1,
        lambda: f"{name} must be int32 [S + 1], got {_name(cu.dtype)} with {cu.dim()} dimensions",
    )


def _name(dtype: torch.dtype) -> str:
    """What C++ calls a dtype, so that both sides say the same."""
    special = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    special |= {torch.int32: "Int", torch.int64: "Long", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte"}
    return special.get(dtype, str(dtype).removeprefix("torch.").capitalize())


def check_compress(
    x: Tensor,
    keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
) -> None:
    """Refuses, in a sentence, what `compress` refuses: RuntimeError."""
    _check_tokens(x, 3)
    _check_layout(layout, blend)
    _check_basis(x.shape[1], basis, select, start, ridge)
    _check_keep(keep, x.shape[1])
    torch._check(
        layout != "overwrite" or keep > basis or keep == x.shape[1],
        lambda: f"layout='overwrite' needs keep > basis, got keep={keep} and basis={basis}",
    )


def check_compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
) -> None:
    """Refuses, in a sentence, what `compress_varlen` refuses without looking at the cu tensors: RuntimeError."""
    _check_tokens(x, 2)
    _check_layout(layout, blend)
    _check_offsets("cu_seqlens", cu_seqlens, x)
    _check_offsets("cu_keep", cu_keep, x)
    torch._check(
        cu_seqlens.shape[0] == cu_keep.shape[0],
        lambda: f"cu_seqlens has {cu_seqlens.shape[0]} entries but cu_keep has {cu_keep.shape[0]}",
    )
    torch._check(
        max_seqlen >= 0 and max_keep >= 0,
        lambda: f"max_seqlen={max_seqlen} and max_keep={max_keep} must be at least 0",
    )
    _check_basis(x.shape[0], basis, select, start, ridge)
    torch._check(total_keep >= 0, lambda: f"total_keep={total_keep} is outside 0..{x.shape[0]}, the tokens of x")
    torch._check(
        total_keep <= x.shape[0], lambda: f"total_keep={total_keep} is outside 0..{x.shape[0]}, the tokens of x"
    )


def check_score(x: Tensor, basis: int = 10, *, select: str = "fps", start: int = -1, ridge: float = 1e-5) -> None:
    """Refuses, in a sentence, what `score` refuses: RuntimeError."""
    _check_tokens(x, 3)
    _check_basis(x.shape[1], basis, select, start, ridge)


def check_merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None) -> None:
    """Refuses, in a sentence, what `merge` refuses without looking at the indices: RuntimeError."""
    _check_tokens(x, 3)
    torch._check(
        indices.dim() == 2 and indices.dtype == torch.int64 and indices.shape[0] == x.shape[0],
        lambda: f"indices must be int64 [{x.shape[0]}, K], got {_name(indices.dtype)} with {indices.dim()} dimensions",
    )
    _check_device("indices", indices, x)
    _check_keep(indices.shape[1], x.shape[1], "K")
    if targets is not None:
        torch._check(
            targets.dim() == 2 and targets.dtype == torch.bool and targets.shape == indices.shape,
            lambda: (
                f"targets must be bool [{indices.shape[0]}, {indices.shape[1]}] as indices are, "
                f"got {_name(targets.dtype)} with {targets.dim()} dimensions"
            ),
        )
        _check_device("targets", targets, x)


CHECKS: dict[str, Callable[..., None]] = {
    "compress": check_compress,
    "compress_varlen": check_compress_varlen,
    "score": check_score,
    "merge": check_merge,
}


# ---- fakes: the shapes of the results, which never depend on the data


@torch.library.register_fake("apet::compress", lib=_library)
def _(x, keep, basis=10, *, layout="inplace", select="fps", start=-1, ridge=1e-5, blend=1.0):
    check_compress(x, keep, basis, layout=layout, select=select, start=start, ridge=ridge, blend=blend)
    B, _, D = x.shape
    R = keep + (basis if layout == "append" else 0)
    return x.new_empty(B, R, D), x.new_empty(B, R, dtype=torch.int64)


@torch.library.register_fake("apet::compress_varlen", lib=_library)
def _(x, cu_seqlens, cu_keep, total_keep, max_seqlen, max_keep, basis=10, *, layout="inplace", **options):
    check_compress_varlen(x, cu_seqlens, cu_keep, total_keep, max_seqlen, max_keep, basis, layout=layout, **options)
    R = total_keep + ((cu_seqlens.shape[0] - 1) * basis if layout == "append" else 0)
    return x.new_empty(R, x.shape[1]), x.new_empty(R, dtype=torch.int64)


@torch.library.register_fake("apet::score", lib=_library)
def _(x, basis=10, *, select="fps", start=-1, ridge=1e-5):
    check_score(x, basis, select=select, start=start, ridge=ridge)
    B, N, _ = x.shape
    return x.new_empty(B, N, dtype=torch.float32), x.new_empty(B, basis, dtype=torch.int64)


@torch.library.register_fake("apet::merge", lib=_library)
def _(x, indices, *, targets=None):
    check_merge(x, indices, targets=targets)
    return x.new_empty(*indices.shape, x.shape[-1])


@torch.library.register_fake("apet::_empty", lib=_library)
def _(x):
    return x.new_empty(0)


# ---- gradients: refused above every backend


def _refuse_grad(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        check_grad(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


for _op in OPS:
    # Under torch.inference_mode() the dispatcher leaves this key out, and its microseconds with it.
    _library.impl(_op, _refuse_grad(getattr(torch.ops.apet, _op).default), "Autograd", with_keyset=True)


# ---- implementations


def _load(library: Path, how: str) -> str | None:
    """Loads a compiled library; returns None, or the sentence that says why it is not usable."""
    if not library.exists():
        return f"{library.name} is not part of this installation; {how}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} does not load ({error}); {how}"
    return None


@functools.cache
def _warn_once(device: str, how: str) -> None:
    warnings.warn(
        f"apet ops on {device} tensors run the float64 reference, orders of magnitude slower than a kernel; {how}",
        stacklevel=4,
    )


def _run_reference(name: str, how: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    _warn_once(x.device.type, how)
    CHECKS[name](x, *args, **kwargs)
    return getattr(reference, name)(x, *args, **kwargs)


@functools.cache
def no_triton() -> str | None:
    """None where Triton can be imported, else the sentence that says why it cannot."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import ({error}); `pip install apet-kernels[triton]`"
    return None


def run_triton(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op `name` by the Triton kernels, for x on a GPU, or on the CPU under Triton's interpreter."""
    from .triton_kernels import launch

    CHECKS[name](x, *args, **kwargs)
    with torch.cuda.device_of(x):
        results = getattr(launch, name)(x, *args, **kwargs).run()
    return results if len(results) > 1 else results[0]


@functools.cache
def no_cuda_library() -> str | None:
    """None where the CUDA kernels are part of this installation and, from then on, loaded; else why they are not."""
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    return _load(CUDA_LIBRARY, HOW_TO_GET_CUDA)


@functools.cache
def no_cuda(device: torch.device) -> str | None:
    """None where the CUDA kernels run on this device, else the sentence that says why not."""
    if device.type != "cuda":
        return f"x is on {device}"
    if why := no_cuda_library():
        return why
    x = torch.empty(1, 2, 1, device=device)
    try:
        torch.ops.apet._cuda_plan(x, 1)
    except RuntimeError as error:
        return f"the CUDA kernels do not run on {device}: {error}"
    return None


def run_cuda(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The op `name` by the CUDA kernels, for x on a device of which `no_cuda` has found nothing to say."""
    return getattr(torch.ops.apet, f"_cuda_{name}").default(x, *args, **kwargs)


def _run_on_gpu(name: str, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Which kernels a CUDA or ROCm tensor gets."""
    if not no_cuda(x.device):
        return run_cuda(name, x, *args, **kwargs)
    if why := no_triton():
        return _run_reference(name, f"{no_cuda(x.device)}; {why}", x, *args, **kwargs)
    return run_triton(name, x, *args, **kwargs)


for _op in OPS:
    _library.impl(_op, functools.partial(_run_on_gpu, _op), "CUDA")
    _library.impl(_op, functools.partial(_run_reference, _op, HOW_TO_GET_KERNELS), "CompositeExplicitAutograd")


NO_LIBRARY = _load(LIBRARY, HOW_TO_GET_KERNELS)
