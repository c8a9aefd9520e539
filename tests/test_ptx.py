"""The CUDA kernels as nvcc compiled them: their PTX, executed by an interpreter that checks every instruction.

The shapes are small, since every CTA has 384 threads. test_cuda_simt.py and the shared tests test the sources.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from apet_kernels import reference
from apet_kernels.options import LAYOUTS
from tests import judge
from tests.data import DTYPES, tokens
from tests.ptx import build, call, injected
from tests.ptx.call import A100, H100
from tests.simt import call as simt
from tests.simt.call import Case, Fault, How

pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
    pytest.mark.slow,  # nvcc takes a minute, and an interpreted call a second
]

# Every kernel on both targets, with and without resident rows; the seeds draw all three kinds of schedule.
WAYS = {
    "sm_80 cooperative, tile 64": How(A100, "cooperative", 2, tile=64, tile_rows=64, seed=3),
    "sm_80 cooperative, tile 128": How(A100, "cooperative", 2, resident=4, tile=128, seed=4),
    "sm_90a cooperative": How(H100, "cooperative", 3, resident=8, tile=64, tile_rows=64, seed=5),
    "sm_90a cluster": How(H100, "cluster", 2, tile=128, seed=6),
    "sm_90a fused": How(H100, "fused", 2, seed=7),
    "sm_90a cooperative, tile 256": How(H100, "cooperative", 2, tile=256, seed=8),
    "sm_90a cluster, tile 128 x 64": How(H100, "cluster", 2, tile=64, tile_rows=128, seed=9),
}


def ways_of(dtype: torch.dtype) -> list[str]:
    """Returns the names of the ways that a dtype has: float32 has no tiles of 128 x 256 and 128 x 64."""
    rare = [name for name, how in WAYS.items() if how.tile == 256 or how.tile_rows == 128]
    return [name for name in WAYS if dtype != torch.float32 or name not in rare]


EVERY_WAY = [(dtype, way) for dtype in DTYPES for way in ways_of(dtype)]
# B, N, D, keep, basis. Rows are whole 16-byte words or not, of one matrix step or several; some tiles are not full.
SHAPES = [(2, 48, 33, 14, 4), (1, 70, 72, 66, 5), (2, 41, 200, 12, 6), (1, 60, 264, 20, 3)]


@pytest.fixture
def shapes(pytestconfig: pytest.Config) -> list[tuple[int, ...]]:
    """Returns the shapes above, or those of --shape B,N,D,KEEP,BASIS, which may be repeated."""
    return pytestconfig.getoption("--shape") or SHAPES


def image(shape: tuple[int, ...], number: int, dtype: torch.dtype) -> Tensor:
    """Returns x [B, N, D] of the shape with that number; with an odd number it begins at an odd element."""
    B, N, D, _, _ = shape
    x = tokens(B, N, D, dtype=dtype, kind=("clustered", "repeated", "normal")[number % 3], seed=number)
    if number % 2 == 0:
        return x
    room = torch.zeros(B, N, D + 8, dtype=dtype)
    return room[:, :, number % 8 : number % 8 + D].copy_(x)


@pytest.mark.parametrize("select", ["fps", "qr"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compared_with_float64(dtype, layout, select, shapes):
    """compress and score, with every dtype, layout and rule on both targets; shapes and paths in turns."""
    number = (DTYPES.index(dtype) * 3 + LAYOUTS.index(layout)) * 2 + (select == "qr")
    ways = [WAYS[name] for name in ways_of(dtype)]
    for turn, how in ((number, ways[number % 2]), (number + 1, ways[2 + number % (len(ways) - 2)])):
        shape = turn % len(shapes)
        _, _, _, keep, basis = shapes[shape]
        blend = 0.5 if layout == "overwrite" and shape % 2 else 1.0
        start, ridge = (-1, 7)[number % 2], (1e-5, 0.0, 0.1)[number % 3]
        options = {"layout": layout, "select": select, "start": start, "ridge": ridge, "blend": blend}
        judge.check(call.functions(how), image(shapes[shape], shape, dtype), keep, basis, **options)


LENGTHS, KEEPS = [0, 23, 0, 5, 40, 1], [0, 6, 0, 5, 9, 1]


@pytest.mark.parametrize(("dtype", "way"), EVERY_WAY)
def test_ragged_images(dtype, way):
    """Packed images, also empty ones; each is checked alone."""
    layout, basis = LAYOUTS[list(WAYS).index(way) % 3], 4
    x = tokens(sum(LENGTHS), 72, dtype=dtype, kind="clustered", seed=9)
    functions = call.functions(WAYS[way])
    cu, cu_keep = (torch.tensor([0, *n]).cumsum(0).int() for n in (LENGTHS, KEEPS))
    options = {"layout": layout, "select": "qr"}
    got, indices = functions.compress_varlen(x, cu, cu_keep, sum(KEEPS), max(LENGTHS), max(KEEPS), basis, **options)
    row = 0
    for first, length, keep in zip(cu.tolist(), LENGTHS, KEEPS, strict=False):
        rows = keep + basis * (layout == "append") if length else basis * (layout == "append")
        part = slice(row, row + rows)
        row += rows
        if not length:
            assert (got[part] == 0).all(), "rows that no image fills are not zeros"
            assert (indices[part] == 0).all()
            continue
        if keep == length or (layout == "overwrite" and keep <= basis):
            expected = reference.compress(x[None, first : first + length], keep, basis, **options)
            judge.assert_same(got[part], expected[0][0], "all tokens")
            continue
        own = SimpleNamespace(
            score=functions.score, compress=lambda *_, p=part, f=first, **__: (got[p][None], indices[p][None] - f)
        )
        judge.check(own, x[None, first : first + length], keep, basis, **options)
    assert row == len(got)


def cases(shapes: list[tuple[int, ...]], dtype: torch.dtype, number: int) -> dict[str, Case]:
    """Returns every op once."""
    shape = number % len(shapes)
    x = image(shapes[shape], shape, dtype)
    B, N, D, keep, basis = shapes[shape]
    options = {"layout": LAYOUTS[number % 3], "select": ("fps", "qr")[number % 2]}
    packed = tokens(sum(LENGTHS), D, dtype=dtype, kind="repeated", seed=number)
    cu, cu_keep = (torch.tensor([0, *n]).cumsum(0).int() for n in (LENGTHS, KEEPS))
    ragged = (packed, cu, cu_keep, sum(KEEPS), max(LENGTHS), max(KEEPS), 4)
    rows = torch.randint(-3, N + 3, (B, keep), generator=torch.Generator().manual_seed(number))
    return {
        "compress": simt.compress_case(x, keep, basis, **options),
        "compress_varlen": simt.compress_varlen_case(*ragged, **options),
        "score": simt.score_case(x, basis, select=options["select"]),
        "merge": simt.merge_case(x, rows, targets=rows % 3 > 0),
    }


@pytest.mark.parametrize(("dtype", "way"), EVERY_WAY)
def test_same_bits_as_the_sources(dtype, way, shapes):
    """Every op gives the bits of the simulation, which another compiler has compiled."""
    how, number = WAYS[way], DTYPES.index(dtype) * len(WAYS) + list(WAYS).index(way)
    for name, case in cases(shapes, dtype, number).items():
        if name == "score" and how.path == "fused":
            continue  # score is never fused
        launches = call.run(case, how)
        got = {key: value.clone() for key, value in case.outputs.items()}
        assert len(launches) == (1 if name == "score" or how.path == "fused" else 2)
        simt.run(case, How(path="cluster", ctas_per_image=2))
        for key, value in got.items():
            judge.assert_same(value, case.outputs[key], f"{key} of {name}")


@pytest.mark.parametrize(("dtype", "way"), [(dtype, way) for dtype, way in EVERY_WAY if WAYS[way].path != "fused"])
def test_rounds_and_medoids(dtype, way):
    """In three launches, with the bits of the simulation, whose picks and medoids the shared tests check: in a call of
    two images, of which one keeps so few tokens that it has no rounds, and alone."""
    x = tokens(70, 72, dtype=dtype, kind="clustered", seed=DTYPES.index(dtype))
    cu, cu_keep = torch.tensor([0, 30, 70], dtype=torch.int32), torch.tensor([0, 9, 29], dtype=torch.int32)
    options = {"select": "qr", "refine": 1}
    for case in (
        simt.compress_varlen_case(x, cu, cu_keep, 29, 40, 20, None, **options),
        simt.compress_case(x[None, 30:], 20, None, **options),
    ):
        assert len(call.run(case, WAYS[way])) == 3
        got = {name: t.clone() for name, t in case.outputs.items()}
        simt.run(case, How(path="cluster", ctas_per_image=2))
        for name, value in got.items():
            judge.assert_same(value, case.outputs[name], name)


def test_merge_compared_with_float64():
    """The rows have any order and repetitions, and not all are targets."""
    x = image(SHAPES[2], 2, torch.bfloat16)
    B, N, _, keep, _ = SHAPES[2]
    rows = torch.randint(N, (B, keep), generator=torch.Generator().manual_seed(1))
    targets = rows % 3 > 0
    got = call.functions(WAYS["sm_90a fused"]).merge(x, rows, targets=targets)
    for b in range(B):
        assert judge.check_merge(x[b], got[b], rows[b], targets[b]) > keep // 2


@pytest.mark.parametrize("way", ["sm_80 cooperative, tile 128", "sm_90a fused"])
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_matrix_unit_that_truncates(dtype, way):
    """With truncated sums, as of tensor cores, the errors stay within the bounds, and the indices are the same."""
    x = tokens(1, 96, 520, dtype=dtype, kind="clustered", seed=3)
    _, indices = judge.check(call.functions(WAYS[way], truncates=True), x, 40, 4)
    judge.assert_same(indices, call.functions(WAYS[way]).compress(x, 40, 4)[1], "indices")


# ---- faults injected into the text


def small(how: How) -> Case:
    """Returns a case with two matrix steps, every fragment of a warp in use, and more images than a cooperative launch
    has groups. No token resembles another, so that small changes of a similarity change the target."""
    N, keep = (140, 68) if how.tile == 256 else (120, 34) if how.tile_rows == 128 else (84, 34)
    return simt.compress_case(tokens(3, N, 136, dtype=torch.float16, seed=2), keep, 3)


def others() -> list[Case]:
    """Returns a case with more tokens than a CTA has threads, of which twelve differ, so that both cuts are among equal
    tokens, and a case with rows given by the caller."""
    pick = torch.randint(12, (400,), generator=torch.Generator().manual_seed(3))
    x = tokens(1, 70, 24, dtype=torch.float16, seed=3)
    return [
        simt.compress_case(x[:, pick], 40, 8, layout="overwrite", blend=0.5),
        simt.merge_case(x, torch.arange(0, 70, 3)[None]),
    ]


@pytest.fixture(scope="module")
def unchanged() -> dict[str, injected.Unchanged]:
    """Returns the results without a fault, for each way."""
    return {name: injected.unchanged(how, small(how), *others()) for name, how in WAYS.items()}


def in_rounds() -> list[Case]:
    """Returns a case with rounds of 35 picks, so with updates of gram, and one with many dropped tokens and with more
    images than a cooperative launch has groups; the first of them keeps all of its tokens."""
    x = tokens(1, 150, 136, dtype=torch.float16, seed=4)
    lengths, keeps = [20, 60, 60, 30], [20, 30, 30, 12]
    cu, cu_keep = (torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, keeps))
    packed = tokens(sum(lengths), 136, dtype=torch.float16, seed=5)
    sizes, options = (sum(keeps), max(lengths), max(keeps), None), {"select": "qr", "refine": 2}
    return [
        simt.compress_case(x, 140, None, **options),
        simt.compress_varlen_case(packed, cu, cu_keep, *sizes, **options),
    ]


@pytest.fixture(scope="module")
def rounds_unchanged() -> dict[str, injected.Unchanged]:
    """Returns the results of rounds and medoid steps without a fault, for each way and kernel."""
    found = {}
    for name in ("sm_80 cooperative, tile 64", "sm_90a cluster"):
        way = injected.unchanged(WAYS[name], *in_rounds())
        for kernel in ("s1_s4_rounds", "s4_medoids"):
            found[f"{name}, {kernel}"] = injected.of_kernel(way, kernel)
    return found


def missed(fault: injected.Injected, ways: dict[str, injected.Unchanged], everywhere: bool) -> list[str]:
    """Injects a fault at the first and last instruction that a way executes, or at each. Returns the places where it is
    not noticed."""
    tried, found = 0, []
    for name, way in ways.items():
        places = injected.executed(way, fault)
        if not everywhere:
            places = places[:1] + places[1:][-1:]
        tried += len(places)
        found += [f"{name}: {place}" for place in places if not injected.noticed(way, fault, place)]
    assert tried, "no instruction that is executed matches"
    return found


@pytest.mark.parametrize("fault", injected.INJECTED, ids=lambda fault: fault.name.replace(" ", "_"))
def test_injected_faults(fault, unchanged, pytestconfig):
    """Each fault is injected at the first and last instruction that a way executes, or with --interpret 0 at each."""
    assert missed(fault, unchanged, not pytestconfig.getoption("--interpret")) == []


@pytest.mark.parametrize("fault", injected.IN_ROUNDS, ids=lambda fault: fault.name.replace(" ", "_"))
def test_injected_faults_in_rounds_and_medoids(fault, rounds_unchanged):
    """Likewise for s1_s4_rounds and s4_medoids."""
    assert missed(fault, rounds_unchanged, everywhere=False) == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"fma\.rn\.f32", "fma.rz.f32", "an opcode that is not in the tables: fma.rz.f32"),
        (r"bar\.sync\s+0;", "bar.sync 0, 64;", "operands that do not fit the opcode: bar.sync 0, 64"),
        (r"ld\.relaxed\.gpu", "ld.relaxed.cta", "an opcode that is not in the tables: ld.relaxed.cta"),
        (r"cvt\.f64\.f32\s+%fd\d+,", "cvt.f64.f32 %f1,", "operands that do not fit the opcode: cvt.f64.f32 %f1"),
    ],
)
def test_what_is_not_known_is_an_error(old, new, said):
    text, times = re.subn(old, new, build.ptx("float16", "sm_90a"))
    assert times
    with pytest.raises(Fault, match=said):
        call.run(small(WAYS["sm_90a fused"]), WAYS["sm_90a fused"], text)
