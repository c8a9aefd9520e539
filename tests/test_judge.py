"""What the judge of tests/judge.py allows for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apet_kernels.reference import U
from tests.judge import similarity_error


def cut(v: Tensor, unit: Tensor) -> Tensor:
    """Multiples of 2^unit, towards zero."""
    return torch.ldexp(torch.ldexp(v, -unit).trunc(), unit)


def exponent(v: Tensor) -> Tensor:
    return torch.frexp(v)[1] - 1


@pytest.mark.parametrize("D", [1024, 2048, 3584, 8192])
@pytest.mark.parametrize("depth", [8, 16])
def test_tensor_cores_that_truncate(D, depth):
    """As they add `depth` products at once to a sum: all terms aligned to the largest and cut to 25 bits, the new sum
    to 24. Similar targets stay within what is allowed, at every noise."""
    for noise in (0.2, 1e-3):
        make = torch.Generator().manual_seed(1)
        centre = torch.randn(D, generator=make, dtype=torch.float64)
        tokens = (centre + noise * torch.randn(257, D, generator=make, dtype=torch.float64)).half().double()
        x, targets = tokens[0], tokens[1:]
        total = torch.zeros(len(targets), dtype=torch.float64)
        for part in (targets * x).view(len(targets), -1, depth).unbind(1):
            terms = torch.cat([total[:, None], part], 1)
            total = cut(terms, exponent(terms.abs().amax(1, keepdim=True)) - 24).sum(1)
            total = cut(total, exponent(total) - 23)
        error = (total - targets @ x) / targets.norm(dim=1) / x.norm()
        apart = float(error.max() - error.min())  # what can make the second best target the best
        assert float(-error.mean()) > D / depth / 2 * U, "it does not truncate"
        assert apart < 2 * similarity_error(D)
        if (D, depth) == (8192, 8):
            assert apart > 2 * similarity_error(1024), "what is allowed for short rows would do"
