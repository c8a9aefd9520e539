"""csrc/cuda_torch_binding.cpp, executed: its ops on CPU tensors, through torch's dispatcher, over the simulated GPU.

tests/simt/torch_binding.cpp explains the stand-ins for a GPU. The shared tests check the kernels. These tests check
that every tensor and option is passed in its place, and that every result is returned.
"""

from __future__ import annotations

import re

import pytest
import torch

import apet_kernels
from apet_kernels import available, choice, dispatch, ops, plans, reference, testing
from apet_kernels.options import PAPER, Options
from benchmarks.quick import figures
from tests.data import DTYPES, tokens
from tests.judge import assert_same
from tests.op_calls import NAMES, WRONG_CALLS, calls, error_of, flat
from tests.simt import abi, binding, build, call

pytestmark = [
    pytest.mark.skipif(build.missing() is not None, reason=str(build.missing())),
    pytest.mark.skipif(available.why_not_cpu() is not None, reason="built without torch's headers"),
]
HOW = call.How()


@pytest.fixture(autouse=True)
def device() -> None:
    """Sets the device that the binding plans for."""
    binding.load()
    call.use_device(HOW.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_argument_arrives(name, dtype):
    """The results are bit for bit those of the C interface."""
    op, args, options = calls(dtype)[name]
    op_name = op.__name__
    with call.always(HOW) as functions:
        expected = flat(getattr(functions, op_name)(*args, **options))
    for got, wanted in zip(flat(dispatch.run_cuda(op_name, *args, **options)), expected, strict=True):
        assert_same(got, wanted)


def apart(t: torch.Tensor) -> torch.Tensor:
    """Returns t with gaps between its rows and before its first element; the last dimension of tokens stays
    contiguous."""
    room = t.new_zeros([2 * size + 1 for size in t.shape])
    last = slice(1, 1 + t.shape[-1]) if t.is_floating_point() else slice(1, None, 2)
    return room[(*[slice(1, None, 2)] * (t.dim() - 1), last)].copy_(t)


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_any_form(name):
    op, args, options = calls()[name]
    expected = flat(dispatch.run_cuda(op.__name__, *args, **options))
    moved = [apart(a) if isinstance(a, torch.Tensor) else a for a in args]
    for got, wanted in zip(flat(dispatch.run_cuda(op.__name__, *moved, **options)), expected, strict=True):
        assert_same(got, wanted)


@pytest.mark.parametrize(("name", "args", "options", "words"), WRONG_CALLS, ids=[f"{r[0]}-{r[3]}" for r in WRONG_CALLS])
def test_errors_are_those_of_the_op(name, args, options, words):
    said = error_of(getattr(torch.ops.apet, f"_cuda_{name}"), args, options)
    assert said == error_of(getattr(torch.ops.apet, name), args, options)
    assert re.search(words, said), said


def test_tensors_beside_x():
    """torch's dispatcher calls the binding if any tensor is on the GPU; x or the others may be elsewhere."""
    x, at = tokens(2, 20, 7, seed=1), torch.zeros(2, 3, dtype=torch.int64)
    here = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    merge = torch.ops.apet._cuda_merge.default
    assert error_of(lambda: merge.redispatch(here, x, at.to("meta")), (), {}) == (
        "indices is on another device, but x is on cpu"
    )
    targets = at.bool().to("meta")
    assert "targets is on another" in error_of(lambda: merge.redispatch(here, x, at, targets=targets), (), {})
    varlen = torch.ops.apet._cuda_compress_varlen.default
    packed, cu = tokens(20, 7, seed=1), torch.tensor([0, 20], dtype=torch.int32)
    for wrong in ("cu_seqlens", "cu_keep"):
        offsets = [cu.to("meta") if name == wrong else cu for name in ("cu_seqlens", "cu_keep")]
        assert f"{wrong} is on another device" in error_of(
            lambda o=offsets: varlen.redispatch(here, packed, *o, 20, 20, 20, 3), (), {}
        )


def test_the_device_cannot():
    """A GPU that is too small for any path raises with the message of the plan."""
    call.use_device(call.Device(80, 4, 1 << 10, 1 << 10, 0))
    x = tokens(1, 20, 7, seed=1)
    assert re.search(rf"{choice.NO_PATH} .* with 1024 bytes", error_of(dispatch.run_cuda, ("compress", x, 4), {}))


def test_the_whole_way_from_the_choice(monkeypatch):
    monkeypatch.setattr(available, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(choice, "lower_estimate", lambda *of: ("cuda", ""))
    x = tokens(3, 41, 24, seed=5)
    got = dispatch._run_on_gpu("compress", x, 12, 4, layout="append")
    for a, b in zip(got, reference.compress(x, 12, 4, layout="append"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", ops.LAYOUTS)
def test_plan(layout):
    x = tokens(2, 300, 64, seed=3)
    options = {"layout": layout, "select": "qr", "start": 3, "ridge": 1e-3, "blend": 1.0}
    plan = plans._plan_cuda(x, 40, Options(12, **options))
    expected = call.plan(call.compress_case(x, 40, 12, **options).problem, HOW)
    assert plan == apet_kernels.Plan(
        backend="cuda",
        why=expected.why.decode(),
        launches=expected.launches,
        workspace_bytes=expected.workspace_bytes,
        details={
            "path": abi.PATHS[expected.path],
            "images_in_flight": expected.images_in_flight,
            "ctas_per_image": expected.ctas_per_image,
            "rows_per_cta": expected.slice,
            "rows_in_shared_memory": expected.resident,
            "tile": expected.tile,
            "tile_rows": expected.tile_rows,
            "estimated_us": expected.estimated_us,
        },
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_choice_compares(dtype, monkeypatch):
    """The estimate of an image by the paper's rule, whatever path is forced; and the table of figures."""
    expected = call.plan(call.compress_case(tokens(1, 300, 24, dtype=dtype), 40, **PAPER).problem, HOW).estimated_us
    like = torch.empty(0, 24, dtype=dtype)
    binding.stand_in(HOW.device, monkeypatch.setattr)
    for way in (testing.CudaPath(), testing.CudaPath("cooperative", 3)):
        with testing.use_cuda_path(way):
            assert torch.ops.apet._cuda_estimate(like, 300, 40) == expected
    for capability in (90, 80, 12, 103, 121):
        row = dict(zip(ops.FIGURES, torch.ops.apet._cuda_figures(like, capability), strict=True))
        expected_row = figures.row_of(figures.read((build.CSRC / "cuda/figures.cuh").read_text()), capability)
        assert row | {"capability": expected_row["capability"]} == expected_row
