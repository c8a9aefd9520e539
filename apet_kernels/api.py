"""The Python face of the ops: the same arguments, lists of lengths for ragged images, and a choice of backend."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference

try:
    from . import _host
except ImportError:  # a pure wheel, or libraries of another Python
    _host = None
NO_HOST = f"the module apet_kernels._host is not part of this installation; {ops.HOW_TO_GET_KERNELS}"


def backends() -> dict[str, str | None]:
    """Every backend by name: None where it is usable here, else the sentence that says why it is not."""
    return {
        "cpu": ops.NO_LIBRARY,
        "triton": ops.no_triton() or _no_gpu(),
        "cuda": _no_cuda(),
        "reference": None,
    }


def _interpreted() -> bool:
    """Whether Triton runs kernels on CPU tensors, by its interpreter."""
    import triton

    return triton.knobs.runtime.interpret


def _no_cuda() -> str | None:
    if why := ops.no_cuda_library():
        return why
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    return ops.no_cuda(torch.device("cuda", torch.cuda.current_device()))


def _no_gpu() -> str | None:
    if torch.cuda.is_available() or _interpreted():
        return None
    return "torch finds no GPU, and TRITON_INTERPRET=1 was not set before Triton was imported"


def build_info() -> dict[str, Any]:
    """How the compiled library was built: version, commit, compiler, flags, instruction sets, CUDA architectures, and
    the torch whose headers were used. Empty where there is none."""
    return _host.build_info() if _host else {}


def cpu_isa() -> list[str]:
    """Instruction sets that the CPU kernel can use on this machine, the best one last. Empty without the library."""
    return _host.cpu_isa() if _host else []


def use_cpu_isa(name: str | None) -> None:
    """Pins the CPU kernel of this process to one of `cpu_isa()`; None goes back to the best. For tests and benchmarks.

    Raises ValueError where it is not usable here.
    """
    if not _host:
        raise ValueError(NO_HOST)
    _host.use_cpu_isa(name)


def plan(
    x: Tensor,
    keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
) -> dict[str, Any]:
    """How `compress` with these arguments would run, without running it.

    x [B, N, D] may be a meta tensor. Returns backend, why it was chosen, launches (1 on a CPU: its one region), and
    workspace_bytes; on the CPU also isa, teams (images in flight at once), threads_per_team, and the estimates behind
    them, in microseconds (serial_us on one thread, planned_us); of the CUDA kernels also path (fused, cluster, groups:
    docs/cuda.md), group (CTAs that share an image), groups (images in flight), slice (rows of a CTA), resident (of
    those in shared memory) and estimated_us. Raises as `compress` does.
    """
    options = {"layout": layout, "select": select, "start": start, "ridge": ridge, "blend": blend}
    ops.check_compress(x, keep, basis, **options)
    here = x.device.type in ("cpu", "meta")
    if x.device.type == "cuda" and not ops.no_cuda(x.device):
        return _plan_cuda(x, keep, basis, **options)
    if x.device.type == "cuda" and not ops.no_triton():
        return _plan_triton(x, keep, basis, **options)
    if not here or ops.NO_LIBRARY:
        why = ops.NO_LIBRARY if here else ops.no_triton() or f"this version has no kernels for {x.device.type}"
        return {"backend": "reference", "why": why, "launches": 0, "workspace_bytes": 0}
    if not _host:
        raise ValueError(NO_HOST)
    B, N, D = x.shape
    path = _host.plan(
        images=B,
        tokens=N,
        dim=D,
        keep=keep,
        basis=basis,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        **options,
    )
    why = (
        f"x is on the CPU, whose best instruction set in this build is {path['isa']}; the work, estimated at "
        f"{path['serial_us']:.0f} us on one thread, is worth {path['teams'] * path['threads_per_team']} of "
        f"{torch.get_num_threads()} threads"
    )
    return {"backend": "cpu", "why": why, "launches": 1, **path}


def _plan_cuda(x: Tensor, keep: int, basis: int, **options: Any) -> dict[str, Any]:
    names = "why", "path", "launches", "group", "groups", "slice", "resident", "workspace_bytes", "estimated_us"
    values = torch.ops.apet._cuda_plan(x, keep, basis, **options)
    return {"backend": "cuda", **dict(zip(names, values, strict=True))}


def _plan_triton(x: Tensor, keep: int, basis: int, **options: Any) -> dict[str, Any]:
    from .triton_kernels import configs, launch

    device_class = configs.device_class(x.device)
    shape = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    call = launch.compress(shape, keep, basis, **options, device_class=device_class)
    why = f"x is on {x.device} ({device_class}); {ops.no_cuda(x.device)}"
    launches, workspace_bytes = len(call.launches), call.workspace_bytes
    return {"backend": "triton", "why": why, "launches": launches, "workspace_bytes": workspace_bytes}


def compress(
    x: Tensor,
    keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Keeps the `keep` tokens of each image that a small basis rebuilds worst, and merges the others into them.

    ApET, arXiv 2602.19870, sections on basis selection, approximation error and merging; docs/algorithm.md.

    Args:
        x: [B, N, D] float32, float16 or bfloat16; last dimension contiguous, any other strides.
        keep: K, 1..N. keep = N returns x bit for bit.
        basis: M, 1..64 basis tokens.
        layout: "inplace" (basis and largest residuals, each at its own position), "overwrite" (the released code: the
            lowest of the kept are overwritten by the basis; needs keep > basis) or "append" (the basis after them).
        select: "fps" (farthest point) or "qr" (largest residual so far).
        start: the first basis token, or -1: the one of largest norm.
        ridge: >= 0, added to the diagonal of the basis' Gram matrix.
        blend: "overwrite" only: blend * basis + (1 - blend) * token.
        backend: "cpu", "triton", "cuda" or "reference" instead of the dispatcher's choice.

    Returns:
        tokens [B, R, D] in x's dtype and indices [B, R] int64, the position of every row, ascending; R = keep, or
        keep + basis with "append" (the basis rows follow, in picking order).

    Raises:
        RuntimeError or ValueError, in a sentence with the offending value, for arguments out of range, an input that
        requires grad (with grad mode on), and a backend that cannot run here.
    """
    options = {"layout": layout, "select": select, "start": start, "ridge": ridge, "blend": blend}
    return _implementation("compress", backend, x)(x, keep, basis, **options)


