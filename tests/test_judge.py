"""Tests of the errors that tests/judge.py allows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from apet_kernels.reference import U
from tests.judge import SIMILARITY

CHAIN = 128  # products, as the kernels sum them


def cut(v: Tensor, unit: Tensor) -> Tensor:
    """Rounds to multiples of 2^unit, towards zero."""
    return torch.ldexp(torch.ldexp(v, -unit).trunc(), unit)


def exponent(v: Tensor) -> Tensor:
    return torch.frexp(v)[1] - 1


def added(products: Tensor, chain: int) -> Tensor:
    """products [T, D / depth, depth] float64, added as tensor cores do: `depth` at once to a sum, all terms aligned to
    the largest and cut to 25 bits, the new sum to 24. Sums of `chain` products are rounded where they are added."""
    total = torch.zeros(len(products), dtype=torch.float64)
    for these in products.split(chain // products.shape[2], dim=1):
        part = torch.zeros_like(total)
        for few in these.unbind(1):
            terms = torch.cat([part[:, None], few], 1)
            part = cut(terms, exponent(terms.abs().amax(1, keepdim=True)) - 24).sum(1)
            part = cut(part, exponent(part) - 23)
        total = (total + part).float().double()
    return total


@pytest.mark.parametrize("D", [1024, 2048, 3584, 8192])
@pytest.mark.parametrize("depth", [8, 16])
def test_tensor_cores_that_truncate(D, depth):
    """Similar targets stay within the allowed error, at every noise, since the kernels add in chains."""
    for noise in (0.2, 1e-3):
        make = torch.Generator().manual_seed(1)
        centre = torch.randn(D, generator=make, dtype=torch.float64)
        tokens = (centre + noise * torch.randn(257, D, generator=make, dtype=torch.float64)).half().double()
        x, targets = tokens[0], tokens[1:]
        products = (targets * x).view(len(targets), -1, depth)
        in_one, in_chains = (
            (added(products, chain) - targets @ x) / targets.norm(dim=1) / x.norm() for chain in (D, CHAIN)
        )
        assert float(-in_one.mean()) > D / depth / 2 * U, "it does not truncate"
        assert float(-in_chains.mean()) < 24 * U, "it grows with D"
        assert float(in_chains.max() - in_chains.min()) < SIMILARITY  # a larger difference could exchange two targets
        if (D, depth) == (8192, 8):
            assert float(in_one.max() - in_one.min()) > 2 * SIMILARITY, "one chain would do"
