"""AMX: the products in tiles, in their emulation in plain C++ and, where the processor has AMX, in its instructions.

The emulation (APET_TILE_TWIN) is built in two ways: for any processor, and with AVX-512 around the tiles. The latter
must give the bits of the instructions.
"""

from __future__ import annotations

import functools
from pathlib import Path

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
BF16 = torch.bfloat16

# B, N, D, keep, basis: less than a tile of everything; one channel; whole tiles; one row more than two tiles of rows,
# an odd D, several panels; several chains, the last with an incomplete tile; several chunks of rows.
SHAPES = [
    (3, 13, 7, 5, 3),
    (2, 40, 1, 9, 2),
    (1, 64, 64, 32, 8),
    (2, 98, 45, 65, 10),
    (1, 60, 2051, 28, 3),
    (1, 300, 96, 20, 6),
]


def make(kind: str, folder: Path, csrc: Path = CSRC) -> None:
    elsewhere.make(folder, "g++", csrc, f"-DAPET_TILE_TWIN={kind}")


@functools.cache
def program(kind: str) -> Program:
    """Starts a process with the emulation of this kind; it ends with this process."""
    return Program(built(f"tiles-{kind}", functools.partial(make, kind)) / "calls")


def on(kind: str, threads: int = 1) -> Backend:
    functions = Functions(program(kind), "amx", threads)
    return Backend("cpu-amx", *(getattr(functions, name) for name in FUNCTIONS))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["clustered", "repeated"])
def test_compared_with_float64(kind: str, shape: tuple[int, ...]) -> None:
    B, N, D, keep, basis = shape
    check(on("portable"), tokens(B, N, D, dtype=BF16, kind=kind, seed=N), keep, basis)


def test_alone_batched_packed_and_on_any_number_of_threads() -> None:
    B, N, D, keep, basis = 3, 190, 77, 64, 6
    x = tokens(B, N, D, dtype=BF16, kind="clustered", seed=1)
    together, indices = on("portable").compress(x, keep, basis)
    for b in range(B):
        got = on("portable").compress(x[b : b + 1].clone(), keep, basis)
        assert_same(got[0][0], together[b], f"image {b} alone")
        assert_same(got[1][0], indices[b], f"indices of image {b} alone")
    for threads in (1, 2, 4):
        got = on("portable", threads).compress_varlen(
            x.flatten(0, 1), offsets([N] * B), offsets([keep] * B), B * keep, N, keep, basis
        )
        assert_same(got[0].view(B, keep, D), together, f"packed, {threads} threads")


@pytest.mark.parametrize("D", [1024, 3584])
def test_similarities(D: int) -> None:
    test_similarity.test_no_more_wrong_targets_than_torch(on("portable"), BF16, D)


@pytest.mark.matrix  # on a machine with AMX, by hand
@pytest.mark.skipif("amx" not in testing.cpu_isa(), reason="this processor has no tiles, or may not use them")
@pytest.mark.parametrize("shape", [*SHAPES, (2, 576, 1024, 64, 10), (1, 1280, 3584, 384, 10)])
def test_the_twin_has_the_bits_of_the_instructions(shape: tuple[int, ...]) -> None:
    from apet_kernels import compress

    B, N, D, keep, basis = shape
    x = tokens(B, N, D, dtype=BF16, kind="clustered", seed=N)
    testing.use_cpu_isa("amx")
    try:
        expected = compress(x, keep, basis, backend="cpu")
    finally:
        testing.use_cpu_isa(None)
    for got, same in zip(on("avx512").compress(x, keep, basis), expected, strict=True):
        assert_same(got, same)


# ---- the tests of all backends, on the emulation ---------------------------------------------------------------------


@pytest.fixture(params=["amx"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return on("portable", threads=0)  # as many as torch has


globals().update(BACKEND_TESTS)


# ---- injected faults -------------------------------------------------------------------------------------------------

# By name: a file of csrc/cpu, a text in it, and the text that replaces it.
FAULTS = {
    "zeros behind the panel left out": ("product_tiles.h", "__builtin_memset(last, 0,", "__builtin_memset(last, 255,"),
    "zeros behind a row left out": ("product_tiles.h", "used, 0, bytes - used", "used, 255, bytes - used"),
    "rows of the second tile are those of the first": (
        "product_tiles.h",
        "rows + kTileRows * row_bytes + 4",
        "rows + 4",
    ),
    "columns of the second tile are the first's": ("product_tiles.h", "b + Columns, 4 * width", "b, 4 * width"),
    "the sum of a chain replaces the ones before": ("product_tiles.h", "load(sum) + more", "more"),
    "odd products left out": ("tiles.h", "flush(even[n] + odd[n])", "even[n]"),
}


def compare_all() -> None:
    for shape in SHAPES:
        test_compared_with_float64("clustered", shape)


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("portable", tmp_path / "build", with_fault(tmp_path, *FAULTS[fault]))
    changed = Program(tmp_path / "build/calls")
    monkeypatch.setitem(globals(), "program", lambda _: changed)
    with pytest.raises(AssertionError):
        compare_all()
    changed.close()