def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor | Sequence[int],
    cu_keep: Tensor | Sequence[int],
    total_keep: int | None = None,
    max_seqlen: int | None = None,
    max_keep: int | None = None,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`compress` for S ragged images packed one after another in x [T, D].

    Args:
        x: [T, D], as in `compress`.
        cu_seqlens, cu_keep: either plain lists of S lengths and S keeps (checked here, and total_keep, max_seqlen and
            max_keep follow from them), or int32 tensors [S + 1] on x's device of their running sums, starting at 0
            (not checked, since that would synchronise: whatever they hold, kernels stay in bounds).
        total_keep, max_seqlen, max_keep: with tensors: the sum of all keeps, the longest image, the largest keep. With
            lists they follow from them, and must be left out.
        Others: as in `compress`.

    Returns:
        tokens [R, D] in x's dtype, image after image, and indices [R] int64 into x; R = total_keep, or
        total_keep + S * basis with "append".

    Raises:
        As `compress`, with the number of the image where one is at fault.
    """
    if not isinstance(cu_seqlens, Tensor) and not isinstance(cu_keep, Tensor):
        lengths, keeps = _whole("length", cu_seqlens), _whole("keep", cu_keep)
        if (total_keep, max_seqlen, max_keep) != (None, None, None):
            raise ValueError(
                f"total_keep={total_keep}, max_seqlen={max_seqlen} and max_keep={max_keep} follow from the lists; "
                "leave them out"
            )
        _check_lengths(x, lengths, keeps, basis, layout)
        total_keep, max_seqlen, max_keep = sum(keeps), max(lengths, default=0), max(keeps, default=0)
        cu_seqlens, cu_keep = (
            torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=x.device) for n in (lengths, keeps)
        )
    elif not isinstance(cu_seqlens, Tensor) or not isinstance(cu_keep, Tensor):
        raise ValueError("cu_seqlens and cu_keep must both be tensors [S + 1] or both be lists of S lengths")
    elif total_keep is None or max_seqlen is None or max_keep is None:
        raise ValueError(
            f"total_keep={total_keep}, max_seqlen={max_seqlen} and max_keep={max_keep} must be given with tensors: "
            "reading them off the device would synchronise"
        )
    options = {"layout": layout, "select": select, "start": start, "ridge": ridge, "blend": blend}
    return _implementation("compress_varlen", backend, x)(
        x, cu_seqlens, cu_keep, total_keep, max_seqlen, max_keep, basis, **options
    )


def score(
    x: Tensor,
    basis: int = 10,
    *,
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first half of `compress` (s1 to s3), for budgets chosen elsewhere; arguments and errors as there.

    Returns:
        residual [B, N] float32, the squared residual e^2 of every token that s4 ranks (0 where it is within rounding
        of 0, inf where a token's norm is not finite), and basis_indices [B, M] int64 in picking order, padded with -1.
    """
    return _implementation("score", backend, x)(x, basis, select=select, start=start, ridge=ridge)


def merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None, backend: str | None = None) -> Tensor:
    """The second half of `compress` (s5), for kept tokens chosen elsewhere.

    Args:
        x: [B, N, D], as in `compress`.
        indices: [B, K] int64, the kept tokens of each image, K in 1..N; any order, repetitions allowed (the earliest
            receives), clamped into [0, N).
        targets: [B, K] bool, which of them may be merged into; None: all.

    Returns:
        tokens [B, K, D] in x's dtype: row r is token indices[b, r], averaged with the tokens not listed that resemble
        it most. Raises as `compress`.
    """
    return _implementation("merge", backend, x)(x, indices, targets=targets)


def _implementation(name: str, backend: str | None, x: Tensor) -> Callable[..., Any]:
    if backend is None:
        return getattr(torch.ops.apet, name)
    usable = backends()
    if backend not in usable:
        raise ValueError(f"backend='{backend}' is none of {', '.join(usable)}")
    if usable[backend]:
        raise ValueError(f"backend='{backend}' cannot run here: {usable[backend]}")
    if backend == "cpu":
        if x.device.type != "cpu":
            raise ValueError(f"backend='cpu' cannot run here: x is on {x.device}")
        return getattr(torch.ops.apet, name)
    if backend == "triton" and x.device.type != "cuda" and not (x.device.type == "cpu" and _interpreted()):
        raise ValueError(f"backend='triton' cannot run here: x is on {x.device}")
    if backend == "cuda" and (why := ops.no_cuda(x.device)):
        raise ValueError(f"backend='cuda' cannot run here: {why}")

    def run(*args: Any, **kwargs: Any) -> Any:
        ops.check_grad(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
        if backend == "triton":
            return ops.run_triton(name, *args, **kwargs)
        if backend == "cuda":
            return ops.run_cuda(name, *args, **kwargs)
        ops.CHECKS[name](*args, **kwargs)
        return getattr(reference, name)(*args, **kwargs)

    return run


def _whole(name: str, values: Sequence[int]) -> list[int]:
    for s, value in enumerate(values):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name}={value} of image {s} is not a whole number")
    return [operator.index(value) for value in values]


def _check_lengths(x: Tensor, lengths: list[int], keeps: list[int], basis: int, layout: str) -> None:
    if len(lengths) != len(keeps):
        raise ValueError(f"{len(lengths)} lengths but {len(keeps)} keeps were given")
    if x.dim() == 2 and sum(lengths) != x.shape[0]:
        raise ValueError(f"the lengths add up to {sum(lengths)}, but x has {x.shape[0]} tokens")
    for s, (n, k) in enumerate(zip(lengths, keeps, strict=True)):
        if n < 1:
            raise ValueError(f"image {s} has {n} tokens; at least 1 is needed")
        if not 1 <= k <= n:
            raise ValueError(f"keep={k} is outside 1..{n}, the tokens of image {s}")
        if layout == "overwrite" and k <= basis and k != n:
            raise ValueError(f"layout='overwrite' needs keep > basis, got keep={k} for image {s} and basis={basis}")
