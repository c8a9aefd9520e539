"""`torch.ops.apet.*` as PyTorch operators, and `apet_kernels.*` in front of them: schemas, fakes, tracing, errors."""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import apet_kernels
from apet_kernels import testing
from tests.data import DTYPES, offsets, tokens
from tests.judge import assert_same
from tests.op_calls import CU, CU_KEEP, NAMES, WRONG_CALLS, calls, error_of, flat, x3

OPS = torch.ops.apet


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    op, args, options = calls(dtype)[name]
    torch.library.opcheck(op.default, args, options)


def test_schemas():
    options = "int start=-1, float ridge=1.0000000000000001e-05"
    layout = f'str layout="inplace", str select="qr", {options}, float blend=1., int refine=0, Tensor? weights=None'
    pair = "(Tensor tokens, Tensor indices)"
    assert str(OPS.compress.default._schema) == (
        f"apet::compress(Tensor x, SymInt keep, int? basis=None, *, {layout}) -> {pair}"
    )
    assert str(OPS.compress_varlen.default._schema) == (
        "apet::compress_varlen(Tensor x, Tensor cu_seqlens, Tensor cu_keep, SymInt total_keep, SymInt max_seqlen, "
        f"SymInt max_keep, int? basis=None, *, {layout}) -> {pair}"
    )
    assert str(OPS.score.default._schema) == (
        f'apet::score(Tensor x, int? basis=10, *, str select="fps", {options}) -> '
        "(Tensor residual, Tensor basis_indices)"
    )
    assert str(OPS.merge.default._schema) == "apet::merge(Tensor x, Tensor indices, *, Tensor? targets=None) -> Tensor"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_fakes_have_the_shapes_of_the_results(name, dtype):
    op, args, options = calls(dtype)[name]
    real = flat(op(*args, **options))
    with FakeTensorMode() as mode:
        fake_args, fake_options = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, (args, options))
        fakes = flat(op(*fake_args, **fake_options))
    meta_args, meta_options = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, options))
    metas = flat(op(*meta_args, **meta_options))
    for r, f, m in zip(real, fakes, metas, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)
        assert (r.shape, r.dtype, r.stride()) == (m.shape, m.dtype, m.stride())


@pytest.mark.parametrize("name", NAMES)
def test_compile_without_a_graph_break(name):
    op, args, options = calls()[name]

    def layer(*args):
        first, *rest = flat(op(*(a * 1 if isinstance(a, torch.Tensor) else a for a in args), **options))
        return first + 1, *rest

    torch._dynamo.reset()  # torch limits how often the same code is compiled, and every op is one more time
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for got, expected in zip(compiled(*args), layer(*args), strict=True):
            assert_same(got, expected)


def test_dynamic_shapes_compile_once():
    frames, counter = [], CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(x, keep):
        tokens_, indices = apet_kernels.compress(x, keep, 4, layout="append")
        return tokens_ * 2, indices, OPS.score(x, 4)[0]

    for B, N, keep in ((2, 20, 5), (3, 31, 9), (7, 64, 33)):
        x = tokens(B, N, 6, seed=N)
        got = layer(x, keep)
        expected, indices = apet_kernels.compress(x, keep, 4, layout="append")
        assert_same(got[0], expected * 2)
        assert_same(got[1], indices)
        frames.append(counter.frame_count)
    assert frames == frames[:1] * 3


def test_marked_dimensions_compile_once():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def layer(x):
        tokens_, _ = OPS.compress(x, x.shape[1] // 4, 3)
        return tokens_.sum(-1)

    for B, N in ((2, 24), (5, 40), (4, 100)):
        x = tokens(B, N, 6, seed=N)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        assert layer(x).shape == (B, N // 4)
    assert counter.frame_count == 1


def test_dynamic_packing_compiles_once():
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, dynamic=True, backend=counter)
    def layer(x, cu, cu_keep, total, longest, most):
        return OPS.compress_varlen(x, cu, cu_keep, total, longest, most, 3)

    for lengths, keeps in (([8, 12], [4, 5]), ([30, 11, 7, 9], [10, 5, 4, 6]), ([50, 3, 8], [40, 2, 4])):
        cu, cu_keep = offsets(lengths), offsets(keeps)
        x = tokens(sum(lengths), 6, seed=1)
        got = layer(x, cu, cu_keep, sum(keeps), max(lengths), max(keeps))
        for a, b in zip(got, apet_kernels.compress_packed(x, lengths, keeps, 3), strict=True):
            assert_same(a, b)
    assert counter.frame_count == 1


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, x):
            tokens_, indices = torch.ops.apet.compress(x, 5, 3)
            return tokens_ + 1, indices

    dims = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("N", min=6, max=4096)}
    program = torch.export.export(Layer(), (tokens(2, 20, 8),), dynamic_shapes={"x": dims})
    assert any("apet.compress" in str(node.target) for node in program.graph.nodes)
    x = tokens(3, 47, 8, seed=3)
    for got, expected in zip(program.module()(x), Layer()(x), strict=True):
        assert_same(got, expected)


