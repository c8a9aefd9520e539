"""The public functions of `apet_kernels` and `apet`: signatures, named results, errors, old names and examples."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import inspect
import itertools
import subprocess
import sys
import typing
from pathlib import Path

import apet
import numpy as np
import pytest
import torch
from apet.cli.compress import compress as command

import apet_kernels
from apet_kernels import available, dispatch, host, ops, reference, testing
from apet_kernels.options import LAYOUTS, MAX_BASIS, SELECTS, Options
from tests.data import tokens
from tests.judge import assert_same
from tests.op_calls import CU, CU_KEEP, WRONG_CALLS, error_of, x3

PUBLIC = [getattr(apet_kernels, name) for name in apet_kernels.__all__ if callable(getattr(apet_kernels, name))]
FUNCTIONS = [f for f in PUBLIC if inspect.isfunction(f)] + [testing.cpu_isa, testing.use_cpu_isa]
OF_MODELS = [getattr(apet, name) for name in apet._LAZY if inspect.isfunction(getattr(apet, name))]


# ---- signatures


@pytest.mark.parametrize("op", ops.OPS)
def test_a_function_takes_what_its_op_takes(op):
    """A function has the arguments of its op in the same order, with the same defaults, and `backend`."""
    signature = inspect.signature(getattr(apet_kernels, op))
    (*mine, backend) = signature.parameters.values()
    assert (backend.name, backend.default) == ("backend", None)
    arguments = getattr(torch.ops.apet, op).default._schema.arguments
    assert [p.name for p in mine] == [a.name for a in arguments]
    for parameter, argument in zip(mine, arguments, strict=True):
        assert (parameter.kind is inspect.Parameter.KEYWORD_ONLY) == argument.kwarg_only
        if argument.has_default_value():
            assert parameter.default == argument.default_value


def test_the_options_are_those_of_the_op():
    options = {f.name: f.default for f in dataclasses.fields(Options)}
    assert Options().arguments == options
    arguments = torch.ops.apet.compress.default._schema.arguments
    assert {a.name: a.default_value for a in arguments if a.name not in ("x", "keep", "weights")} == options
    for function in (apet_kernels.compress, apet_kernels.compress_packed, apet_kernels.plan):
        parameters = inspect.signature(function).parameters
        assert {name: p.default for name, p in parameters.items() if name in options} == options
    parameters = inspect.signature(command).parameters  # it has no ridge
    found = {name: p.default for name, p in parameters.items() if name in options}
    assert found["basis"] == "keep"
    found["basis"] = None
    assert {**options, **found} == options
    assert len(found) == len(options) - 1


def test_types_of_the_choices():
    assert typing.get_args(apet_kernels.Layout) == LAYOUTS == ops.LAYOUTS
    assert typing.get_args(apet_kernels.Select) == SELECTS == ops.SELECTS
    assert set(apet_kernels.available_backends()) <= set(typing.get_args(apet_kernels.Backend))
    assert ops.MAX_BASIS == MAX_BASIS


# ---- results


def test_results_have_names_and_unpack():
    x = tokens(2, 20, 7, seed=1)
    result = apet_kernels.compress(x, 6, 3)
    kept, at = result
    assert isinstance(result, apet_kernels.Compressed)
    assert result.tokens is kept
    assert result.indices is at
    scored = apet_kernels.score(x, 3)
    assert isinstance(scored, apet_kernels.Scored)
    assert (scored.residual.shape, scored.basis_indices.shape) == ((2, 20), (2, 3))
    for packed in (
        apet_kernels.compress_varlen(x[0], CU, CU_KEEP, 9, 11, 5, 3),
        apet_kernels.compress_packed(x[0], [9, 11], [4, 5], 3, backend="reference"),
    ):
        assert isinstance(packed, apet_kernels.Compressed)
    with torch.no_grad():
        compiled = torch.compile(lambda x: apet_kernels.compress(x, 6, 3), fullgraph=True, backend="eager")(x)
    assert isinstance(compiled, apet_kernels.Compressed)
    assert_same(compiled.tokens, kept)


def test_a_plan_is_frozen_and_has_the_same_fields_on_every_backend(monkeypatch):
    x = torch.empty(1, 64, 32)
    plan = apet_kernels.plan(x, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.backend = "cuda"
    monkeypatch.setattr(available, "why_not_cpu", lambda: "there is no library")
    assert apet_kernels.plan(x, 8) == apet_kernels.Plan("reference", "there is no library", 0, 0, {})
    if host.has_module():
        monkeypatch.undo()
        names = {"isa", "images_in_flight", "threads_per_image", "serial_us", "planned_us"}
        assert set(plan.details) == names
        assert plan.details["isa"] == testing.cpu_isa()[-1]


# ---- errors


@pytest.mark.parametrize(("name", "args", "options", "words"), WRONG_CALLS, ids=[f"{r[0]}-{r[3]}" for r in WRONG_CALLS])
def test_value_errors_with_the_words_of_the_op(name, args, options, words):
    """The function raises ValueError, whichever backend runs, and the op RuntimeError."""
    with pytest.raises(RuntimeError) as op_error:
        getattr(torch.ops.apet, name)(*args, **options)
    for backend in (None, *apet_kernels.available_backends()):
        with pytest.raises(ValueError, match=words) as error:
            getattr(apet_kernels, name)(*args, **options, backend=backend)
        assert str(error.value) == str(op_error.value).splitlines()[0]
    if name == "compress" and "weights" not in options:
        with pytest.raises(ValueError, match=words) as error:
            apet_kernels.plan(*args, **options)
        assert str(error.value) == str(op_error.value).splitlines()[0]


WRONG = {
    "keep": 99,
    "basis": 65,
    "layout": "sideways",
    "select": "random",
    "start": 20,
    "ridge": -1.0,
    "blend": 1.5,
}


@pytest.mark.parametrize("names", list(itertools.combinations(WRONG, 2)), ids=" and ".join)
def test_of_two_wrong_options_every_side_names_the_same(names):
    x, options = tokens(1, 20, 7), {"keep": 12} | {name: WRONG[name] for name in names}
    said = error_of(torch.ops.apet.compress, (x,), options)
    assert error_of(torch.ops.apet.compress, (x.to("meta"),), options) == said
    assert error_of(apet_kernels.compress, (x,), options | {"backend": "reference"}) == said
    assert error_of(apet_kernels.plan, (x,), options) == said
    keep = options.pop("keep")
    assert error_of(Options(**options).check, (20, keep), {}) == said


def test_errors_that_are_not_the_arguments_stay_what_they_are(monkeypatch):
    """A RuntimeError of the device does not become a ValueError; a wrong type is torch's own error."""

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(dispatch, "run_reference", fail)
    x = tokens(1, 20, 7)
    with pytest.raises(RuntimeError, match="out of memory"):
        apet_kernels.compress(x, 5, backend="reference")
    with pytest.raises(RuntimeError, match="Expected a value of type 'int' for argument 'keep'"):
        apet_kernels.compress(x, "five")


