"""The ops `torch.ops.apet.*`: their schemas, argument checks and fakes, defined once for every backend.

Implementations are in `dispatch.py` and in the compiled libraries. The checks raise ValueError; within an op they raise
RuntimeError with the same message, as torch's own ops do. The messages are those of csrc/problem.cpp and torch_ops.h.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .options import LAYOUTS as LAYOUTS  # three names that users of 0.1 import from here
from .options import MAX_BASIS as MAX_BASIS
from .options import SELECTS as SELECTS
from .options import Options, Select, check_keep, require
from .registry import registered, registry
from .version import __version__

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OPS = ("compress", "compress_varlen", "score", "merge")

_OPTIONS = 'str layout="inplace", str select="qr", int start=-1, float ridge=1e-5, float blend=1.0, int refine=0'
_WEIGHTS = "Tensor? weights=None"
SCHEMAS = (
    f"compress(Tensor x, SymInt keep, int? basis=None, *, {_OPTIONS}, {_WEIGHTS}) -> (Tensor tokens, Tensor indices)",
    "compress_varlen(Tensor x, Tensor cu_seqlens, Tensor cu_keep, SymInt total_keep, SymInt max_seqlen, "
    f"SymInt max_keep, int? basis=None, *, {_OPTIONS}, {_WEIGHTS}) -> (Tensor tokens, Tensor indices)",
    'score(Tensor x, int? basis=10, *, str select="fps", int start=-1, float ridge=1e-5) -> '
    "(Tensor residual, Tensor basis_indices)",
    "merge(Tensor x, Tensor indices, *, Tensor? targets=None) -> Tensor",
)
# The figures of the estimate, the members of `Figures` in csrc/cuda/figures.cuh after the first.
FIGURES = (
    *("launch_us", "overlapped_launch_us", "cluster_step_us", "cooperative_step_us", "lists_us", "s4_token_us"),
    *("group_us", "fill_us", "term_us", "elements_per_sm", "l2_per_sm", "l2_share", "l2_bytes", "memory_share"),
    *("flops_per_sm_16", "flops_per_sm_32", "triton_flops_per_sm_16", "pick_us"),
)
# csrc/cuda_torch_binding.cpp registers these: the ops again, for dispatch.py to call; the plan of `compress`; the path
# that apet_kernels.testing forces; and what choice.py compares.
CUDA_SCHEMAS = (
    *(f"_cuda_{schema}" for schema in SCHEMAS),
    f"_cuda_plan(Tensor x, SymInt keep, int? basis=None, *, {_OPTIONS}) -> (str why, str path, int launches, "
    "int ctas_per_image, int images_in_flight, int rows_per_cta, int rows_in_shared_memory, int tile, int tile_rows, "
    "int workspace_bytes, float estimated_us)",
    "_cuda_override(Tensor like, str path, int ctas_per_image, int rows_in_shared_memory, int tile, int tile_rows) "
    "-> ()",
    "_cuda_estimate(Tensor like, int tokens, int keep) -> float",
    f"_cuda_figures(Tensor like, int capability) -> ({', '.join(f'float {name}' for name in FIGURES)})",
)
REGISTRY = registry(__version__, __file__, (*SCHEMAS, *CUDA_SCHEMAS) if torch.version.cuda else SCHEMAS)


# ---- checks: ValueError, with the messages of csrc/problem.cpp and csrc/torch_ops.h


def check_grad(*tensors: Tensor | None) -> None:
    """Raises ValueError for a tensor that requires grad, in grad mode, or that has a tangent (in forward-mode
    differentiation): a detached result would train nothing, and its tangent would be taken for 0."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "an input requires grad, but apet ops have no derivative; call them under torch.no_grad(), or on x.detach()"
        )
    if forward_ad._current_level >= 0 and any(
        t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors
    ):
        raise ValueError("an input has a tangent, but apet ops have no derivative; call them on the primal of x")


def check_tokens(x: Tensor, dims: int) -> None:
    shape = "[T, D]" if dims == 2 else "[B, N, D]"
    require(x.layout == torch.strided, lambda: f"x has layout {x.layout}; a dense tensor (torch.strided) is needed")
    require(x.dim() == dims, lambda: f"x has {x.dim()} dimensions; {shape} is needed")
    require(x.dtype in DTYPES, lambda: f"x has dtype {_name(x.dtype)}; Float, Half or BFloat16 is needed")
    require(x.shape[-1] >= 1, lambda: f"x has {x.shape[-1]} features per token; at least 1 is needed")
    if dims == 3:
        require(x.shape[1] >= 1, lambda: f"x has {x.shape[1]} tokens per image; at least 1 is needed")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    require(tensor.device == x.device, lambda: f"{name} is on {tensor.device}, but x is on {x.device}")


def _check_offsets(name: str, cu: Tensor, x: Tensor) -> None:
    _check_device(name, cu, x)
    require(
        cu.dim() == 1 and cu.dtype == torch.int32 and cu.shape[0] >= 1,
        lambda: f"{name} must be int32 [S + 1], got {_form(cu)}",
    )


def check_weights(weights: Tensor | None, x: Tensor) -> None:
    """Raises ValueError for weights of another form than the tokens of x."""
    if weights is None:
        return
    require(
        weights.dtype == torch.float32 and weights.shape == x.shape[:-1],
        lambda: f"weights must be Float [{_sizes(x.shape[:-1])}], the tokens of x, got {_form(weights)}",
    )
    _check_device("weights", weights, x)


def _sizes(shape: torch.Size) -> str:
    return ", ".join(map(str, shape))


def _form(tensor: Tensor) -> str:
    return f"{_name(tensor.dtype)} [{_sizes(tensor.shape)}]"


