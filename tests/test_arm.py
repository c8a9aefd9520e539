"""64-bit ARM: the CPU library, cross-compiled, on an emulated processor (tests/arm.py).

Its own tests below take every instruction set, dtype and function on the shapes that are awkward for vectors. The tests
that all backends share run on it too, a point of each grid.
"""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch

from apet_kernels.options import LAYOUTS, PAPER
from tests import test_invariance, test_similarity
from tests.arm import COMPILER, ISAS, WITH_BF16, WITHOUT_BF16, emulated, make, missing, processor
from tests.binaries import run
from tests.conftest import FUNCTIONS, Backend
from tests.data import DTYPES, offsets, tokens
from tests.elsewhere import BACKEND_TESTS, Functions, with_fault
from tests.judge import assert_same, check, check_merge
from tests.library.copies import built
from tests.simt.abi import status_numbers
from tests.simt.call import compress_case

WHY_NOT = missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")]

# B, N, D, keep, basis: one channel; few of them, K = 1; K = N; panels of 4 and of 1 vector; of 4 and 2, and more than
# one chunk of rows; of 4 and 3, and more than one block of k, with an odd end; one token.
SHAPES = [
    (3, 37, 1, 11, 4),
    (2, 53, 7, 1, 3),
    (1, 33, 31, 33, 5),
    (2, 130, 45, 65, 10),
    (1, 210, 66, 24, 6),
    (1, 60, 2051, 28, 3),
    (1, 1, 8, 1, 1),
]
KINDS = ("clustered", "repeated", "hostile")


def on(isa: str, threads: int = 1) -> Backend:
    functions = Functions(processor(WITH_BF16), isa, threads)
    return Backend.of(f"cpu-{isa}", *(getattr(functions, name) for name in FUNCTIONS))