def test_sparse_tensors_are_rejected():
    x = tokens(2, 20, 7)
    for layout in (torch.sparse_coo, torch.sparse_csc):
        for function in (torch.ops.apet.compress, apet_kernels.compress):
            said = error_of(function, (x.to_sparse(layout=layout), 5), {})
            assert said == f"x has layout {layout}; a dense tensor (torch.strided) is needed"


def test_an_unknown_backend():
    for name in ("abacus", "", "CPU"):
        for call in (
            lambda n: apet_kernels.why_unavailable(n),
            lambda n: apet_kernels.score(tokens(1, 9, 4), backend=n),
        ):
            with pytest.raises(ValueError, match=f"^backend='{name}' is none of cpu, triton, cuda, reference$"):
                call(name)


# ---- old names, for one release


def test_backends_is_deprecated():
    with pytest.warns(DeprecationWarning, match="available_backends"):
        old = apet_kernels.backends()
    assert old == {name: apet_kernels.why_unavailable(name) for name in ("cpu", "triton", "cuda", "reference")}
    assert tuple(name for name, why in old.items() if why is None) == apet_kernels.available_backends()


@pytest.mark.parametrize("name", ["cpu_isa", "use_cpu_isa"])
def test_instruction_sets_are_for_tests(name):
    with pytest.warns(DeprecationWarning, match=f"use apet_kernels.testing.{name}"):
        assert getattr(apet_kernels, name) is getattr(testing, name)


