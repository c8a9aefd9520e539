"""What the judge of tests/judge.py allows for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apet_kernels.reference import U
from tests.judge import similarity_error


def truncated(v: Tensor) -> Tensor:
    """float64 values cut to the 24 bits of a float32, towards zero."""
    mantissa, exponent = torch.frexp(v)
    return torch.ldexp((mantissa * 2**24).trunc() / 2**24, exponent)


@pytest.mark.parametrize("D", [1024, 3584, 8192])
@pytest.mark.parametrize("depth", [8, 16])
def test_tensor_cores_that_truncate(D, depth):
    """As they add `depth` products at once to a sum, and cut it: similar targets stay within what is allowed."""
    make = torch.Generator().manual_seed(1)
    centre = torch.randn(D, generator=make, dtype=torch.float64)
    tokens = (centre + 0.2 * torch.randn(257, D, generator=make, dtype=torch.float64)).half().double()
    x, targets = tokens[0], tokens[1:]
    total = torch.zeros(len(targets), dtype=torch.float64)
    for part in (targets * x).view(len(targets), -1, depth).sum(-1).T:
        total = truncated(total + part)
    error = (total - targets @ x) / targets.norm(dim=1) / x.norm()
    apart = float(error.max() - error.min())  # what can make the second best target the best
    assert float(-error.mean()) > D / depth / 16 * U, "it does not truncate"
    assert apart < 2 * similarity_error(D)
    if (D, depth) == (8192, 8):
        assert apart > 2 * similarity_error(1024), "what is allowed for short rows would do"
