"""Chooses the backend for tensors on a GPU. Where CUDA and Triton kernels both run, the lower estimate decides.

The choice follows from the device, D and the dtype alone. It cannot follow from B, N or K: a packed call knows only the
largest N and K of its images, and an image must have the same bits alone, in a batch and in any packing, so all these
calls must be made by one backend. It cannot follow from the options either: `merge`, which has none, gives the bits of
`compress`. docs/gpu.md ("CUDA or Triton") has the estimates.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from . import available, ops
from .options import PAPER, Backend
from .registry import registered

# In the error of csrc/cuda/plan.cu where no path has room. Every other error of an estimate is raised.
NO_PATH = "cannot run here: this device places"

# N and K of the images by which the backends are compared: a small, a middle and a large one, each with equal weight.
IMAGES = ((576, 64), (1024, 307), (4096, 1229))


def gpu_backend(x: Tensor) -> tuple[Backend, str]:
    """Returns the backend for a tensor on a GPU, and the reason for it; "cpu": none has kernels, and x is copied."""
    why_cuda, why_triton = available.why_not_cuda(x.device), available.why_not_triton_on(x.device)
    if why_cuda is not None:
        return ("cpu" if why_triton else "triton"), "; ".join(why for why in (why_cuda, why_triton) if why)
    # A wrong x is left to the check of the op.
    if why_triton is not None or x.dim() < 2 or x.shape[-1] < 1 or x.dtype not in ops.DTYPES:
        return "cuda", why_triton or ""
    return lower_estimate(x.device, x.shape[-1], x.dtype)


@functools.cache
def lower_estimate(device: torch.device, D: int, dtype: torch.dtype) -> tuple[Backend, str]:
    """Returns the backend whose estimates over `IMAGES` have the lower geometric mean, and how they compare."""
    try:
        ratios = [triton / cuda for cuda, triton in estimates(device, D, dtype)]
    except RuntimeError as error:
        if NO_PATH not in str(error):
            raise
        return "triton", f"the CUDA kernels do not run with D={D}: {error}"
    ratio = math.prod(ratios) ** (1 / len(ratios))
    name: Backend = "triton" if ratio < 1 else "cuda"
    return name, f"by estimate, Triton takes {ratio:.2f} times as long as CUDA with D={D}"


def estimates(device: torch.device, D: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """Returns the estimates in us of one image by CUDA and by Triton, for each of `IMAGES`."""
    from .triton_kernels import configs, estimate

    gpu = torch.cuda.get_device_properties(device)
    like = torch.empty(0, D, dtype=dtype, device=device)
    figures = dict(zip(ops.FIGURES, registered._cuda_figures(like, 10 * gpu.major + gpu.minor), strict=True))
    tiles = configs.tiles(configs.device_class(device), D, dtype.itemsize)
    M = PAPER["basis"]  # as in the estimate of the CUDA kernels
    return [
        (
            registered._cuda_estimate(like, N, K),
            estimate.estimate(figures, gpu.multi_processor_count, tiles, N, D, K, M, dtype.itemsize).us,
        )
        for N, K in IMAGES
    ]
