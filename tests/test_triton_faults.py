"""The interpreter of the Triton kernels finds every kind of fault, and rejects a Triton that it does not support."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.judge import assert_same

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU"),
    pytest.mark.interpreter,
]
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

N = 64


@triton.jit
def copy(x, out, n, shift, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(out + i, tl.load(x + i + shift, mask=i < n), mask=i < n)


@pytest.mark.parametrize(
    ("n", "shift", "message"),
    [
        (31, 0, None),
        (31, 1, r"program 1 loads out of bounds.* 1 elements of x, first at byte 124"),
        (31, -1, r"program 0 loads out of bounds.* 1 elements of x, first at byte -4"),
        (32, -1, "program 0 loads out of bounds"),
        (32, 0, "program 1 loads out of bounds"),
    ],
)
def test_bounds_are_the_tensors(n, shift, message):
    """The bounds are those of the tensor, not of the storage that two tensors share, nor of the process' memory."""
    storage = torch.arange(100.0)
    x, out = storage[10:41], storage[50:82]
    launch = lambda: copy[(2,)](x, out, n, shift, 16)  # noqa: E731
    if message is None:
        launch()
        assert_same(out[:31], x)
        return
    with pytest.raises(InterpreterError, match=message):
        launch()


def test_a_store_out_of_bounds():
    with pytest.raises(
        InterpreterError, match=r"program 1 stores out of bounds.* 5 elements of out, first at byte 108"
    ):
        copy[(2,)](torch.zeros(32), torch.zeros(27), 32, 0, 16)


def test_a_view_ends_where_its_last_element_does():
    x = torch.zeros(4, 32)[:, :16]  # 3 * 32 + 16 elements
    copy[(7,)](x, torch.zeros(112), 112, 0, 16)
    with pytest.raises(InterpreterError, match="program 7 loads out of bounds"):
        copy[(8,)](x, torch.zeros(128), 128, 0, 16)


@triton.jit
def between(x, out, store_at, load_at, N: tl.constexpr):
    p = tl.program_id(0)
    tl.store(out + 4 + p * store_at, p)
    tl.store(x + p, tl.load(out + load_at + p * store_at))


@triton.jit
def load_then_store(x, out, N: tl.constexpr):
    p = tl.program_id(0)
    tl.store(x + p, tl.load(out + 1))
    if p == 1:
        tl.store(out + 1, p)


@pytest.mark.parametrize(
    ("store_at", "load_at", "message"),
    [
        (0, 8, "program 1 stores what another program stores: 1 elements of out"),
        (4, 0, "program 1 loads what another program stores: 1 elements of out"),
    ],
)
def test_programs_race(store_at, load_at, message):
    x, out = torch.zeros(2, dtype=torch.int32), torch.zeros(16, dtype=torch.int32)
    with pytest.raises(InterpreterError, match=message):
        between[(2,)](x, out, store_at, load_at, 1)


def test_programs_race_the_other_way_round():
    x, out = torch.zeros(2, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(InterpreterError, match="program 1 stores what another program loads: 1 elements of out"):
        load_then_store[(2,)](x, out, 1)


def test_one_storage_given_twice():
    storage = torch.zeros(24)
    with pytest.raises(InterpreterError, match="program 1 loads what another program stores: 8 elements of x"):
        copy[(2,)](storage[:16], storage[8:], 16, 0, 8)


@triton.jit
def reverse(x, out, LOAD: tl.constexpr, STORE: tl.constexpr, BARRIER: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    if LOAD:
        v = tl.load(out + i)
    else:
        v = i
        tl.store(out + i, i)
    if BARRIER:
        tl.debug_barrier()
    if STORE:
        tl.store(out + N - 1 - i, v)
    else:
        tl.store(x + i, tl.load(out + N - 1 - i))


@pytest.mark.parametrize(
    ("LOAD", "STORE", "message"),
    [
        (False, False, "loads what it stored, no barrier between: 64 elements of out"),
        (True, True, "stores what it loaded, no barrier between: 64 elements of out"),
        (False, True, "stores over what it stored, no barrier between: 64 elements of out"),
    ],
)
def test_a_missing_barrier(LOAD, STORE, message):
    x, out = torch.zeros(N, dtype=torch.int32), torch.arange(N, dtype=torch.int32)
    reverse[(1,)](x, out, LOAD, STORE, True, N)
    assert (out if STORE else x).tolist() == list(reversed(range(N)))
    with pytest.raises(InterpreterError, match=message):
        reverse[(1,)](x, out, LOAD, STORE, False, N)


@triton.jit
def halve(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i // 2, tl.load(x + i))


def test_a_store_of_two_values():
    out = torch.zeros(N // 2)
    halve[(1,)](torch.ones(N), out, N)  # storing the same value twice is no fault
    assert out.eq(1).all()
    with pytest.raises(InterpreterError, match="stores different values at once: 32 elements of out, first at byte 0"):
        halve[(1,)](torch.arange(float(N)), out, N)


@triton.jit
def mark(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i % 3, tl.load(x))
    tl.store(out + i % 5, tl.load(x + 1))


def test_a_store_of_what_is_there():
    out = torch.zeros(5)
    mark[(1,)](torch.ones(2), out, N)
    assert out.eq(1).all()
    with pytest.raises(InterpreterError, match=r"stores over what it stored, no barrier between: .* of out"):
        mark[(1,)](torch.tensor([1.0, 2.0]), out, N)


@triton.jit
def largest(x, out, N: tl.constexpr):
    tl.store(out, tl.argmax(tl.load(x + tl.arange(0, N)), 0))


def test_an_arg_max_over_nan():
    x, out = torch.arange(float(N)), torch.zeros(1, dtype=torch.int32)
    largest[(1,)](x, out, N)
    assert out.item() == N - 1
    x[5] = torch.nan
    with pytest.raises(InterpreterError, match="arg-max"):
        largest[(1,)](x, out, N)


@triton.jit
def count(out):
    tl.atomic_add(out, 1)


def test_atomics_raise():
    with pytest.raises(InterpreterError, match="atomics"):
        count[(1,)](torch.zeros(1, dtype=torch.int32))


@triton.jit
def promise(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    rows = tl.multiple_of(x + n * i, 16)
    tl.store(out + i, tl.load(rows))


def test_a_promise_that_does_not_hold():
    x, out = torch.arange(4.0 * N + 1), torch.zeros(N)
    promise[(1,)](x, out, 4, N)
    assert_same(out, x[: 4 * N : 4].contiguous())
    for tensor, n in ((x, 3), (x[1:], 4)):
        with pytest.raises(InterpreterError, match="does not hold"):
            promise[(1,)](tensor, out, n, N)


# ---- a Triton that is not supported


def imported(change: str) -> str:
    """Returns the error in a new process whose Triton interpreter has this change."""
    script = f"from triton.runtime import interpreter\n{change}\nimport tests.triton_interpreter as it\nit.install()"
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 1, done.stdout
    return done.stderr.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "said"),
    [
        pytest.param("del interpreter._get_np_dtype", "has no _get_np_dtype", marks=pytest.mark.slow),
        pytest.param(
            "del interpreter.InterpreterBuilder.create_masked_load",
            "has no InterpreterBuilder.create_masked_load",
            marks=pytest.mark.slow,
        ),
        ("interpreter._interpreter.load = lambda *_: None", "does not run a kernel of the tests"),
    ],
)
def test_another_interpreter_is_named(change, said):
    """The error names the version and the failed check; tests/conftest.py then skips with this reason."""
    line = imported(change)
    assert line.startswith(f"ImportError: Triton {triton.__version__}'s interpreter {said}"), line
