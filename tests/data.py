"""Tokens for tests: seeded, small, and similar to those of vision encoders."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tokens(*shape: int, dtype: torch.dtype = torch.float32, kind: str = "normal", seed: int = 0) -> Tensor:
    """Returns tokens [*shape] whose last dimension is D.

    "normal": independent. "clustered": eight centres, small noise, norms spread over a decade, as of encoders.
    "repeated": a third of the tokens are exact copies of others.
    """
    make = torch.Generator().manual_seed(seed)
    *lead, D = shape
    x = torch.randn(*shape, generator=make, dtype=torch.float64)
    if kind == "clustered":
        centres = torch.randn(8, D, generator=make, dtype=torch.float64)
        scale = 10 ** torch.rand(*lead, 1, generator=make, dtype=torch.float64)
        x = scale * (centres[torch.randint(8, lead, generator=make)] + 0.2 * x)
    if kind == "repeated":
        N = lead[-1]
        source = torch.randint(N, (N,), generator=make)
        x = torch.where(torch.rand(N, 1, generator=make) < 1 / 3, x[..., source, :], x)
    return x.to(dtype)


def rows(*values: list[float], dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns one image [1, N, D] with these values."""
    return torch.tensor([values], dtype=dtype)


def offsets(lengths: Sequence[int]) -> Tensor:
    """Returns cu_seqlens or cu_keep of the op: running sums [S + 1] int32."""
    return torch.tensor([0, *lengths]).cumsum(0).int()
