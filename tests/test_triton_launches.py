"""The host side of the Triton backend: the number of launches, and memory; neither depends on data."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import apet_kernels
from apet_kernels.options import LAYOUTS
from tests.data import DTYPES, tokens
from tests.judge import assert_same

pytest.importorskip("triton")
from apet_kernels.triton_kernels import configs, launch, s5_assign
from apet_kernels.triton_kernels.call import Call, Launch

on_the_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="for tensors on the CPU")

B, N, D, K = 3, 70, 24, 20
CU, CU_KEEP = torch.tensor([0, 9, 9, 70], dtype=torch.int32), torch.tensor([0, 4, 4, 20], dtype=torch.int32)


def build(op: str, x: Tensor, M: int = 4, layout: str = "inplace", **options) -> Call:
    """Returns the launches of one of the ops on x [B, N, D], on any device and with any data."""
    options["device_class"] = "interpreter"
    if op == "score":
        return launch.score(x, M, **options)
    if op == "merge":
        indices = torch.arange(K, device=x.device).expand(x.shape[0], K)
        return launch.merge(x, indices, targets=indices > 3, **options)
    if op == "compress":
        return launch.compress(x, K, M, layout=layout, **options)
    cu, cu_keep = CU.to(x.device), CU_KEEP.to(x.device)
    return launch.compress_varlen(x[0], cu, cu_keep, K, N, K, M, layout=layout, **options)


def names(call: Call) -> list[str]:
    return [one.kernel.__name__ for one in call.launches]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("M", [1, 10, 64])
def test_m_plus_4_launches(M, layout):
    x = torch.empty(B, N, D, device="meta")
    for op in ("compress", "compress_varlen"):
        for select in ("fps", "qr"):
            made = names(build(op, x, M, layout, select=select))
            assert made == ["s1_norms", *["s1_s3_sweep"] * M, "s4_topk", "s5_assign", "s5_mean"]
    assert names(build("score", x, M)) == ["s1_norms", *["s1_s3_sweep"] * M]
    assert names(build("merge", x)) == ["s1_norms", "s4_given_rows", "s5_assign", "s5_mean"]


@pytest.mark.parametrize("refine", [0, 2])
def test_launches_of_a_basis_in_rounds(refine):
    """Four rounds of two launches. With few basis tokens a round picks one, which must also fit ragged images."""
    x = torch.empty(B, N, D, device="meta")
    options = {"select": "qr", "refine": refine, "device_class": "interpreter"}
    after = ["s4_topk", *["s5_assign", "s4_medoids", "s4_topk"] * refine, "s5_assign", "s5_mean"]
    made = names(launch.compress(x, K, None, **options))
    assert made == ["s1_norms", *["s1_pool", "s1_rounds"] * 4, *after]
    assert len(made) <= 4 * 3 + 8
    assert names(launch.compress(x, 5, None, **options)) == ["s1_norms", *["s1_pool", "s1_rounds"] * 5, *after]
    cu, cu_keep = CU.to("meta"), CU_KEEP.to("meta")
    made = names(launch.compress_varlen(x[0], cu, cu_keep, K, N, K, None, **options))
    assert made == ["s1_norms", *["s1_pool", "s1_rounds"] * 16, *after]


@on_the_cpu
@pytest.mark.interpreter
def test_a_call_runs_what_was_built(monkeypatch):
    """A call runs exactly the launches of the list that the other tests count."""
    ran = []
    monkeypatch.setattr(Launch, "run", lambda self: ran.append(self.kernel.__name__))
    x = tokens(B, N, D)
    for op, call in calls(x).items():
        ran.clear()
        call()
        assert ran == names(build(op, x)), op


def calls(x: Tensor) -> dict[str, Callable]:
    """Calls the public functions on x, with the arguments of `build`."""
    at = torch.arange(K).expand(B, K)
    return {
        "compress": lambda: apet_kernels.compress(x, K, 4, backend="triton"),
        "compress_varlen": lambda: apet_kernels.compress_varlen(x[0], CU, CU_KEEP, K, N, K, 4, backend="triton"),
        "score": lambda: apet_kernels.score(x, 4, backend="triton"),
        "merge": lambda: apet_kernels.merge(x, at, targets=at > 3, backend="triton"),
    }


def described(call: Call) -> list:
    """Returns everything in the launches of a call but tensor values: programs, numbers, and forms of tensors."""
    form = [
        (
            one.kernel.__name__,
            one.programs,
            one.constants,
            one.options,
            {k: (a.shape, a.stride(), a.dtype) if isinstance(a, Tensor) else a for k, a in one.args.items()},
        )
        for one in call.launches
    ]
    return [form, [(r.shape, r.dtype) for r in call.results], call.workspace_bytes]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", ["compress", "compress_varlen", "score", "merge"])
def test_nothing_depends_on_data(op, layout):
    """Tensors without data give the same launches, programs, sizes and numbers, so no data is read by the host."""
    expected = described(build(op, torch.empty(B, N, D, device="meta"), layout=layout))
    for x in (tokens(B, N, D), torch.zeros(B, N, D), torch.full((B, N, D), torch.nan)):
        assert described(build(op, x, layout=layout)) == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "D", "M", "K"), [(1, 16384, 3584, 10, 1638), (64, 576, 1024, 64, 288), (2, 3, 5, 1, 2)]
)
def test_workspace(B, N, D, M, K, dtype):
    """It is O(N M), plan() counts all of it, and besides y it has at most 24 numbers per token."""
    x = torch.empty(B, N, D, dtype=dtype, device="meta")
    call = launch.compress(x, K, M, device_class="interpreter")
    assert call.workspace_bytes <= B * (N * (4 * M + 96) + 8 * K + 4 * M * M + 8 * M + 8 * 1024)
    given = {t.untyped_storage()._cdata for t in (x, *call.results)}
    used = [a.untyped_storage() for one in call.launches for a in one.args.values() if isinstance(a, Tensor)]
    made = {storage._cdata: storage.nbytes() for storage in used if storage._cdata not in given}
    assert sum(made.values()) == call.workspace_bytes


@pytest.mark.slow
@on_the_cpu
@pytest.mark.interpreter
@pytest.mark.parametrize("layout", [*(pytest.param(one, marks=pytest.mark.slow) for one in LAYOUTS[:-1]), LAYOUTS[-1]])
def test_the_number_of_programs_does_not_change_the_bits(monkeypatch, layout):
    """A program of s1 takes one tile or many; a program of s5_assign compares all targets or a part of them."""
    x = tokens(2, 150, 70, kind="repeated")
    x[:, 7] = 0  # as similar to every target
    x[:, 9:11] *= 1e-24  # their similarities are 0, of either sign
    call = lambda: apet_kernels.compress(x, 60, 3, layout=layout, backend="triton")  # noqa: E731
    tokens_, indices = call()
    shares = [one.args["shares"] for one in build("compress", x).launches if "shares" in one.args]
    assert min(shares) > 1
    monkeypatch.setattr(s5_assign, "ENOUGH_PROGRAMS", 1)
    monkeypatch.setattr(configs, "PARTIALS", 2)
    fewer = launch.compress(x, 60, 3, layout=layout)
    assert [one.args.get("shares", 1) for one in fewer.launches] == [1] * 7
    assert fewer.launches[1].programs == 4
    other, at = call()
    assert_same(indices, at, "indices")
    assert_same(tokens_, other, "tokens")


@on_the_cpu
@pytest.mark.interpreter
@pytest.mark.parametrize("D", [8, 64, 100])
def test_rows_have_the_alignment_that_kernels_assume(D):
    """x and the result, and rows that consist of whole 16-byte words, start at a multiple of 16 bytes."""
    storage = torch.empty(3 * 40 * (D + 3) + 1, dtype=torch.float16)
    for x in (
        storage[1:].as_strided((3, 40, D), (40 * D, D, 1)),
        storage.as_strided((3, 40, D), (40 * (D + 3), D + 3, 1)),
        storage.as_strided((3, 40, D), (1, D, 1)),
        storage.as_strided((3, 40, D), (40 * D, D, 1)),
    ):
        for one in launch.compress(x, 11, 2).launches:
            align = one.constants.get("ALIGN", 1)
            assert align in ((16, 1) if D * 2 % 16 == 0 else (2, 1))
            for name in {"x", "result"} & one.args.keys():
                assert one.args[name].data_ptr() % align == 0
                assert all(stride * 2 % align == 0 for stride in one.args[name].stride()[:-1])


def run(script: str, **environment: str) -> None:
    """Runs code in a new Python process, without the test interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env={"PATH": "", **environment}
    )
    assert done.returncode == 0, done.stderr