def test_a_program_that_returns_named_tuples_can_be_saved(tmp_path):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return apet_kernels.compress(x, 5, 3), apet_kernels.score(x, 3)

    x = tokens(2, 20, 8)
    torch.export.save(torch.export.export(Layer(), (x,)), tmp_path / "program.pt2")
    got = torch.export.load(tmp_path / "program.pt2").module()(x)
    assert [type(one).__name__ for one in got] == ["Compressed", "Scored"]
    for one, other in zip(got, Layer()(x), strict=True):
        for value, expected in zip(one, other, strict=True):
            assert_same(value, expected)


def test_export_with_lengths_that_the_data_determine():
    """Bounds from .item() are symbols without a range, on which no check may branch."""

    class Layer(torch.nn.Module):
        def forward(self, x, cu):
            longest = (cu[1:] - cu[:-1]).max().item()
            return torch.ops.apet.compress_varlen(x, cu, CU_KEEP, 9, longest, 5, 3)

    x = x3(20, 7)
    program = torch.export.export(Layer(), (x, CU))
    for got, expected in zip(program.module()(x, CU), Layer()(x, CU), strict=True):
        assert_same(got, expected)


# ---- errors: one message, which contains the wrong value


@pytest.mark.parametrize(("name", "args", "options", "words"), WRONG_CALLS, ids=[f"{r[0]}-{r[3]}" for r in WRONG_CALLS])
def test_errors(name, args, options, words):
    """The op, its fake, and the reference raise the same error."""
    said = error_of(getattr(OPS, name), args, options)
    assert re.search(words, said), said
    assert error_of(getattr(apet_kernels, name), args, {**options, "backend": "reference"}) == said
    meta_args, meta_options = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), (args, options))
    assert error_of(getattr(OPS, name), meta_args, meta_options) == said


@pytest.mark.parametrize(
    ("lengths", "keeps", "options", "words"),
    [
        ([9, 12], [4, 5], {}, r"21.*20"),
        ([9, 11], [4], {}, r"2 lengths.*1 keeps"),
        ([9, 11], [4, 12], {}, r"keep=12.*11.*image 1"),
        ([9, 11], [0, 5], {}, r"keep=0.*image 0"),
        ([9, 11], [5.5, 5], {}, r"keep=5.5 of image 0"),
        ([9, 0, 11], [3, 1, 5], {}, r"image 1 has 0 tokens"),
        ([9, 11], [4, 3], {"layout": "overwrite", "basis": 3}, r"keep=3.*image 1.*basis=3"),
    ],
)
def test_errors_of_lists(lengths, keeps, options, words):
    with pytest.raises(ValueError, match=words):
        apet_kernels.compress_packed(x3(20, 7), lengths, keeps, **options)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        ((CU, [4, 5]), "must both be tensors"),
        (([9, 11], CU_KEEP, 9, 11, 5), "must both be tensors"),
        ((CU, CU_KEEP), "total_keep=None"),
        ((CU, CU_KEEP, 9, 11), "max_keep=None must be given"),
        (([9, 11], [4, 5], 99), "total_keep=99.* follow from the lists"),
    ],
)
def test_errors_of_offsets(offsets, words):
    with pytest.raises(ValueError, match=words):
        apet_kernels.compress_varlen(x3(20, 7), *offsets)


@pytest.mark.parametrize("name", NAMES)
def test_an_input_with_a_tangent_raises(name):
    """torch takes a missing tangent of a result for 0."""
    op, args, options = calls()[name]
    python = getattr(apet_kernels, name.split()[0])
    with forward_ad.dual_level():
        dual = (forward_ad.make_dual(args[0], torch.ones_like(args[0])), *args[1:])
        assert "has a tangent" in error_of(op, dual, options)
        assert "has a tangent" in error_of(python, dual, options)
        op(*args, **options)

    def first(x):
        found = op(x, *args[1:], **options)
        return found if isinstance(found, torch.Tensor) else found[0]

    with pytest.raises((RuntimeError, ValueError), match="has a tangent"):
        torch.func.jvp(first, (args[0],), (torch.ones_like(args[0]),))


def test_empty_tensors_of_any_strides():
    x = torch.empty(0, 7, 20).transpose(1, 2)
    tokens, indices = apet_kernels.compress(x, 4)
    assert (tokens.shape, indices.shape) == ((0, 4, 7), (0, 4))


