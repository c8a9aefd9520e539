"""The simulator of tests/simt: it computes the results of a GPU, and each of its detectors reports its fault."""

from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.simt import build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

SEEDS = range(7)  # seed 0, and two of each of the other schedules
ALL = torch.arange(256)


@pytest.fixture(scope="module")
def lib() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.shared("selftest.cu")))
    library.selftest.restype = ctypes.c_char_p
    return library


def run(lib: ctypes.CDLL, name: str, seed: int, data: torch.Tensor | None = None) -> tuple[str | None, torch.Tensor]:
    """Runs a case; returns its fault, if any, and its data [1024] int32 afterwards."""
    data = torch.zeros(1024, dtype=torch.int32) if data is None else data
    lib.simt_use_seed(seed)
    fault = lib.selftest(name.encode(), ctypes.c_void_p(data.data_ptr()))
    return fault and fault.decode(), data


def warps(t: torch.Tensor) -> torch.Tensor:
    """Returns the result of the kernel `warps` for threads t [32 n], by the definitions of CUDA's programming guide."""
    lane = t % 32

    def from_lane(source: torch.Tensor) -> torch.Tensor:
        return t - lane + source

    v = from_lane(torch.full_like(t, 5))
    v = 3 * v + from_lane(lane // 8 * 8 + (lane + 1) % 8)
    v = 3 * v + from_lane(lane ^ 9)
    v = 3 * v + from_lane(torch.where(lane >= 3, lane - 3, lane))
    v = 3 * v + from_lane(torch.where(lane % 16 + 4 < 16, lane + 4, lane))
    ballot = sum(1 << i for i in range(0, 32, 5))
    v = 3 * v + torch.tensor([ballot >> (i % 7) for i in lane.tolist()])
    v = 3 * v + torch.tensor([sum(1 << k for k in range(32) if k // 3 == i // 3) for i in lane.tolist()])
    rows = t.view(-1, 32)
    reduced = rows.sum(1) + (rows ^ 21).amax(1) + (-rows).amin(1)
    v = 3 * v + reduced.repeat_interleave(32)
    v = 3 * v + 2 * 1 + 0
    v = (v + 2**31) % 2**32 - 2**31  # as int
    partner = v.view(-1, 32)[:, ALL[:32] ^ 1].reshape(-1)
    return torch.where(lane < 12, 3 * v + partner, v)


@pytest.mark.parametrize("seed", SEEDS)
class TestComputes:
    def test_barriers(self, lib, seed):
        fault, data = run(lib, "barriers", seed)
        assert fault is None
        assert (data[:512] == 255 * 128 + 86 + 1000).all()

    def test_warps(self, lib, seed):
        fault, data = run(lib, "warps", seed)
        assert fault is None
        expected = warps(torch.arange(96)).int()
        assert data[:192].tolist() == expected.repeat(2).tolist()

    def test_clusters(self, lib, seed):
        fault, data = run(lib, "clusters", seed)
        assert fault is None
        blocks = ALL[:8].repeat_interleave(64)
        assert data[:512].tolist() == (100 * blocks + 10 + 10000 * (blocks % 4)).tolist()

    def test_grids(self, lib, seed):
        fault, data = run(lib, "grids", seed)
        assert fault is None
        expected = torch.arange(192)
        for _ in range(4):
            expected = expected + expected.roll(-1)
        assert data[:192].tolist() == expected.tolist()

    def test_tickets(self, lib, seed):
        fault, data = run(lib, "tickets", seed)
        assert fault is None
        assert data[10] == sum(range(10, 18))

    def test_copies(self, lib, seed):
        data = torch.arange(1024, dtype=torch.int32) ** 2
        fault, data = run(lib, "copies", seed, data)
        assert fault is None
        rows = (torch.arange(512) ** 2).view(2, 64, 4).sum(2)
        rows[:, 3] = 0  # not valid: zeros
        assert data[512:576].tolist() == (rows[0] - rows[1]).flip(0).tolist()

    @pytest.mark.parametrize(("name", "dtype"), [("half", torch.float16), ("bfloat16", torch.bfloat16)])
    def test_matrix_instructions(self, lib, seed, name, dtype):
        """The numbers are small integers, so that no sum is rounded and only the fragment maps matter."""
        make = torch.Generator().manual_seed(seed)
        a, b = (torch.randint(-9, 10, (n, 16), generator=make).to(dtype) for n in (16, 8))
        data = torch.zeros(1024, dtype=torch.int32)
        data[:192] = torch.cat([a, b]).view(-1).view(torch.int32)
        fault, data = run(lib, f"multiply_{name}", seed, data)
        assert fault is None
        assert data[192:320].view(torch.float32).view(16, 8).equal(a.float() @ b.float().T)

    def test_overlapping_launches(self, lib, seed):
        fault, data = run(lib, "overlap", seed)
        assert fault is None
        assert (data[64:128] == 7).all()


def test_a_device_full_of_threads(lib):
    """Each has a stack, and the process still needs some of the 65530 mappings that Linux allows by default."""
    maps = Path("/proc/self/maps")
    before = len(maps.read_text().splitlines())
    fault, data = run(lib, "full_device", 0)
    assert fault is None
    assert (data == 32).all()
    assert len(maps.read_text().splitlines()) - before < 10000


@pytest.mark.parametrize("bits", range(0, 2**16, 2**13))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions(lib, bits, dtype):
    """Every number of 16 bits to float32 and back, and float32 around and between them."""
    numbers = torch.arange(bits, bits + 2**13, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = torch.empty(2**13, dtype=torch.float32)
    name = {torch.float16: "half", torch.bfloat16: "bfloat16"}[dtype]
    convert = getattr(lib, f"selftest_{name}")
    convert(ctypes.c_void_p(numbers.data_ptr()), ctypes.c_void_p(wide.data_ptr()), 2**13, 0)
    finite = ~numbers.isnan()
    assert wide[finite].view(torch.int32).equal(numbers.float()[finite].view(torch.int32))
    assert wide[~finite].isnan().all()
    for offset in (-1, 0, 1, 0x7FF, 0x800, 0x801, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001):
        near = (numbers.float().view(torch.int32) + offset).view(torch.float32)
        narrow = torch.empty(2**13, dtype=dtype)
        convert(ctypes.c_void_p(narrow.data_ptr()), ctypes.c_void_p(near.data_ptr()), 2**13, 1)
        expected, real = near.to(dtype), ~near.isnan()
        assert narrow[real].view(torch.int16).equal(expected[real].view(torch.int16)), offset
        assert narrow[~real].isnan().all()


AT = r"selftest_faults\.h:\d+"
# Case -> the message, under every seed.
FAULTS = {
    "skipped_barrier": rf"divergent barrier: thread \d+ of block 0 (exits, others wait at|waits at) {AT}",
    "two_barriers": rf"divergent barrier: thread \d+ of block 0 waits at {AT}, but thread \d+",
    "early_exit": r"divergent barrier: thread \d+ of block 0 (exits|waits at .* but \d+ threads .* have exited)",
    "mask_without_caller": r"calls __shfl_sync with mask 0x0000ffff, which leaves out its lane",
    "mask_too_wide": rf"deadlock: .* waits in __shfl_xor_sync.* waits in __syncthreads at {AT}",
    "absent_source": r"shuffles from lane 20, which is not in the mask or has exited",
    "different_primitives": r"calls \S+ with mask 0xffffffff, but other lanes wait in \S+ with it",
    "spin_forever": r"deadlock: thread \d+ of block \d waits in wait_acquire",
    "peer_has_not_begun": r"block \d maps the shared memory of block \d, which has not begun",
    "grid_barrier": r"grid.sync in a launch that is not cooperative",
    "misaligned_copy": r"cp.async in block 0 at a shared address that is not a multiple of 16",
    "copy_outside": r"cp.async of 16 bytes at an address that is not in the shared memory of block 0",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", FAULTS)
def test_faults(lib, name, seed):
    fault, _ = run(lib, name, seed)
    assert fault, "nothing was found"
    assert re.search(FAULTS[name], fault), fault
    assert run(lib, "barriers", seed)[0] is None, "the fault outlives its launch"


# At least one schedule must show these.
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wait_for_next_block", r"deadlock: .* blocks have not started"),
        ("peer_has_exited", r"maps the shared memory of block 1, which has exited"),
        ("copy_without_wait", r"exits with 1 asynchronous copies that it has not waited for"),
    ],
)
def test_faults_of_some_schedules(lib, name, message):
    found = [fault for seed in range(12) if (fault := run(lib, name, seed)[0])]
    assert found, "nothing was found"
    assert all(re.search(message, fault) for fault in found), found


def test_a_copy_lands_only_at_its_wait(lib):
    data = torch.arange(1024, dtype=torch.int32) ** 2
    right = run(lib, "copies", 0, data.clone())[1]
    wrong = [run(lib, "copy_wait_too_short", seed, data.clone())[1] for seed in SEEDS]
    assert all(not w[512:576].equal(right[512:576]) for w in wrong)


def test_a_launch_that_does_not_wait_reads_too_early(lib):
    assert any((run(lib, "overlap_without_wait", seed)[1][64:128] != 7).any() for seed in SEEDS)


def test_shared_memory_starts_as_nan(lib):
    assert (run(lib, "unwritten_shared", 0)[1][:32] == -1).all()


def test_a_device_without_clusters_rejects_them(lib):
    try:
        lib.simt_use_device(80, 8, 163 << 10, 164 << 10, 0)
        assert run(lib, "clusters", 0)[0] == "cudaErrorNotSupported"
    finally:
        lib.simt_use_device(90, 16, 227 << 10, 228 << 10, 16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers(sanitizer, seed):
    """Both sanitizers report nothing for right kernels, and the line of wrong ones."""
    program = build.program("selftest.cu", [], sanitizer)

    def report(name: str) -> str:
        done = subprocess.run([program, name, str(seed)], capture_output=True, text=True, timeout=60)
        return done.stdout + done.stderr

    for name in ("barriers", "warps", "clusters", "grids", "tickets", "copies", "multiply_half", "overlap"):
        assert report(name) == "no fault\n"
    wrong = {
        "address": ["past_the_end", "past_shared"],
        "thread": ["missing_barrier", "missing_syncwarp", "copy_without_barrier", "plain_flag", "overlap_without_wait"],
    }[sanitizer]
    summary = {"address": "AddressSanitizer: heap-buffer-overflow", "thread": "ThreadSanitizer: data race"}[sanitizer]
    for name in wrong:
        assert re.search(rf"SUMMARY: {summary} \S*(selftest_\w+|simt_ptx).h:\d+", report(name)), name