def image(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> torch.Tensor:
    B, N, D, *_ = shape
    x = tokens(B, N, D, dtype=dtype, kind="clustered" if kind == "hostile" else kind, seed=N)
    if kind == "hostile" and N > 9:
        x[0, ::7, D // 2] = float("nan")
        x[0, 3, 0] = float("-inf")
        x[0, 5:8] = 0
        x[-1, N // 2 :] = x[-1, 8]
    return x


def everything(backend: Backend, shape: tuple[int, ...], x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compares compress, score and merge of x with float64; returns their results."""
    _, N, _, keep, basis = shape
    layout = test_invariance.layout_for(N, keep, basis)
    got, indices = check(backend, x, keep, basis, layout=layout, select=("fps", "qr")[N % 2])
    rows = torch.randperm(N, generator=torch.Generator().manual_seed(keep))[:keep]
    merged = backend.merge(x, rows.expand(len(x), keep).contiguous())
    for b in range(len(x)):
        check_merge(x[b], merged[b], rows, torch.ones(keep, dtype=torch.bool))
    residual, picks = backend.score(x, basis)
    return {"tokens": got, "indices": indices, "merged": merged, "residual": residual, "basis": picks}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_compared_with_float64(isa: str, dtype: torch.dtype):
    """Where the order of sums is that of the portable code, the bits must be equal too."""
    for shape in SHAPES:
        for kind in KINDS:
            x = image(shape, dtype, kind)
            results = everything(on(isa), shape, x)
            if isa == "neon" or (isa == "neon_bf16" and dtype != torch.bfloat16):
                for name, expected in everything(on("generic"), shape, x).items():
                    assert_same(results[name], expected, f"{name} of {shape}, {kind}")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_alone_batched_packed_and_on_any_number_of_threads(isa: str, dtype: torch.dtype):
    for B, N, D, keep, basis in [(5, 190, 77, 64, 6), (1, 401, 99, 90, 10)]:
        x = image((B, N, D), dtype, "hostile")
        layout = LAYOUTS[B % 3]
        together, indices = on(isa).compress(x, keep, basis, layout=layout)
        R = together.shape[1]
        for b in range(B):
            got = on(isa).compress(x[b : b + 1].clone(), keep, basis, layout=layout)
            assert_same(got[0][0], together[b], f"image {b} alone")
            assert_same(got[1][0], indices[b], f"indices of image {b} alone")
        cu, cu_keep = offsets([N] * B), offsets([keep] * B)
        for threads in (1, 2, 4):
            got = on(isa, threads).compress(x, keep, basis, layout=layout)
            assert_same(got[0], together, f"{threads} threads")
            assert_same(got[1], indices, f"indices, {threads} threads")
            packed, at = on(isa, threads).compress_varlen(
                x.flatten(0, 1), cu, cu_keep, B * keep, N, keep, basis, layout=layout
            )
            assert_same(packed.view(B, R, D), together, f"packed, {threads} threads")
            assert_same(at.view(B, R) - torch.arange(B)[:, None] * N, indices, f"packed indices, {threads} threads")
            planned = processor(WITH_BF16).call(compress_case(x, keep, basis), isa, threads, plan_alone=True)
            assert (planned.threads > 1) == (threads > 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_images(isa: str, dtype: torch.dtype):
    """Images of one token, with all tokens kept, and with none; each has the checked bits that it has alone."""
    lengths, keeps, basis = [31, 1, 64, 7, 0, 130], [9, 1, 64, 1, 0, 40], 4
    x = tokens(sum(lengths), 37, dtype=dtype, kind="repeated", seed=2)
    cu, cu_keep = offsets(lengths), offsets(keeps)
    got, indices = on(isa).compress_varlen(x, cu, cu_keep, sum(keeps), max(lengths), max(keeps), basis)
    for s, (length, keep) in enumerate(zip(lengths, keeps, strict=True)):
        if not length:
            continue
        first = int(cu[s])
        alone, at = check(on(isa), x[first : first + length][None].clone(), keep, basis)
        rows = slice(int(cu_keep[s]), int(cu_keep[s + 1]))
        assert_same(got[rows], alone[0], f"image {s}")
        assert (indices[rows] - first).tolist() == at[0].tolist()


@pytest.mark.parametrize("isa", ISAS)
def test_every_float16_is_widened_and_rounded_right(isa: str):
    """Merges two tokens: every finite number with 0, then every finite number with the next one. So the results are the
    halves of all numbers, and the middles of neighbours, which are all ties."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    every = every[every.isfinite()]
    for other in (torch.zeros_like(every), every.roll(1)):
        x = torch.stack([every, other])[None]
        got = on(isa).merge(x, torch.tensor([[0]]))[0, 0]
        assert_same(got, ((every.float() + other.float()) / 2).half(), "means")


@pytest.mark.parametrize("isa", ISAS)
def test_a_blend_with_nan_is_nan(isa: str):
    x = tokens(1, 30, 7, dtype=torch.float16, seed=3)
    x[0, 5:25, 2] = float("nan")
    x[0, 5:25, 3] = float("inf")
    got, _ = on(isa).compress(x, 8, 3, layout="overwrite", blend=0.5)
    assert got[0, :, 2].isnan().all()
    assert got[0, :, 3].isinf().all()
    assert got[0][:, [0, 1, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize("D", [1024, 3584])
@pytest.mark.parametrize("isa", ["neon", "neon_bf16"])
def test_similarities_of_bfloat16(isa: str, D: int):
    test_similarity.test_no_more_wrong_targets_than_torch(on(isa), torch.bfloat16, D)


# ---- the choice ------------------------------------------------------------------------------------------------------


def plan(model: str, isa: str) -> str | int:
    """Returns the instruction set of a plan on that processor, or the status of the error."""
    answer = processor(model).call(compress_case(tokens(1, 9, 4), 3), isa, plan_alone=True)
    return answer.isa if answer.status == 0 else answer.status


def test_the_processor_chooses():
    no_isa = status_numbers()["APET_NO_ISA"]
    for model, best in ((WITH_BF16, "neon_bf16"), (WITHOUT_BF16, "neon")):
        assert plan(model, "best") == best
        assert plan(model, "generic") == "generic"
        assert plan(model, "neon") == "neon"
        assert plan(model, "avx2") == plan(model, "avx512") == plan(model, "avx512_bf16") == no_isa
    assert plan(WITH_BF16, "neon_bf16") == "neon_bf16"
    assert plan(WITHOUT_BF16, "neon_bf16") == no_isa


def test_without_bf16_it_runs():
    """The emulated processor stops at an instruction that it does not have."""
    x = tokens(2, 60, 37, dtype=torch.bfloat16, seed=1)
    case = compress_case(x, 20, **PAPER)
    assert processor(WITHOUT_BF16).call(case, "best").status == 0
    for got, expected in zip(case.outputs.values(), on("neon").compress(x, 20, **PAPER), strict=True):
        assert_same(got, expected)


def test_code_of_one_instruction_set_stays_in_its_file():
    """The same test as for x86-64 in tests/test_packaging_bindings.py."""
    objects = built("arm", make) / "CMakeFiles/apet.dir/cpu"
    for file in sorted(objects.glob("*.o")):
        code = run(COMPILER.replace("g++", "objdump"), "-d", file)
        assert ("bfdot" in code) == (file.name == "isa_neon_bf16.cpp.o"), file
        if "isa_neon" in file.name:
            symbols = run("nm", "--defined-only", file).splitlines()
            assert [line for line in symbols if line.split()[1] == "W"] == [], file


# ---- the tests of all backends ---------------------------------------------------------------------------------------


@pytest.fixture(params=[f"arm-{isa}" for isa in ISAS])
def backend(request: pytest.FixtureRequest) -> Backend:
    return on(request.param.removeprefix("arm-"), threads=0)  # as many as torch has


globals().update(BACKEND_TESTS)


# ---- injected faults -------------------------------------------------------------------------------------------------

# By name: a file of csrc/cpu, a text in it, and the text that replaces it.
FAULTS = {
    "operands of an fma exchanged": (
        "vector.h",
        "vfmaq_f32((float32x4_t)c, (float32x4_t)a",
        "vfmaq_f32((float32x4_t)a, (float32x4_t)c",
    ),
    "rows of a transposed block exchanged": (
        "vector.h",
        "v[1] = (V)low.val[1], v[2] = (V)high.val[0]",
        "v[2] = (V)low.val[1], v[1] = (V)high.val[0]",
    ),
    "half of a total left out": ("vector.h", "two[0] + two[1];\n  }\n#else", "two[0];\n  }\n#else"),
    "float16 cut off instead of rounded": (
        "vector.h",
        "vcvt_f16_f32((float32x4_t)v)",
        "vcvt_f16_f32((float32x4_t)((U)v & 0xffffe000))",
    ),
    "one product of a pair left out": (
        "elements.h",
        "(bfloat16x8_t)a, (bfloat16x8_t)b",
        "(bfloat16x8_t)((U)a & 0xffff), (bfloat16x8_t)b",
    ),
    "what follows the last feature": (
        "elements.h",
        "i < n; i++) full[i] = p[i];\n    return get(full);",
        "i <= n; i++) full[i] = p[i];\n    return get(full);",
    ),
    "too long a chain of bfdot": ("elements.h", "kChain = 64", "kChain = 2048"),
    "a panel of 3 vectors taken for 2": ("product.h", "case 3: use(Width<3>{}", "case 3: use(Width<2>{}"),
    "BF16 on every processor": ("isa.cpp", "getauxval(AT_HWCAP2) >> 14 & 1", "1"),
}


def some_of_the_tests() -> None:
    test_the_processor_chooses()
    test_compared_with_float64("neon", torch.float32)
    test_compared_with_float64("neon", torch.float16)
    test_compared_with_float64("neon_bf16", torch.bfloat16)
    test_similarities_of_bfloat16("neon_bf16", 1024)


@pytest.mark.matrix
@pytest.mark.parametrize("fault", FAULTS)
def test_an_injected_fault_is_noticed(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "build", with_fault(tmp_path, *FAULTS[fault]), "-DCMAKE_CXX_FLAGS_RELEASE=-O1")
    changed = functools.cache(lambda model: emulated(model, tmp_path / "build"))
    monkeypatch.setitem(globals(), "processor", changed)
    with pytest.raises((AssertionError, RuntimeError)):
        some_of_the_tests()
    for model in (WITH_BF16, WITHOUT_BF16):
        changed(model).close()