@pytest.mark.parametrize("name", NAMES)
def test_an_input_that_requires_grad_raises(name):
    op, args, options = calls()[name]
    args = (args[0].requires_grad_(), *args[1:])
    assert "requires grad" in error_of(op, args, options)
    python = getattr(apet_kernels, name.split()[0])
    assert "requires grad" in error_of(python, args, options)
    assert "requires grad" in error_of(python, args, {**options, "backend": "reference"})
    for quiet in (torch.no_grad, torch.inference_mode):
        with quiet():
            for r in flat(op(*args, **options)) + flat(python(*args, **options, backend="reference")):
                assert not r.requires_grad


def test_accepted_at_the_limits():
    x = tokens(1, 70, 4)
    assert OPS.compress(x, 70, 64, layout="overwrite")[0].shape == (1, 70, 4)
    assert OPS.compress(x, 65, 64, layout="overwrite", blend=0.0)[0].shape == (1, 65, 4)
    assert OPS.compress(x, 1, 1, start=69, ridge=0.0)[0].shape == (1, 1, 4)
    assert OPS.compress(tokens(1, 6, 5).transpose(1, 2)[:, :, :1], 2, 1)[0].shape == (1, 2, 1), "D = 1 has any stride"


# ---- the Python wrappers


@pytest.mark.parametrize("backend", [None, "reference"])
def test_lists_of_lengths(backend):
    x = tokens(20, 7, seed=4)
    got = apet_kernels.compress_packed(x, [9, 11], [4, 5], 3, layout="append", backend=backend)
    expected = apet_kernels.compress_varlen(x, CU, CU_KEEP, 9, 11, 5, 3, layout="append", backend=backend)
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b)


def test_backends():
    x = tokens(1, 9, 4)
    usable = apet_kernels.available_backends()
    assert usable[-1] == "reference"
    for name in ("cpu", "triton", "cuda", "reference"):
        why_not = apet_kernels.why_unavailable(name)
        assert (why_not is None) == (name in usable)
        if why_not:
            assert why_not in error_of(apet_kernels.compress, (x, 3), {"backend": name})
            assert why_not in error_of(apet_kernels.merge, (x, torch.zeros(1, 1).long()), {"backend": name})
    if "cpu" in usable:
        assert "meta" in error_of(apet_kernels.score, (x.to("meta"), 3), {"backend": "cpu"})


@pytest.mark.skipif("cpu" not in apet_kernels.available_backends(), reason="the CPU library is not built")
def test_instruction_sets():
    names = testing.cpu_isa()
    assert names[0] == "generic"
    x86, arm = {"avx2", "avx512", "avx512_bf16", "amx", "amx_fp16"}, {"neon", "neon_bf16"}
    here = {"x86_64": x86, "aarch64": arm}.get(platform.machine(), set())
    assert set(names[1:]) <= here
    for absent in {"sse9", *x86, *arm} - here:
        with pytest.raises(ValueError, match=f"^isa='{absent}' is none of those usable here: generic"):
            testing.use_cpu_isa(absent)
    try:
        for name in names:
            testing.use_cpu_isa(name)
            assert apet_kernels.plan(tokens(1, 9, 4), 3).details["isa"] == name
    finally:
        testing.use_cpu_isa(None)
    assert apet_kernels.plan(tokens(1, 9, 4), 3).details["isa"] == names[-1]


def test_without_the_compiled_library(tmp_path: Path):
    """A pure wheel: the same ops run the reference, and one warning explains how to get the kernels."""
    source = Path(apet_kernels.__file__).parent
    shutil.copytree(source, tmp_path / "apet_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    script = """
import sys
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in repr(f)]  # it would find the real _host
import warnings, torch, apet_kernels
x = torch.arange(60.0).reshape(1, 12, 5).sin()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    a = torch.ops.apet.compress(x, 4, 2)
    torch.ops.apet.score(x, 2)
assert len(caught) == 1 and "install" in str(caught[0].message), [str(w.message) for w in caught]
b = apet_kernels.reference.compress(x, 4, 2)
assert a[0].equal(b[0]) and a[1].equal(b[1])
assert torch.compile(torch.ops.apet.compress, fullgraph=True, backend="eager")(x, 4, 2)[0].equal(b[0])
from apet_kernels import testing
assert "not part" in apet_kernels.why_unavailable("cpu") and testing.cpu_isa() == [] and apet_kernels.build_info() == {}
assert apet_kernels.plan(x, 4, 2).backend == "reference"
try:
    testing.use_cpu_isa("generic")
except ValueError as error:
    assert "_host is not part of this installation" in str(error), error
else:
    raise AssertionError("there is nothing to pin")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
