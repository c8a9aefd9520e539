"""Tests that need a GPU: graphs, streams, the compiler, real sizes; for each backend that runs on it.
`make gpu-check` runs this file if pytest is installed.

Without a GPU, `pytest -m gpu` runs the same tests on interpreted kernels with tiny sizes. This only finds mistakes in
the tests themselves. Tests that need a stream are skipped.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import apet_kernels
from apet_kernels.options import LAYOUTS
from benchmarks.lib import device as devices
from benchmarks.lib.paths import carried
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same, check
from tests.op_calls import flat

OPS = torch.ops.apet
DRY = not torch.cuda.is_available()
DEVICE = "cpu" if DRY else "cuda"
WHY_NOT = {name: apet_kernels.why_unavailable(name) for name in ("triton", "cuda")}
for _name in filter(None, os.environ.get("APET_GPU_BACKENDS", "").split(",")):  # usable where these tests were started
    if WHY_NOT[_name]:
        raise RuntimeError(f"these tests do not find {_name}: {WHY_NOT[_name]}")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(None not in WHY_NOT.values(), reason=str(WHY_NOT))]
needs_gpu = pytest.mark.skipif(DRY, reason="a dry run has no streams and no memory to count")


@pytest.fixture(params=[name for name, why in WHY_NOT.items() if why is None], autouse=True)
def gpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Yields the name of the backend, which the ops use on a GPU."""
    with contextlib.nullcontext() if DRY else apet_kernels.use_backend(request.param):
        yield request.param


@pytest.fixture
def clock() -> devices.Device:
    return devices.gpu(smoke=DRY)


def there(t: Tensor) -> Tensor:
    return t.to(DEVICE)