def test_compress_varlen_with_lists_is_deprecated():
    x = tokens(20, 7, seed=4)
    with pytest.warns(DeprecationWarning, match="compress_packed") as caught:
        old = apet_kernels.compress_varlen(x, [9, 11], [4, 5], basis=3)
    assert caught[0].filename == __file__
    for got, wanted in zip(old, apet_kernels.compress_packed(x, [9, 11], [4, 5], basis=3), strict=True):
        assert_same(got, wanted)
    compiled = torch.compile(
        lambda x: apet_kernels.compress_varlen(x, [9, 11], [4, 5], basis=3), fullgraph=True, backend="eager"
    )
    assert_same(compiled(x)[0], old[0])


@pytest.mark.skipif(not host.has_module(), reason="the CPU library is not built")
@pytest.mark.parametrize(("old", "new"), [("teams", "images_in_flight"), ("threads_per_team", "threads_per_image")])
def test_a_plan_is_no_dictionary_any_more(old, new):
    plan = apet_kernels.plan(torch.empty(3, 64, 32), 8)
    with pytest.warns(DeprecationWarning, match="returns a Plan"):
        assert plan[old] == plan.details[new]
    for name in ("backend", "why", "launches", "workspace_bytes"):
        with pytest.warns(DeprecationWarning, match="returns a Plan"):
            assert plan[name] == getattr(plan, name)
    with pytest.warns(DeprecationWarning, match="'nothing'"), pytest.raises(KeyError):
        plan["nothing"]


def test_there_is_no_other_name():
    with pytest.raises(AttributeError, match="module 'apet_kernels' has no attribute 'compres'"):
        _ = apet_kernels.compres


# ---- docstrings


@pytest.mark.parametrize(
    "function", [*FUNCTIONS, reference.compress, apet.one_unit, apet.equal_units], ids=lambda f: f.__name__
)
def test_examples_run(function):
    """Every public function has an example, with the results that it shows."""
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (example,) = finder.find(function, function.__name__, globs={"apet": apet, "apet_kernels": apet_kernels})
    assert example.examples, "there is no example"
    assert runner.run(example).failed == 0


@pytest.mark.parametrize("described", [*OF_MODELS, apet.Adapter, apet.Kept.align], ids=lambda f: f.__name__)
def test_examples_with_a_model_call_what_there_is(described):
    """These examples need a model, so they are only parsed, and the arguments that they give to apet are checked."""
    examples = doctest.DocTestParser().get_examples(inspect.getdoc(described))
    assert examples, "there is no example"
    tree = ast.parse("".join(example.source for example in examples))
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "apet":
            function = getattr(apet, call.func.attr)
            inspect.signature(function).bind(*call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def test_the_example_of_the_options_runs():
    (example,) = doctest.DocTestFinder(recurse=False).find(Options, "Options", globs={"Options": Options})
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("function", [*FUNCTIONS, *OF_MODELS], ids=lambda f: f.__name__)
def test_docstrings_name_every_argument(function):
    text = inspect.getdoc(function)
    if parameters := inspect.signature(function).parameters:
        arguments = text.split("\nArgs:\n")[1].split("\n\n")[0]
        for name in parameters:
            assert name in arguments, name
        assert "\nRaises:\n" in text or function not in FUNCTIONS  # some of the others raise nothing


# ---- dir() and type checkers


def test_lazy_names_of_apet():
    """dir() and type checkers find the names, and importing apet imports neither torch nor apet_kernels."""
    assert set(apet.__all__) <= set(dir(apet))
    assert not {"import_module", "TYPE_CHECKING"} & set(dir(apet))
    code = "import sys, apet; dir(apet); print({'torch', 'transformers', 'apet_kernels'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "set()\n", done.stderr
    for name in apet.__all__:
        assert getattr(apet, name) is not None
    tree = ast.parse(Path(apet.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    assert {alias.name: node.module for node in block.body for alias in node.names} == apet._LAZY
    assert set(apet.__all__) == {*apet._LAZY, "Notice", "ApetError", "__version__"}


@pytest.mark.parametrize("backend", [None, "reference"])
def test_integers_of_numpy(backend):
    """They are sizes as Python's are, and wrong ones the same error."""
    x = x3()
    for got, wanted in zip(
        apet_kernels.compress(x, np.int64(5), backend=backend),
        apet_kernels.compress(x, 5, backend=backend),
        strict=True,
    ):
        assert_same(got, wanted)
    with pytest.raises(ValueError, match=r"keep=99 is outside 1\.\.20"):
        apet_kernels.compress(x, np.int64(99), backend=backend)
    assert apet_kernels.plan(x, keep=np.int64(5)) == apet_kernels.plan(x, keep=5)
