"""Every path of the CUDA kernels, forced, with every group, residency and tile: the same bits, compared with float64.

On a GPU (`pytest -m gpu`) the sizes are real. On the simulated GPU the same tests run with tiny sizes: a part of the
paths in `make test`, all of them in `make test-cuda`.
"""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

import apet_kernels
from apet_kernels import available, testing
from benchmarks.lib import paths
from benchmarks.lib.paths import Call
from tests.judge import assert_same
from tests.simt import binding, build
from tests.simt.call import A100, H100, RTX_3090, Device, use_device

WHY_NOT_SIMULATED = build.missing() or available.why_not_cpu()
simulated = pytest.mark.skipif(WHY_NOT_SIMULATED is not None, reason=str(WHY_NOT_SIMULATED))
WHY_NOT = apet_kernels.why_unavailable("cuda")


def compare(call: Call, ways: list[testing.CudaPath], device: str) -> set[str]:
    """Asserts that every possible path gives the bits of the first. Returns the paths that were compared."""
    expected, first, seen = None, None, set()
    for way in ways:
        if (got := paths.forced(call, way, device)) is None:
            continue
        seen.add(way.path)
        if expected is None:
            expected, first = got, way
        for n, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_same(a, b, f"result {n} of {call}: {way} against {first}")
    return seen


@pytest.mark.gpu
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("call", paths.calls(), ids=str)
def test_every_path(call):
    seen = compare(call, testing.cuda_paths(), "cuda")
    assert "cooperative" in seen
    if torch.cuda.get_device_capability()[0] >= 9:
        assert "cluster" in seen


@pytest.mark.gpu
@pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
@pytest.mark.parametrize("call", [call for call in paths.calls() if call.op in apet_kernels.ops.LAYOUTS], ids=str)
def test_against_float64(call):
    call.compared("cuda")


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Device:
    binding.stand_in(request.param, monkeypatch.setattr)
    return request.param


def pairs() -> list[Any]:
    """Returns pairs (call, device); one in ten of them runs in `make test`."""
    make, rare = random.Random(1), [pytest.mark.slow, pytest.mark.matrix]
    names = {"H100": H100, "A100": A100, "RTX-3090": RTX_3090}
    return [
        pytest.param(call, device, marks=[] if make.random() < 0.1 else rare, id=f"{name}-{call}".replace(" ", "-"))
        for call in paths.calls(tiny=True)
        for name, device in names.items()
    ]


@simulated
@pytest.mark.parametrize(("call", "device"), pairs(), indirect=["device"])
def test_every_path_simt(call, device, pytestconfig):
    """A few of the ways to run each path; all of them with --interpret 0."""
    make = random.Random(f"{call} {device}")
    ways = testing.cuda_paths()
    if pytestconfig.getoption("--interpret"):
        by_path = [[way for way in ways if way.path == name] for name in ("fused", "cluster", "cooperative")]
        ways = [way for few in by_path for way in (few[0], *make.sample(few[1:], 2))]
    seen = compare(call, ways, "cpu")
    assert seen == ({"cooperative"} if not device.largest_cluster else {"cluster", "cooperative", "fused"}) - (
        {"fused"} if call.op in ("score", "rounds") else set()
    )


@simulated
@pytest.mark.parametrize("device", [H100], indirect=True)
@pytest.mark.parametrize("layout", apet_kernels.ops.LAYOUTS)
def test_against_float64_simt(layout, device):
    Call(layout, torch.float16, paths.TINY[0]).compared("cpu")


# ---- the forced path


@simulated
@pytest.mark.parametrize("device", [H100], indirect=True)
class TestForcing:
    x = torch.zeros(2, 100, 64, dtype=torch.float16)

    def plan(self) -> apet_kernels.Plan:
        with apet_kernels.use_backend("cuda"):
            return apet_kernels.plan(self.x, 20, 10)

    def test_every_choice_arrives(self, device):
        for path, launches in (("fused", 1), ("cluster", 2), ("cooperative", 2)):
            with testing.use_cuda_path(testing.CudaPath(path, 3)):
                plan = self.plan()
                assert (plan.details["path"], plan.details["ctas_per_image"], plan.launches) == (path, 3, launches)
                assert "as asked for" in plan.why
        for resident in (0, 8):
            with testing.use_cuda_path(testing.CudaPath("cluster", 2, rows_in_shared_memory=resident)):
                assert self.plan().details["rows_in_shared_memory"] == resident
        for tile, rows in ((64, 64), (64, 128), (128, 96), (256, 128)):
            wanted = rows if tile == 64 else 0
            with testing.use_cuda_path(testing.CudaPath("cluster", tile=tile, tile_rows=wanted)):
                plan = self.plan()
                assert (plan.details["tile"], plan.details["tile_rows"]) == (tile, rows)

    def test_blocks_nest_and_end(self, device):
        before = self.plan()
        with testing.use_cuda_path(testing.CudaPath("cluster", 2)):
            with testing.use_cuda_path(testing.CudaPath("cooperative", 5)):
                assert self.plan().details["ctas_per_image"] == 5
            assert self.plan().details["ctas_per_image"] == 2
        assert self.plan() == before

    @pytest.mark.parametrize(
        ("way", "words"),
        [
            (testing.CudaPath("flat"), "path='flat' is none of best, fused, cluster, cooperative"),
            (testing.CudaPath(tile=96), "tile=96 is none of 64, 128, 256"),
            (testing.CudaPath(tile=128, tile_rows=64), "tile_rows=64 is none of 64, 128 with tile=64"),
            (testing.CudaPath(ctas_per_image=-1), "ctas_per_image=-1 must be at least 0"),
        ],
        ids=str,
    )
    def test_no_such_way(self, device, way, words):
        with pytest.raises(ValueError, match=words), testing.use_cuda_path(way):
            raise AssertionError("it was forced")

    def test_ways_that_the_device_does_not_have(self, device):
        # No clusters, and too little shared memory for the large tile.
        use_device(dataclasses.replace(RTX_3090, shared_per_block=64 << 10))
        for way in (testing.CudaPath("cluster", 2), testing.CudaPath("cooperative", tile=128)):
            with testing.use_cuda_path(way), pytest.raises(RuntimeError, match=f"path {way.path} .* cannot run here"):
                self.plan()


@pytest.mark.skipif(WHY_NOT is None, reason="the CUDA kernels run here")
def test_without_a_gpu_no_path_is_forced():
    with pytest.raises(ValueError, match="no CUDA path can be forced: "), testing.use_cuda_path(testing.CudaPath()):
        raise AssertionError("it was forced")