def features(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Clustered tokens on the device."""
    return there(tokens(*shape, dtype=dtype, kind="clustered", seed=seed))


def size(real: int, tiny: int) -> int:
    """Returns `real` on a GPU, and `tiny` in a dry run."""
    return tiny if DRY else real


def assert_all_same(got: Any, expected: Any, what: str) -> None:
    for n, (a, b) in enumerate(zip(flat(got), flat(expected), strict=True)):
        assert_same(a, b, f"{what}, result {n}")


# Name -> inputs (each seed gives other values of the same shapes), and the call. Every op and layout, both selections.
N, D, KEEP, BASIS = size(576, 12), size(1024, 16), size(64, 6), size(10, 3)
LENGTHS = [[size(n, m) for n, m in pairs] for pairs in (((300, 7), (1, 1), (576, 12)), ((500, 10), (7, 2), (370, 8)))]
KEEPS = [[size(k, m) for k, m in pairs] for pairs in (((20, 4), (1, 1), (79, 7)), ((40, 6), (3, 2), (57, 4)))]


def batch(seed: int) -> tuple[Tensor, ...]:
    return (features(3, N, D, dtype=torch.bfloat16 if not DRY else torch.float16, seed=seed),)


def ragged(seed: int) -> tuple[Tensor, ...]:
    return features(sum(LENGTHS[0]), D, seed=seed), there(offsets(LENGTHS[seed % 2])), there(offsets(KEEPS[seed % 2]))


def listed(seed: int) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    return *batch(seed), there(torch.randint(N, (3, KEEP), generator=make))


def packed(x: Tensor, lengths: Tensor, keeps: Tensor, **options: Any) -> Any:
    return OPS.compress_varlen(x, lengths, keeps, sum(KEEPS[0]), N, max(map(max, KEEPS)), BASIS, **options)


CALLS: dict[str, tuple[Callable[[int], tuple[Tensor, ...]], Callable[..., Any]]] = {
    **{name: (batch, lambda x, name=name: OPS.compress(x, KEEP, BASIS, layout=name)) for name in LAYOUTS},
    "qr": (batch, lambda x: OPS.compress(x, KEEP, BASIS, select="qr", start=2)),
    "rounds": (batch, lambda x: OPS.compress(x, KEEP, None, select="qr", refine=1)),
    "varlen": (ragged, packed),
    "varlen append": (ragged, lambda *inputs: packed(*inputs, layout="append")),
    "score": (batch, lambda x: OPS.score(x, BASIS)),
    "merge": (listed, lambda x, at: OPS.merge(x, at)),
    "merge targets": (listed, lambda x, at: OPS.merge(x, at, targets=at % 3 > 0)),
}


@pytest.fixture(params=list(CALLS))
def call(request: pytest.FixtureRequest) -> tuple[Callable[[int], tuple[Tensor, ...]], Callable[..., Any]]:
    return CALLS[request.param]


def test_the_dispatcher(gpu_backend):
    """The ops use the backend for a GPU tensor without a warning, with the bits of a call that names it."""
    if DRY:
        pytest.skip("a dry run has CPU tensors, which the dispatcher gives to the CPU kernel")
    (x,) = batch(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = OPS.compress(x, KEEP, BASIS)
    assert_all_same(got, apet_kernels.compress(x, KEEP, BASIS, backend=gpu_backend), "compress")
    plan = apet_kernels.plan(x, KEEP, BASIS)
    assert plan.backend == gpu_backend
    assert plan.launches <= BASIS + 4


def test_a_graph_replays_with_other_input(call, clock):
    """Values change, ragged lengths included, at the same addresses. The bits are those of the call alone."""
    inputs_of, function = call
    static = inputs_of(0)
    replay = clock.graphed(lambda: function(*static))
    for seed in range(1, 5):
        fresh = inputs_of(seed)
        for old, new in zip(static, fresh, strict=True):
            old.copy_(new)
        got = [t.clone() for t in flat(replay())]
        assert_all_same(got, function(*fresh), f"replay {seed}")


def test_compiled(call):
    """torch.compile(fullgraph=True), with an operation of torch before and after."""
    inputs_of, function = call
    torch.compiler.reset()  # the same `layer` with nine functions would be recompiled too often

    def layer(x: Tensor, *rest: Tensor) -> list[Tensor]:
        first, *others = flat(function(x * 1, *rest))
        return [first + 1, *others]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager" if DRY else "inductor")
    for seed in range(3):
        assert_all_same(compiled(*inputs_of(seed)), layer(*inputs_of(seed)), f"seed {seed}")


@needs_gpu
def test_compiled_into_graphs():
    """With mode="reduce-overhead" torch makes the CUDA graphs."""
    compiled = torch.compile(lambda x: OPS.compress(x * 1, KEEP, BASIS), fullgraph=True, mode="reduce-overhead")
    for seed in range(6):
        got = [t.clone() for t in compiled(*batch(seed))]
        assert_all_same(got, OPS.compress(*batch(seed), KEEP, BASIS), f"seed {seed}")


def test_dynamic_shapes_compile_once():
    counter = CompileCounterWithBackend("aot_eager" if DRY else "inductor")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(x: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        rows, indices = OPS.compress(x, keep, BASIS)
        return rows * 2, indices

    frames = []
    for B, n, keep in ((2, 20, 5), (3, size(576, 31), 9), (7, size(1369, 24), 13)):
        x = features(B, n, 48, seed=n)
        rows, indices = OPS.compress(x, keep, BASIS)
        assert_all_same(layer(x, keep), (rows * 2, indices), f"[{B}, {n}, 48]")
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


@needs_gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_streams_at_once(dtype):
    """Different inputs run on two streams, many times: neither reads the workspace of the other."""
    inputs = [features(4, n, 1024, dtype=dtype, seed=n) for n in (576, 577)]
    expected = [OPS.compress(x, KEEP, BASIS) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for _ in range(50):
        for x, stream, got in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                got.append(OPS.compress(x, KEEP, BASIS))
    torch.cuda.synchronize()
    for got, wanted in zip(results, expected, strict=True):
        for n, result in enumerate(got):
            assert_all_same(result, wanted, f"call {n}")


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Makes torch raise an error if it waits for the device."""
    if DRY:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_nothing_waits_for_the_device(call):
    inputs_of, function = call
    inputs = inputs_of(0)
    function(*inputs)  # compiles
    x, *rest = inputs
    apart = x.new_empty(*x.shape[:-1], D + 1)[..., :D].copy_(x)
    with no_synchronisation():
        function(*inputs)
        function(apart, *rest)  # unaligned rows are copied first


@needs_gpu
def test_the_test_above_can_fail():
    with no_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(3, device=DEVICE).nonzero()


# ---- the same bits everywhere, at real sizes

CHANNELS = [1024, 3584, 130, 1023] if not DRY else [20]


@pytest.mark.parametrize("dtype", DTYPES if not DRY else [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_alone_in_a_batch_packed_or_apart(gpu_backend, dtype, channels):
    B = size(64 if channels < 2000 else 16, 3)
    x = features(B, N, channels, dtype=dtype, seed=channels)

    def compress(t: Tensor) -> tuple[Tensor, Tensor]:
        return apet_kernels.compress(t, KEEP, BASIS, backend=gpu_backend)

    together = compress(x)
    residual, picks = apet_kernels.score(x, BASIS, backend=gpu_backend)
    for b in range(0, B, size(9, 2)):
        alone = compress(x[b : b + 1])
        assert_all_same(alone, [t[b : b + 1] for t in together], f"image {b} of {B} alone")
        for few in (2, 3):
            some = compress(x[b : b + few])
            assert_all_same([t[:1] for t in some], alone, f"image {b} among {few}")
        score = apet_kernels.score(x[b : b + 1], BASIS, backend=gpu_backend)
        assert_all_same(score, (residual[b : b + 1], picks[b : b + 1]), f"score of image {b}")

    lengths, keeps = [N] * B, [KEEP] * B
    rows, at = apet_kernels.compress_packed(x.flatten(0, 1), lengths, keeps, basis=BASIS, backend=gpu_backend)
    at = at.view(B, KEEP) - N * torch.arange(B, device=DEVICE)[:, None]
    assert_all_same((rows.view(together[0].shape), at), together, "packed")

    for shift in (1, 3, 8):  # rows may start at any element
        room = torch.full((B, N + 1, channels + 8), float("nan"), dtype=dtype, device=DEVICE)
        view = room[:, 1:, shift : shift + channels].copy_(x)
        assert_all_same(compress(view), together, f"{shift} elements in")
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert_all_same(compress(swapped), together, "tokens first")
    assert_all_same(compress(x), together, "again")


@pytest.mark.parametrize("dtype", DTYPES if not DRY else [torch.float32])
def test_ragged_images(gpu_backend, dtype):
    """Each image has the bits that it has alone: one of one token, one with all tokens kept, and the largest."""
    lengths = [1369, 1, 576, 64, 4096, 7] if not DRY else [9, 1, 5]
    keeps = [137, 1, 64, 64, 400, 5] if not DRY else [4, 1, 5]
    x = features(sum(lengths), D, dtype=dtype, seed=3)
    for layout in ("inplace", "append"):
        options = {"basis": 4, "layout": layout, "backend": gpu_backend}
        rows, at = apet_kernels.compress_packed(x, lengths, keeps, **options)
        sizes = [k + (4 if layout == "append" else 0) for k in keeps]
        images = zip(x.split(lengths), rows.split(sizes), at.split(sizes), strict=True)
        first = 0
        for n, (image, own, where) in enumerate(images):
            alone = apet_kernels.compress(image[None], keeps[n], **options)
            assert_all_same((own[None], where[None] - first), alone, f"image {n}, {layout}")
            first += lengths[n]


# ---- against float64, at sizes that take the shared tests too long

SIZES = [(1, 65536, 64, 600), (1, 16384, 1280, 1638), (2, 1500, 8192, 150), (16, 576, 1024, 64), (1, 1280, 3584, 384)]


@pytest.mark.parametrize("dtype", DTYPES if not DRY else [torch.float32])
@pytest.mark.parametrize(("B", "n", "channels", "keep"), SIZES if not DRY else [(1, 30, 20, 8)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_large(gpu_backend, dtype, B, n, channels, keep, layout):
    check(carried(DEVICE, gpu_backend), tokens(B, n, channels, dtype=dtype, seed=n), keep, BASIS, layout=layout)


@pytest.mark.parametrize("select", ["fps", "qr"])
def test_a_large_basis(gpu_backend, select):
    x = tokens(1, size(2000, 20), size(512, 24), seed=8)
    check(carried(DEVICE, gpu_backend), x, size(300, 12), size(64, 5), select=select)


@needs_gpu
def test_more_elements_than_32_bits_count():
    """The last image of a tensor of 3.8e9 elements has the bits that it has alone."""
    B, n, channels = 64, 16384, 3584
    if torch.cuda.mem_get_info()[0] < 20 * 2**30:
        pytest.skip(f"{torch.cuda.get_device_name()} has less than 20 GiB free")
    x = torch.empty(B, n, channels, dtype=torch.bfloat16, device=DEVICE)
    x[:] = features(1, n, channels, dtype=torch.bfloat16, seed=1)
    x[-1] = features(n, channels, dtype=torch.bfloat16, seed=2)
    together = OPS.compress(x, KEEP, BASIS)
    assert_all_same(OPS.compress(x[-1:].clone(), KEEP, BASIS), [t[-1:] for t in together], "the last image")
    rows, at = OPS.compress_varlen(
        x.flatten(0, 1), there(offsets([n] * B)), there(offsets([KEEP] * B)), B * KEEP, n, KEEP, BASIS
    )  # positions past 2^20, offsets past 2^31
    assert_same(rows[-KEEP:], together[0][-1])
    assert_same(at[-KEEP:] - (B - 1) * n, together[1][-1])


@needs_gpu
@pytest.mark.parametrize(("B", "n", "channels", "keep"), [(64, 576, 1024, 64), (1, 16384, 3584, 4915)])
def test_memory(B, n, channels, keep):
    """A call uses no more memory than its result and the workspace of plan(), which is within O(N (M + 1) + K D)."""
    x = features(B, n, channels, dtype=torch.bfloat16)
    OPS.compress(x, keep, BASIS)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    rows, at = OPS.compress(x, keep, BASIS)
    grown = torch.cuda.max_memory_allocated() - before - rows.nbytes - at.nbytes
    workspace = apet_kernels.plan(x, keep, BASIS).workspace_bytes
    slack = 32 * 512  # the allocator's blocks
    assert grown <= workspace + slack
    assert workspace <= 1.5 * 4 * B * (n * (BASIS + 1) + keep * channels) + 2**20


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_another_device_than_the_current_one():
    (x,) = batch(0)
    got = OPS.compress(x.to("cuda:1"), KEEP, BASIS)
    assert all(t.device.index == 1 for t in got)
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_all_same([t.to("cuda:0") for t in got], OPS.compress(x.to("cuda:0"), KEEP, BASIS), "cuda:1")