def _name(dtype: torch.dtype) -> str:
    """Returns the C++ name of a dtype, so that messages are the same in both languages."""
    special = {torch.float32: "Float", torch.float64: "Double", torch.float16: "Half", torch.bfloat16: "BFloat16"}
    special |= {torch.int32: "Int", torch.int64: "Long", torch.int16: "Short", torch.int8: "Char", torch.uint8: "Byte"}
    return special.get(dtype, str(dtype).removeprefix("torch.").capitalize())


def check_compress(
    x: Tensor, keep: int, basis: int | None = None, *, weights: Tensor | None = None, **options: Any
) -> None:
    """Raises ValueError for what `compress` rejects. options: the other fields of `Options`."""
    check_tokens(x, 3)
    Options(basis, **options).check(x.shape[1], keep)
    check_weights(weights, x)


def check_compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    **options: Any,
) -> None:
    """Raises ValueError for what `compress_varlen` rejects without looking at the values of the cu tensors."""
    check_tokens(x, 2)
    Options(basis, **options).check(x.shape[0], ragged=True)
    _check_offsets("cu_seqlens", cu_seqlens, x)
    _check_offsets("cu_keep", cu_keep, x)
    require(
        cu_seqlens.shape[0] == cu_keep.shape[0],
        lambda: f"cu_seqlens has {cu_seqlens.shape[0]} entries but cu_keep has {cu_keep.shape[0]}",
    )
    for holds in (max_seqlen >= 0, max_keep >= 0):
        require(holds, lambda: f"max_seqlen={max_seqlen} and max_keep={max_keep} must be at least 0")
    for holds in (total_keep >= 0, total_keep <= x.shape[0]):
        require(holds, lambda: f"total_keep={total_keep} is outside 0..{x.shape[0]}, the tokens of x")
    check_weights(weights, x)


def check_score(x: Tensor, basis: int | None = 10, *, select: Select = "fps", **options: Any) -> None:
    """Raises ValueError for what `score` rejects. options: start and ridge, as in `Options`."""
    check_tokens(x, 3)
    Options(basis, select=select, **options).check(x.shape[1])


def check_merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None) -> None:
    """Raises ValueError for what `merge` rejects without looking at the values of the indices."""
    check_tokens(x, 3)
    require(
        indices.dim() == 2 and indices.dtype == torch.int64 and indices.shape[0] == x.shape[0],
        lambda: f"indices must be int64 [{x.shape[0]}, K], got {_form(indices)}",
    )
    _check_device("indices", indices, x)
    check_keep(indices.shape[1], x.shape[1], "K")
    if targets is not None:
        require(
            targets.dim() == 2 and targets.dtype == torch.bool and targets.shape == indices.shape,
            lambda: (
                f"targets must be bool [{indices.shape[0]}, {indices.shape[1]}] as indices are, got {_form(targets)}"
            ),
        )
        _check_device("targets", targets, x)


_CHECKS: dict[str, Callable[..., None]] = {
    "compress": check_compress,
    "compress_varlen": check_compress_varlen,
    "score": check_score,
    "merge": check_merge,
}


def check(op: str, *args: Any, **kwargs: Any) -> None:
    """Checks the arguments of a call of `torch.ops.apet.<op>`, which may be symbolic.

    Raises:
        ValueError: names the argument at fault, and its value.
    """
    check_grad(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
    _CHECKS[op](*args, **kwargs)


def check_in_op(op: str, *args: Any, **kwargs: Any) -> None:
    """Runs `check`, but raises RuntimeError, as an op does."""
    try:
        check(op, *args, **kwargs)
    except ValueError as error:
        raise RuntimeError(str(error)) from None


# ---- fakes: the shapes of the results, which never depend on the data


def _fake_compress(
    x: Tensor, keep: int, basis: int | None = None, *, weights: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    check_in_op("compress", x, keep, basis, weights=weights, **options)
    B, _, D = x.shape
    R = Options(basis, **options).rows(keep)
    return x.new_empty(B, R, D), x.new_empty(B, R, dtype=torch.int64)


def _fake_compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    sizes = (total_keep, max_seqlen, max_keep)
    check_in_op("compress_varlen", x, cu_seqlens, cu_keep, *sizes, basis, weights=weights, **options)
    R = Options(basis, **options).rows(total_keep, images=cu_seqlens.shape[0] - 1)
    return x.new_empty(R, x.shape[1]), x.new_empty(R, dtype=torch.int64)


def _fake_score(x: Tensor, basis: int | None = 10, **options: Any) -> tuple[Tensor, Tensor]:
    check_in_op("score", x, basis, **options)
    assert basis is not None  # the check has raised
    B, N, _ = x.shape
    M = Options(basis).basis_of(0)  # the check has excluded None
    return x.new_empty(B, N, dtype=torch.float32), x.new_empty(B, M, dtype=torch.int64)


def _fake_merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None) -> Tensor:
    check_in_op("merge", x, indices, targets=targets)
    return x.new_empty(*indices.shape, x.shape[-1])


REGISTRY.fake("compress", _fake_compress)
REGISTRY.fake("compress_varlen", _fake_compress_varlen)
REGISTRY.fake("score", _fake_score)
REGISTRY.fake("merge", _fake_merge)


# ---- gradients: rejected above every backend


def _reject_grad(op: torch._ops.OpOverload) -> Callable[..., Any]:
    def kernel(keyset: torch._C.DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        try:
            check_grad(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        except ValueError as error:
            raise RuntimeError(str(error)) from None
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args, **kwargs)

    return kernel


for _op in OPS:
    # Under torch.inference_mode() the dispatcher skips this key, which saves some microseconds.
    REGISTRY.implement(_op, "Autograd", _reject_grad(getattr(registered, _op).default), with_keyset=True)
