"""AMX: the products in tiles, in their emulation in plain C++ and, where the processor has AMX, in its instructions.

The emulation (APET_TILE_EMULATION) is built in two ways: for any processor, and with AVX-512 around the tiles. The
latter must give the bits of the instructions.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

from apet_kernels import testing
from tests import elsewhere, test_similarity
from tests.conftest import FUNCTIONS, Backend
from tests.data import offsets, tokens
from tests.elsewhere import BACKEND_TESTS, Functions, Program, with_fault
from tests.judge import assert_same, check
from tests.library.copies import CSRC, built, needs_sources

pytestmark = [pytest.mark.slow, needs_sources]
IN_TILES = {"amx": torch.bfloat16, "amx_fp16": torch.float16}  # what each instruction set multiplies in tiles
in_tiles = pytest.mark.parametrize("isa", IN_TILES)

# B, N, D, keep, basis: less than a tile of everything; one channel; whole tiles; one row more than two tiles of rows,
# an odd D, several panels; several chains, the last with an incomplete tile; several chunks of rows.
SHAPES = [
    (3, 13, 7, 5, 3),
    (2, 40, 1, 9, 2),
    (1, 64, 64, 32, 8),
    (2, 98, 45, 65, 10),
    (1, 60, 2051, 28, 3),
    (1, 300, 96, 20, 6),
    (2, 299, 416, 16, 6),
]


def make(kind: str, folder: Path, csrc: Path = CSRC) -> None:
    elsewhere.make(folder, "g++", csrc, f"-DAPET_TILE_EMULATION={kind}")


@functools.cache
def program(kind: str) -> Program:
    """Starts a process with the emulation of this kind; it ends with this process."""
    return Program(built(f"tiles-{kind}", functools.partial(make, kind)) / "calls")


def on(kind: str, isa: str, threads: int = 1) -> Backend:
    functions = Functions(program(kind), isa, threads)
    return Backend.of(f"cpu-{isa}", *(getattr(functions, name) for name in FUNCTIONS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["clustered", "repeated"])
@in_tiles
def test_compared_with_float64(isa: str, kind: str, shape: tuple[int, ...]) -> None:
    B, N, D, keep, basis = shape
    check(on("portable", isa), tokens(B, N, D, dtype=IN_TILES[isa], kind=kind, seed=N), keep, basis)


@in_tiles
def test_alone_batched_packed_and_on_any_number_of_threads(isa: str) -> None:
    B, N, D, keep, basis = 3, 190, 77, 64, 6
    x = tokens(B, N, D, dtype=IN_TILES[isa], kind="clustered", seed=1)
    together, indices = on("portable", isa).compress(x, keep, basis)
    for b in range(B):
        got = on("portable", isa).compress(x[b : b + 1].clone(), keep, basis)
        assert_same(got[0][0], together[b], f"image {b} alone")
        assert_same(got[1][0], indices[b], f"indices of image {b} alone")
    for threads in (1, 2, 4):
        got = on("portable", isa, threads).compress_varlen(
            x.flatten(0, 1), offsets([N] * B), offsets([keep] * B), B * keep, N, keep, basis
        )
        assert_same(got[0].view(B, keep, D), together, f"packed, {threads} threads")


@pytest.mark.parametrize("D", [1024, 3584])
@in_tiles
def test_similarities(isa: str, D: int) -> None:
    test_similarity.test_no_more_wrong_targets_than_torch(on("portable", isa), IN_TILES[isa], D)


def test_subnormal_float16_is_no_zero() -> None:
    """TDPFP16PS takes subnormal inputs as they are: tokens of 2^-24 k have the targets of tokens of k."""
    x = tokens(1, 80, 48, dtype=torch.float16, kind="clustered", seed=3).mul(8).round()
    small = (x.double() * 2**-24).half()
    assert torch.equal(small.double() * 2**24, x.double())
    kept = torch.arange(0, 80, 5)[None]
    merged, of_small = (on("portable", "amx_fp16").merge(of, kept) for of in (x, small))
    torch.testing.assert_close(of_small.double() * 2**24, merged.double(), rtol=0, atol=1)


@pytest.mark.parametrize("isa", ["amx", "amx_fp16"])
def test_other_dtypes_have_the_bits_of_the_set_before(isa: str) -> None:
    before = {"amx": "generic", "amx_fp16": "amx"}[isa]
    for dtype in {torch.float32, torch.float16, torch.bfloat16} - {IN_TILES[isa]}:
        x = tokens(2, 98, 45, dtype=dtype, kind="clustered", seed=2)
        for got, same in zip(*(on("portable", one).compress(x, 33, 5) for one in (isa, before)), strict=True):
            assert_same(got, same)


@pytest.mark.matrix  # on a machine with AMX, by hand
@in_tiles
@pytest.mark.parametrize(
    "rule", [{"select": "fps"}, {"select": "qr"}, {"select": "qr", "basis": None, "refine": 2}], ids=str
)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 576, 1024, 64, 10), (1, 1280, 3584, 384, 10)])
def test_the_emulation_has_the_bits_of_the_instructions(shape: tuple[int, ...], rule: dict[str, Any], isa: str) -> None:
    from apet_kernels import compress

    if isa not in testing.cpu_isa():
        pytest.skip(f"this processor has no {isa}, or may not use it")
    B, N, D, keep, basis = shape
    x = tokens(B, N, D, dtype=IN_TILES[isa], kind="clustered", seed=N)
    testing.use_cpu_isa(isa)
    try:
        expected = compress(x, keep, **{"basis": basis, **rule}, backend="cpu")
    finally:
        testing.use_cpu_isa(None)
    for got, same in zip(on("avx512", isa).compress(x, keep, **{"basis": basis, **rule}), expected, strict=True):
        assert_same(got, same)


# ---- the tests of all backends, on the emulation ---------------------------------------------------------------------


@pytest.fixture(params=list(IN_TILES))
def backend(request: pytest.FixtureRequest) -> Backend:
    return on("portable", request.param, threads=0)  # as many as torch has


globals().update(BACKEND_TESTS)


# ---- injected faults -------------------------------------------------------------------------------------------------

# By name: a file of csrc/cpu, a text in it, and the text that replaces it.
FAULTS = {
    "zeros behind the panel left out": ("product.h", "n <= 0 ? V{}", 'n <= 0 ? splat(__builtin_nanf(""))'),
    "zeros behind a row left out": (
        "product_tiles.h",
        "+ tail, 0, kTileBytes - tail",
        "+ tail, 255, kTileBytes - tail",
    ),
    "rows of the second tile are those of the first": (
        "product_tiles.h",
        "a + block.tile_stride, block.stride",
        "a, block.stride",
    ),
    "columns of the second tile are the first's": ("product_tiles.h", "b + kFactorTile, 4 * W", "b, 4 * W"),
    "the sum of a chain replaces the ones before": ("product_tiles.h", "load(sum) + load(added", "load(added"),
    "tokens between those wanted are taken for them": (
        "product_tiles.h",
        "in_place ? tokens[begin + i] - first : i",
        "i",
    ),
    "rows in place end after those of the image": (
        "product_tiles.h",
        "Gaps ? smaller(tokens[begin], in.tokens - tiles * kTileRows) : tokens[begin]",
        "Gaps ? in.tokens - tiles * kTileRows : tokens[begin]",
    ),
    "odd products left out": ("tiles.h", "flush(even[n] + odd[n])", "even[n]"),
    "float16 without its sign": ("tiles.h", "| beyond | sign", "| beyond | (sign & 0)"),
    "last pass: the sum of a chain replaces the ones before": (
        "dot_tiles.h",
        "totals[i] += sums[i]",
        "totals[i] = sums[i]",
    ),
    "last pass: the second group has the sums of the first": ("dot_tiles.h", "sums + kTileRows * W, 4", "sums, 4"),
    "last pass: zeros behind the features left out": (
        "dot_tiles.h",
        "group.copy, 0, sizeof",
        "group.copy, 255, sizeof",
    ),
    "last pass: the factors of a chain are those of the first": (
        "dot_tiles.h",
        "basis, b, chain, in.dim",
        "basis, b, 0, in.dim",
    ),
}


def compare_all() -> None:
    for shape in SHAPES:
        for isa in IN_TILES:
            test_compared_with_float64(isa, "clustered", shape)


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("portable", tmp_path / "build", with_fault(tmp_path, *FAULTS[fault]))
    changed = Program(tmp_path / "build/calls")
    monkeypatch.setitem(globals(), "program", lambda _: changed)
    with pytest.raises((AssertionError, RuntimeError)) as noticed:
        compare_all()
    # The library tests a product itself. If that is wrong, it is without the instruction set: APET_NO_ISA.
    assert noticed.type is AssertionError or str(noticed.value) == "status 21"
    changed.close()
