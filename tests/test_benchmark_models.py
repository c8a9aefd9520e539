"""The computed values of the benchmarks: exponents, the cost model of growth, memory, the floor."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks import growth
from benchmarks.lib import ceilings, memory
from benchmarks.lib.baselines import published_bytes
from benchmarks.lib.cases import Case
from tests.rates import RATES


def test_exponents_of_power_laws() -> None:
    values = [1, 2, 4, 8]
    assert growth.exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)
    curve = growth.Curve("N", "float32", "kernel", [1, 2, 4, 8, 16], [1, 2, 4, 16, 64])
    assert [growth.exponent(*curve.part(half)) for half in (0, 1)] == pytest.approx([1, 2])


def test_what_varies() -> None:
    ranges: dict[str, list[growth.Point]] = {}
    for point in growth.points(smoke=False):
        ranges.setdefault(f"{point.axis} {point.case.dtype_name}", []).append(point)
    ends = {name: (points[0].value, points[-1].value) for name, points in ranges.items()}
    wanted = {"N": (64, 65536), "D": (64, 8192), "B": (1, 64), "keep": (10, 922), "basis": (1, 64)}
    assert ends == {f"{axis} {d}": limits for axis, limits in wanted.items() for d in ("float32", "bfloat16")}
    assert all(
        point.case.keep == round(0.1 * point.case.N)
        for points in ranges.values()
        for point in points
        if point.axis != "keep"
    )


def test_the_cost_model_by_hand() -> None:
    case = Case(2, 100, 10, 20, torch.float32, "inplace", basis=3)
    # An image has 4000 bytes, read once from memory and three times from the cache, where 20 rows and 44 bytes a token
    # are read and written too.
    moved = 2 * (4000 / 50 + (3 * 4000 + 800 + 4400) / 100)
    product = 2 * 2 * (80 * 20 + 3 * 100) * 10
    assert growth.predicted_ms(case, RATES) == pytest.approx((10e3 + moved + product / 200) / 1e6)
    # The cache size is that of the machine that measured. This cache is smaller than two images.
    uncached = 2 * (4000 + 3 * 4000 + 800 + 4400) / 50
    small = RATES | {"cache MiB": 7999 / 2**20}
    assert growth.predicted_ms(case, small) == pytest.approx((10e3 + uncached + product / 200) / 1e6)
    assert growth.predicted_bytes(case) == 2 * 20 * (40 + 8) + 2 * 4 * (100 * 4 + 20 * 10)
    case = dataclasses.replace(case, keep=90, dtype=torch.bfloat16)  # half of 90 targets, and a panel
    assert growth.predicted_bytes(case) == 2 * 90 * (20 + 8) + 2 * (4 * 100 * 4 + 10 * min(4 * 90, 2 * 90 + 4 * 81))


def test_what_the_model_predicts_for_large_and_small() -> None:
    """The exponents in the documents: the product dominates with many tokens, reading them with few kept."""

    def slope(cases: list[Case], values: list[int]) -> float:
        return growth.exponent(values, [growth.predicted_ms(case, RATES | {"call us": 0.0}) for case in cases])

    base = Case(1, 2**18, 1024, 2**14, torch.float32, "inplace")
    sizes = [2**n for n in range(18, 22)]
    assert slope([dataclasses.replace(base, N=n, keep=n // 10) for n in sizes], sizes) == pytest.approx(2, abs=0.05)
    assert slope([dataclasses.replace(base, N=n, keep=16) for n in sizes], sizes) == pytest.approx(1, abs=0.05)
    few, widths = dataclasses.replace(base, keep=16), [64, 256, 1024]
    assert slope([dataclasses.replace(few, D=d) for d in widths], widths) == pytest.approx(1, abs=0.1)


def test_memory_is_of_the_call_alone() -> None:
    """The published formulation needs its broadcast, the kernel its outputs and the used part of its workspace. The
    input does not count."""
    case = Case(1, 512, 1024, 64, torch.float32, "overwrite")
    broadcast = published_bytes(case.N, case.D, case.keep, case.basis, case.itemsize)
    assert broadcast < memory.measured_growth(case, "published") < 1.5 * broadcast
    ours = memory.measured_growth(case)
    outputs = memory.output_bytes(case)
    assert outputs < ours < 1.5 * (outputs + memory.workspace_bound(case)) + 2**20


# ---- the floor


def test_the_floor_by_hand() -> None:
    """X has 400 bytes and fits the cache of 1000: it is read once. The product has 2 * 15 * 5 * 5 operations."""
    rates = RATES | {"cache MiB": 1000 / 2**20}
    case = Case(B=1, N=20, D=5, keep=5, dtype=torch.float32, layout="inplace")
    assert ceilings.floor_ms([case], rates) == pytest.approx(400 / 50e6 + 750 / 1000e6)
    large = dataclasses.replace(case, D=50)  # 4000 bytes: 3000 again from memory, while the product takes less
    assert ceilings.floor_ms([large], rates) == pytest.approx((4000 + 3000) / 50e6)
    both = ceilings.floor_ms([case, large], rates)  # the smaller first pass, then all products, or all bytes
    assert both == pytest.approx(max((400 + 7000) / 50e6, 400 / 50e6 + 8250 / 1000e6))
    batch = dataclasses.replace(case, B=3, dtype=torch.bfloat16)
    assert ceilings.floor_ms([batch], rates) == pytest.approx(max(600 / 50e6, 200 / 50e6 + 3 * 750 / 1000e6))
    overwrite = dataclasses.replace(case, layout="overwrite", basis=2)  # 3 targets
    assert ceilings.floor_ms([overwrite], rates) == pytest.approx(400 / 50e6 + 450 / 1000e6)


def test_no_floor_without_its_rates() -> None:
    case = Case(1, 20, 5, 5, torch.float32, "inplace")
    assert ceilings.of_floor([case], 1.0, {"read GB/s": 1.0}) == "-"
    assert ceilings.of_floor([case], 2 * ceilings.floor_ms([case], RATES), RATES) == "50%"