def test_import_stays_light():
    """Triton is not imported before a call needs it: neither by the import of the package, nor by a call on the CPU."""
    run("""
import sys, torch, apet_kernels
apet_kernels.compress(torch.arange(60.0).reshape(1, 12, 5).sin(), 4, 2)
loaded = [m for m in sys.modules if m.split(".")[0] == "triton" or "triton_kernels" in m]
assert not loaded, loaded
""")


WITHOUT = """
import sys
sys.modules["triton"] = None  # what Python makes of a package that is not there
import torch, apet_kernels
x = torch.arange(60.0).reshape(1, 12, 5).sin()
"""


def test_without_triton():
    run(
        WITHOUT
        + """
why = apet_kernels.why_unavailable("triton")
assert "pip install apet-kernels[triton]" in why and why.startswith("Triton"), why
try:
    apet_kernels.compress(x, 4, 2, backend="triton")
except ValueError as error:
    assert why in str(error) and "\\n" not in str(error), error
else:
    raise AssertionError("backend='triton' ran")
a, b = apet_kernels.compress(x, 4, 2), apet_kernels.reference.compress(x, 4, 2)
assert a[1].equal(b[1])
"""
    )


@on_the_cpu
def test_without_a_gpu():
    """Triton is installed, but there is no GPU."""
    run("""
import torch, apet_kernels
why = apet_kernels.why_unavailable("triton")
assert "no GPU" in why, why
x = torch.zeros(1, 12, 5)
try:
    apet_kernels.compress(x, 4, 2, backend="triton")
except ValueError as error:
    assert why in str(error), error
else:
    raise AssertionError("backend='triton' ran")
""")
