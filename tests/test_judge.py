"""What the judge of tests/judge.py allows for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apet_kernels.reference import U
from tests.judge import SIMILARITY

CHAIN = 128  # products, as the kernels sum them


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
    parts = (targets * x).view(len(targets), -1, depth).sum(-1)  # [targets, D / depth]

    def error(chain: int) -> Tensor:
        """Of the similarities, with sums of `chain` products that are rounded where they are added to others."""
        total = torch.zeros(len(targets), dtype=torch.float64)
        for these in parts.split(chain // depth, dim=1):
            part = torch.zeros_like(total)
            for product in these.T:
                part = truncated(part + product)
            total = (total + part).float().double()
        return (total - targets @ x) / targets.norm(dim=1) / x.norm()

    in_one, in_chains = error(D), error(CHAIN)
    assert float(-in_one.mean()) > D / depth / 16 * U, "it does not truncate"
    assert float(-in_chains.mean()) < CHAIN / depth / 2 * U, "it grows with D"
    assert float(in_chains.max() - in_chains.min()) < SIMILARITY  # what can make the second best target the best
    if (D, depth) == (8192, 8):
        assert float(in_one.max() - in_one.min()) > 2 * SIMILARITY, "one chain would do"
