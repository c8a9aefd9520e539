"""`plan`, which describes how a call of `compress` would run, and the type of its result."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import available, choice, dispatch, host, ops
from .options import Backend, Layout, Options, Select
from .registry import registered

# Key of the dictionary of 0.1 -> its name now.
_OLD_KEYS = {
    "teams": "images_in_flight",
    "threads_per_team": "threads_per_image",
    "group": "ctas_per_image",
    "groups": "images_in_flight",
    "slice": "rows_per_cta",
    "resident": "rows_in_shared_memory",
}


@dataclass(frozen=True)
class Plan:
    """How a call of `compress` would run."""

    backend: Backend
    why: str  # the reason for this backend and path
    launches: int  # kernels; 1 on the CPU: its one parallel region; 0 for the reference
    workspace_bytes: int  # beyond the results
    # "cpu": isa; images_in_flight, threads_per_image; serial_us (estimated, on one thread), planned_us (estimated).
    # "cuda": path (fused, cluster or cooperative: docs/cuda.md), images_in_flight, ctas_per_image, rows_per_cta and of
    # these rows_in_shared_memory, tile and tile_rows (columns and rows of a tile of s5 as its own launch, else 0),
    # estimated_us. Empty for the others.
    details: Mapping[str, str | int | float] = field(default_factory=dict)

    def __getitem__(self, name: str) -> str | int | float:
        """Returns the value of a field or a detail. Deprecated: in 0.1 `plan` returned a dictionary."""
        warnings.warn(
            f"apet_kernels.plan(...)['{name}'] is deprecated: it returns a Plan with fields and `details`",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _OLD_KEYS.get(name, name)
        common = {"backend", "why", "launches", "workspace_bytes"}
        return getattr(self, name) if name in common else self.details[name]


def plan(
    x: Tensor,
    keep: int,
    basis: int | None = None,
    *,
    layout: Layout = "inplace",
    select: Select = "qr",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    refine: int = 0,
) -> Plan:
    """Returns how `compress` with these arguments would run, without running it.

    If `use_backend` or `set_backend` has set a backend, the plan is for that one.

    Args:
        x: [B, N, D] float32, float16 or bfloat16; a meta tensor stands for one on the CPU.
        keep, basis, layout, select, start, ridge, blend, refine: as in `compress`.

    Returns:
        The backend, the reason for it, launches, bytes of workspace, and details that depend on the backend.

    Raises:
        ValueError: as `compress` does.
        RuntimeError: if no path of the CUDA kernels can run on x's device.

    Example:
        >>> import torch
        >>> plan = apet_kernels.plan(torch.empty(1, 576, 1024, device="meta"), keep=64)
        >>> plan.backend in apet_kernels.available_backends()
        True
    """
    options = Options(basis, layout, select, start, ridge, blend, refine)
    ops.check_compress(x, keep, **options.arguments)
    device = torch.device("cpu") if x.device.type == "meta" else x.device
    backend = dispatch.chosen_backend()
    if backend is not None:
        available.check_usable(backend, device)
        found = _plan_by(backend, x, keep, options, why="")
        return replace(found, why=f"chosen by use_backend or set_backend; {found.why}")
    name, reason = choice.gpu_backend(x) if device.type == "cuda" else ("cpu", "")
    if name != "cpu":
        return _plan_by(name, x, keep, options, reason)
    if why := available.why_not_cpu():
        return _plan_by("reference", x, keep, options, why)
    return _plan_by("cpu", x, keep, options, available.why_no_kernels(device) or "")


def _plan_by(backend: Backend, x: Tensor, keep: int, options: Options, why: str) -> Plan:
    """Returns the plan of one backend. why: the reason for this backend, or why a preferred one cannot be used; may be
    empty."""
    if backend == "cuda":
        return _plan_cuda(x, keep, options, why)
    if backend == "triton":
        return _plan_triton(x, keep, options, why)
    if backend == "reference":
        return Plan("reference", why or "the float64 reference", launches=0, workspace_bytes=0)
    return _plan_cpu(x, keep, options, why)


def _plan_cpu(x: Tensor, keep: int, options: Options, why_copied: str) -> Plan:
    B, N, D = x.shape
    threads = torch.get_num_threads()
    details = host.module().plan(
        images=B,
        tokens=N,
        dim=D,
        keep=keep,
        dtype=str(x.dtype).removeprefix("torch."),
        threads=threads,
        **options.arguments,
    )
    where = f"x is copied to the CPU ({why_copied})" if why_copied else "x is on the CPU"
    used = details["images_in_flight"] * details["threads_per_image"]
    why = (
        f"{where}, whose best instruction set in this build is {details['isa']}; the call is estimated at "
        f"{details['serial_us']:.0f} us on one thread; {used} of {threads} threads will be used"
    )
    workspace_bytes = details.pop("workspace_bytes")
    return Plan("cpu", why, launches=1, workspace_bytes=workspace_bytes, details=details)


def _plan_cuda(x: Tensor, keep: int, options: Options, reason: str = "") -> Plan:
    why, path, launches, ctas, images, rows, in_shared_memory, tile, tile_rows, workspace_bytes, estimated_us = (
        registered._cuda_plan(x, keep, **options.arguments)
    )
    details = {
        "path": path,
        "images_in_flight": images,
        "ctas_per_image": ctas,
        "rows_per_cta": rows,
        "rows_in_shared_memory": in_shared_memory,
        "tile": tile,
        "tile_rows": tile_rows,
        "estimated_us": estimated_us,
    }
    return Plan("cuda", _joined(why, reason), launches, workspace_bytes, details)


def _plan_triton(x: Tensor, keep: int, options: Options, reason: str) -> Plan:
    from .triton_kernels import configs, launch

    device_class = configs.device_class(x.device)
    shape = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
    call = launch.compress(shape, keep, **options.arguments, device_class=device_class)
    why = f"x is on {x.device} ({device_class})"
    return Plan("triton", _joined(why, reason), len(call.launches), call.workspace_bytes)


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)
