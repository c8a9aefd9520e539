"""The CUDA sources, run on the CPU: the same bits in every way of running them, and reports of sanitizers.

The shared tests check accuracy, layouts, hostile input and invariance under batching, packing and alignment. They also
run on the backend `cuda-simt`, which varies device, path, group size and schedule from call to call.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from apet_kernels.options import LAYOUTS
from tests import judge, rule
from tests.data import DTYPES, tokens
from tests.judge import assert_same
from tests.simt import bugs, build, call
from tests.simt.call import A100, H100, RTX_3090, RTX_5090, Case, Device, How, NoPath

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

# B, N, D, keep, basis. The cases: rows that are not whole 16-byte words, rows that are, and several steps of s5 with a
# last tile that is not full.
SHAPES = [(2, 70, 45, 20, 6), (1, 133, 64, 60, 10), (3, 41, 200, 17, 5)]
SMALL_SHARED = Device(90, 8, 64 << 10, 100 << 10, 8)
# (columns, rows) of a tile: bytes of shared memory that s5_merge needs, at least
TILES = {(0, 0): 0, (64, 64): 0, (64, 128): 83 << 10, (128, 0): 96 << 10, (256, 0): 207 << 10}


def cases(dtype: torch.dtype, layout: str, shape: int) -> dict[str, Callable[[], Case]]:
    """Returns every op once, and compress also in rounds and with medoid steps; layouts and picking vary with the
    shape."""
    B, N, D, keep, basis = SHAPES[shape % 3]
    x = tokens(B, N, D, dtype=dtype, kind=("clustered", "repeated", "normal")[shape % 3], seed=shape)
    packed = x.reshape(-1, D)
    choose = {"select": ("fps", "qr")[shape % 2], "start": (-1, 7)[shape // 2 % 2]}
    lengths = torch.tensor([0, N // 3, 5, 1, packed.shape[0] - N // 3 - 8, 2])
    keeps = torch.tensor([0, N // 5, 5, 1, keep, 1])
    cu, cu_keep = lengths.cumsum(0).int(), keeps.cumsum(0).int()
    sizes = (int(keeps.sum()), int(lengths.max()), int(keeps.max()), basis)
    blend = 0.5 if layout == "overwrite" else 1.0
    rows = torch.randint(N, (B, keep), generator=torch.Generator().manual_seed(shape))
    rounds = {"select": "qr", "start": choose["start"], "refine": shape % 3}
    sizes_of_rounds = (*sizes[:3], None)
    return {
        "compress": lambda: call.compress_case(x, keep, basis, layout=layout, blend=blend, **choose),
        "compress_varlen": lambda: call.compress_varlen_case(packed, cu, cu_keep, *sizes, layout=layout, **choose),
        "score": lambda: call.score_case(x, basis, **choose),
        "merge": lambda: call.merge_case(x, rows, targets=rows % 3 > 0),
        "compress rounds": lambda: call.compress_case(x, keep, None, **rounds),
        "compress_varlen rounds": lambda: call.compress_varlen_case(packed, cu, cu_keep, *sizes_of_rounds, **rounds),
        "compress medoids": lambda: call.compress_case(x, keep, keep, **choose, refine=1),
    }


def results(case: Case, how: How) -> dict[str, Tensor]:
    call.run(case, how)
    return case.outputs


def drawn(seed: int) -> How:
    """Draws a device, a path on it, a division of the images, and a schedule."""
    make = random.Random(seed)
    device = make.choice([H100, SMALL_SHARED, A100, RTX_3090, RTX_5090])
    path = make.choice(["fused", "cluster", "cooperative"] if device.largest_cluster else ["cooperative"])
    most = device.multiprocessors if path == "cooperative" else device.largest_cluster
    ctas, resident = make.randint(1, most), make.choice([-1, -1, 0, 4, 8])
    tile, rows = make.choice([tile for tile, needs in TILES.items() if device.shared_per_block > needs])
    return How(device, path, ctas, resident, tile, make.randint(0, 999), rows)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_problem_alone_determines_the_bits(dtype, layout, pytestconfig):
    """Device, path, group size, resident rows, tile and schedule are drawn at random; more with --interpret 0."""
    number = DTYPES.index(dtype) * 3 + LAYOUTS.index(layout)
    everyday = pytestconfig.getoption("--interpret")
    ran = 0
    for shape in [number] if everyday else range(number, number + 3):
        for name, case in cases(dtype, layout, shape).items():
            expected = results(case(), How(path="cluster", ctas_per_image=1))
            for n in range(3 if everyday else 60):
                how = drawn(1000 * number + n)
                try:
                    got = results(case(), how)
                except NoPath:
                    continue
                ran += 1
                for output, value in expected.items():
                    assert_same(got[output], value, f"{output} of {name}, {how}")
    assert ran >= (8 if everyday else 400), "hardly anything was compared"


@pytest.mark.parametrize("path", ["fused", "cluster", "cooperative"])
def test_weights_are_ignored_where_an_op_has_none(path):
    """As the header says; score would multiply its residuals by them."""
    x = tokens(2, 70, 45)
    weights = torch.full((2, 70), float("nan"))
    for case in (call.score_case(x, 6), call.merge_case(x, torch.arange(9).repeat(2, 1))):
        how = How(path="cluster" if path == "fused" else path)
        expected = {name: t.clone() for name, t in results(case, how).items()}
        case.inputs["weights"] = weights
        for output, value in results(case, how).items():
            assert_same(value, expected[output], output)


@pytest.mark.parametrize(("tokens_", "keep", "too_large"), [(2**20, 4, False), (2**31 - 65537, 2**30, True)])
def test_sizes_beyond_the_addresses_are_an_error(tokens_, keep, too_large):
    """Of the workspace, and of the tiles, which are counted in 32 bits."""
    for basis in (None, 5):
        problem = call.compress_case(tokens(1, 30, 8), 3, basis).problem
        problem.tokens, problem.keep = tokens_, keep
        if too_large:
            with pytest.raises(call.Fault, match="each must be at most 2147483647"):
                call.plan(problem, How())
        else:
            assert call.plan(problem, How()).workspace_bytes > 4 * tokens_


@pytest.mark.parametrize(
    ("device", "path", "launches"),
    [(H100, "fused", 1), (H100, "cluster", 2), (H100, "cooperative", 2), (A100, "best", 2)],
)
def test_launches(device, path, launches):
    case = call.compress_case(tokens(2, 60, 32, dtype=torch.float16), 12, 5)
    how = How(device, path)
    lines = call.run(case, how)
    assert len(lines) == call.plan(case.problem, how).launches == launches
    assert ("clusters of" in lines[0]) == (path in ("fused", "cluster"))
    assert ("cooperative" in lines[0]) == (path == "cooperative" or device is A100)
    # The second kernel may overlap the end of the first on architectures that allow it.
    assert [("overlapping" in line) for line in lines[1:]] == [device is H100] * (launches - 1)
    for keep, basis, refine in ((20, None, 0), (20, None, 3), (12, 12, 3)):
        case = call.compress_case(tokens(2, 60, 32), keep, basis, select="qr", refine=refine)
        how = How(device, "best" if path == "fused" else path)
        lines = call.run(case, how)
        assert len(lines) == call.plan(case.problem, how).launches == 2 + (refine > 0)
        if path == "fused":
            with pytest.raises(NoPath, match="path fused"):
                call.plan(case.problem, How(device, path))
    score = call.score_case(tokens(2, 60, 32), 5)
    assert len(call.run(score, How(device))) == call.plan(score.problem, How(device)).launches == 1


@pytest.fixture
def refuse() -> Iterator[Callable[[int, int], None]]:
    """Returns a function that makes the driver refuse overlapping launches, or clusters of more than 8."""
    yield call.load().simt_refuse
    call.load().simt_refuse(0, 0)


def test_a_driver_that_refuses_overlapping_launches(refuse):
    """The launch is repeated as an ordinary one, and later calls do not ask again."""
    case, how = call.compress_case(tokens(2, 60, 32, dtype=torch.float16), 12, 5), How(Device(90, 15), "cluster", 2)
    expected = {name: t.clone() for name, t in results(case, how).items()}
    for refused in (1, 0):
        refuse(refused, 0)
        assert ["overlapping" in line for line in call.run(case, how)] == [False, False]
        for name, value in expected.items():
            assert_same(case.outputs[name], value, name)
    assert "overlapping" in call.run(case, How(Device(90, 14), "cluster", 2))[1]


def test_a_driver_that_refuses_large_clusters(refuse):
    """It has those of up to 8 CTAs."""
    refuse(0, 1)
    problem, device = call.compress_case(tokens(2, 60, 32), 12, 5).problem, Device(90, 13)
    for path in ("cluster", "fused"):
        assert call.plan(problem, How(device, path, 8)).ctas_per_image == 8
        with pytest.raises(NoPath, match="with 9 CTAs an image"):
            call.plan(problem, How(device, path, 9))


def test_two_streams_at_once():
    """Two calls on one device, whose blocks run in mixed order."""
    x, y = tokens(2, 50, 40, dtype=torch.float16, seed=1), tokens(3, 44, 64, dtype=torch.float16, seed=2)
    for seed in range(4):
        a, b = call.compress_case(x, 13, 6), call.compress_case(y, 30, 4, layout="append")
        alone = [{k: t.clone() for k, t in results(c, How()).items()} for c in (a, b)]
        for case in (a, b):
            for t in case.outputs.values():
                t.zero_()
        ways = [How(path=path, ctas_per_image=2, seed=seed) for path in ("cluster", "fused")]
        started = [call.start(c, how, stream) for c, how, stream in zip((a, b), ways, (1, 2), strict=True)]
        assert len(call.finish(*started, seed=seed)) == 3
        for case, expected in zip((a, b), alone, strict=True):
            for name, value in expected.items():
                assert_same(case.outputs[name], value, name)


@pytest.mark.parametrize(
    ("N", "D", "keep", "basis", "way", "lacks"),
    [
        # y and distances in the workspace: 67 numbers a token.
        (300, 24, 40, 64, How(SMALL_SHARED, "cluster", ctas_per_image=1, seed=1), "state_shared"),
        (300, 24, 40, 64, How(SMALL_SHARED, "cooperative", ctas_per_image=1, seed=2), "state_shared"),
        # A row of 88000 bytes: the basis token is read from L2 as well.
        (6, 44000, 3, 2, How(SMALL_SHARED, "cluster", ctas_per_image=2, seed=1), "basis_shared"),
        (6, 44000, 3, 2, How(SMALL_SHARED, "cooperative", ctas_per_image=3, seed=2), "basis_shared"),
    ],
)
@pytest.mark.parametrize("shift", [0, 1])
def test_what_does_not_fit_shared_memory(N, D, keep, basis, way, lacks, shift):
    """The bits are those of a device on which everything fits; also with rows that start one element further on."""
    make = tokens(1, N, D, dtype=torch.bfloat16, kind="clustered", seed=4)
    room = torch.zeros(1, N, D + 8, dtype=torch.bfloat16)
    x = room[:, :, shift : shift + D].copy_(make)
    case, roomy = (call.compress_case(t, keep, basis) for t in (x, make))
    assert getattr(call.plan(case.problem, way), lacks) == 0
    wide = How(path="cluster", ctas_per_image=4)
    assert getattr(call.plan(roomy.problem, wide), lacks) == 1
    got, expected = results(case, way), results(roomy, wide)
    for name, value in expected.items():
        assert_same(got[name], value, name)


@pytest.mark.parametrize("picks", [32, pytest.param(5, marks=pytest.mark.slow)])
def test_updates_of_gram_change_no_bit(tmp_path, picks):
    """Rounds of 35 picks have one update, by any group; with updates after every 5 picks the bits are the same."""
    case = call.compress_case(tokens(1, 160, 72, dtype=torch.float16, kind="clustered", seed=6), 140, None, select="qr")
    expected = {name: t.clone() for name, t in results(case, How(path="cluster", ctas_per_image=1)).items()}
    ways = How(path="cluster", ctas_per_image=4, seed=1), How(A100, "cooperative", 3, seed=2)
    program = None
    if picks != 32:
        more = bugs.Bug("", "s1_pool.cuh", [(r"kGramPicks = 32", f"kGramPicks = {picks}")], ways[0], "")
        program = build.program("driver.cpp", build.kernels(bugs.inject(more, tmp_path), only="float16"))
    for how in ways:
        for t in case.outputs.values():
            t.zero_()
        if program:
            assert call.run_in_program(case, how, program) == ""
        else:
            call.run(case, how)
        for name, value in expected.items():
            assert_same(case.outputs[name], value, f"{name}, {how}")


# ---- as compiled for GPUs whose float64 is slow


@pytest.fixture
def two_floats() -> Iterator[None]:
    with call.slow_float64():
        yield


# B, N, D, keep, basis: rows of at most 32 chunks, which are summed in Wide, and longer ones.
@pytest.mark.parametrize("shape", [(2, 45, 13, 16, 6), (1, 70, 264, 30, 8), (1, 40, 520, 13, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_floats_pass_the_checks_of_float64(dtype, shape, two_floats):
    *size, keep, basis = shape
    for number, (layout, select) in enumerate(itertools.product(LAYOUTS, ("fps", "qr"))):
        kind, ridge = ("clustered", "repeated", "normal")[number % 3], (1e-5, 0.0, 0.1)[number % 3]
        x = tokens(*size, dtype=dtype, kind=kind, seed=number)
        judge.check(call.Functions(), x, keep, basis, layout=layout, select=select, ridge=ridge)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_floats_pick_the_same_in_rounds(dtype, two_floats):
    x = tokens(1, 150, 130, dtype=dtype, seed=5)
    expected, sure = rule.kept(x[0], 64)
    assert sure
    got = call.Functions().compress(x, 64, None, select="qr")[1]
    assert got[0].tolist() == expected


@pytest.mark.parametrize("M", [1, 10, 64])
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_floats_lose_no_digit_of_float32(dtype, M):
    """Residuals and picks are those with float64, but for the last rounding to float32 of a few."""
    x = tokens(1, 90, 72, dtype=dtype, kind="clustered", seed=M)
    for options in ({}, {"select": "qr", "ridge": 0.0}, {"start": 4, "ridge": 0.5}):
        case = call.score_case(x, M, **options)
        e_sq, picks = (t.clone() for t in results(case, How()).values())
        with call.slow_float64():
            found = results(case, How())
        assert_same(found["basis_indices"], picks)
        norm_sq = x[0].double().square().sum(1)
        error = (found["residual"][0].double() - e_sq[0].double()).abs() / norm_sq
        assert error.max() <= 2**-23, "more than a unit in the last place of ||x||^2"
        assert (found["residual"] == e_sq).float().mean() > 0.8


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_floats_give_the_same_bits_on_every_path(dtype, two_floats):
    shape = DTYPES.index(dtype)
    for name, case in cases(dtype, LAYOUTS[shape], shape).items():
        expected = {key: t.clone() for key, t in results(case(), How(path="cluster", ctas_per_image=1)).items()}
        for how in (How(ctas_per_image=2, seed=1), How(RTX_3090, "cooperative", 3, seed=2), How(RTX_5090, seed=3)):
            for output, value in results(case(), how).items():
                assert_same(value, expected[output], f"{output} of {name}, {how}")


# ---- under the sanitizers, as separate programs

SANITIZED = [
    How(path="fused", ctas_per_image=2),
    How(path="cluster", ctas_per_image=2, resident=4, seed=1),
    How(A100, "cooperative", 2, seed=2),
]


def sanitized(case: Case, how: How, sanitizer: str) -> None:
    """Asserts that the sanitizer reports nothing, and that the program computes the same bits."""
    expected = {name: t.clone() for name, t in results(case, how).items()}
    for t in case.outputs.values():
        t.zero_()
    program = build.program("driver.cpp", build.kernels(variant=sanitizer), sanitizer)
    assert call.run_in_program(case, how, program) == ""
    for name, value in expected.items():
        assert_same(case.outputs[name], value, name)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "op", ["compress", "compress_varlen", "score", "merge", "compress rounds", "compress_varlen rounds"]
)
def test_address_sanitizer(op, dtype):
    number = DTYPES.index(dtype)
    for n, how in enumerate(SANITIZED):
        case = cases(dtype, LAYOUTS[(n + number) % 3], n)[op]
        try:
            sanitized(case(), how, "address")
        except NoPath:
            assert op == "score" or "rounds" in op  # which are never fused
            assert how.path == "fused"


OFFSETS = [[0, 20, 10, 50], [-5, -1, 3, 2**31 - 1], [-(2**31), 2**31 - 1, -(2**31), 2**31 - 1], [50, 40, 30, 0]]


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("cu", OFFSETS)
def test_offsets_that_are_wrong_stay_in_bounds(cu, layout):
    """Offsets on the device cannot be checked, but AddressSanitizer must report nothing for any of them."""
    x = tokens(50, 12, dtype=torch.float16, seed=5)
    seqlens, how = torch.tensor(cu, dtype=torch.int32), SANITIZED[LAYOUTS.index(layout)]
    for cu_keep in ([0, 4, 9, 12], cu):
        keeps = torch.tensor(cu_keep, dtype=torch.int32)
        sanitized(call.compress_varlen_case(x, seqlens, keeps, 12, 50, 12, 3, layout=layout), how, "address")


@pytest.mark.slow
@pytest.mark.parametrize("how", SANITIZED, ids=lambda how: how.path)
@pytest.mark.parametrize(
    ("op", "dtype"),
    [
        ("compress", torch.float16),
        ("rounds", torch.float16),
        *(
            pytest.param(op, dtype, marks=pytest.mark.matrix)
            for op in ("compress", "compress_varlen", "merge", "rounds")
            for dtype in DTYPES
            if op not in ("compress", "rounds") or dtype != torch.float16
        ),
    ],
)
def test_thread_sanitizer(op, dtype, how):
    """The calls are tiny: every CUDA thread is a thread of the sanitizer, which starts 1500 a second."""
    x = tokens(1, 18, 72, dtype=dtype, kind="clustered", seed=3)
    rows = torch.tensor([[3, 0, 7, 3, 11]])
    cu, cu_keep = torch.tensor([0, 6, 18], dtype=torch.int32), torch.tensor([0, 2, 7], dtype=torch.int32)
    case = {
        "compress": lambda: call.compress_case(x, 6, 2, layout="append"),
        "compress_varlen": lambda: call.compress_varlen_case(x[0], cu, cu_keep, 7, 12, 5, 2),
        "merge": lambda: call.merge_case(x, rows),
        "rounds": lambda: call.compress_case(tokens(1, 22, 72, dtype=dtype, seed=3), 17, None, select="qr", refine=1),
    }[op]
    if op == "rounds" and how.path == "fused":
        pytest.skip("a basis in rounds is never fused")
    sanitized(case(), how, "thread")
