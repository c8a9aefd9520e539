"""Triton's interpreter with its missing parts: bfloat16, and errors for faults that a GPU would not report. Tests only.

`TRITON_INTERPRET=1` runs the programs of a kernel one after another in numpy. After `install()`

- bfloat16 is computed on values and rounded to nearest even (Triton computes on its bits, and truncates), and an fma
  rounds once;
- it is an error if a load or store is outside of the tensor of its pointer, even by one byte;
- or if one program stores an element and another one loads or stores it, since programs run in any order, and at once;
- or if a program loads an element after storing it, stores it after loading it, or stores it twice with different
  values, without a `tl.debug_barrier()` in between: threads of a program are not synchronised, and several may access
  an element;
- or if one store writes different values to one element, or an arg-max or arg-min is over a NaN, since the results
  depend on the order of execution;
- or if a `tl.multiple_of` is wrong, since a GPU would load from another address, or not at all.

The error is an `InterpreterError` that names the argument of the kernel. The interpreter cannot show whether the
compiler keeps the kernel's meaning, and how shared memory is used.

It runs with Triton 3.5.1 to 3.9.0. It replaces internal parts of Triton, so the import of this module checks that these
exist, and `install()` runs a kernel with known results. With another version, a missing or wrong part raises an
ImportError that names part and version; tests/conftest.py then skips the tests that need the interpreter.
"""

from __future__ import annotations

import ctypes
import functools
import types
from typing import Any

import ml_dtypes
import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError

HERE = f"Triton {triton.__version__}'s interpreter"
# All parts of Triton that are called, replaced or overridden below.
RELIES_ON = ["TensorHandle", "InterpreterOptions", "_get_np_dtype", "_patch_lang", "_ir.ROUNDING_MODE.RTNE"]
RELIES_ON += ["interpreter_builder", "ReduceOps.apply_impl", "GridExecutor.__call__"]
RELIES_ON += ["GridExecutor._init_args_hst", "GridExecutor._restore_args_dev", "TensorHandle.get_element_ty"]
RELIES_ON += [
    f"InterpreterBuilder.{name}"
    for name in ("set_grid_idx", "create_barrier", "create_masked_load", "create_masked_store", "create_atomic_cas")
]
RELIES_ON += [
    f"InterpreterBuilder.{name}"
    for name in ("create_atomic_rmw", "cast_impl", "create_fp_to_fp", "create_fma", "create_dot")
]


def missing(names: list[str]) -> list[str]:
    """Returns the operations that this Triton's interpreter does not have."""

    def has(name: str) -> bool:
        found: Any = interpreter
        for part in name.split("."):
            found = getattr(found, part, None)
        return found is not None

    return [name for name in names if not has(name)]


if lacks := missing(RELIES_ON):
    raise ImportError(f"{HERE} has no {', '.join(lacks)}")

TensorHandle = interpreter.TensorHandle

# A pointer is (slot << SLOT) + ORIGIN + bytes from the start of its tensor, with the alignment of the true pointer. So
# no offset leads into another tensor.
SLOT, ORIGIN, PAGE = 44, 1 << 43, 4096
NONE_YET, SEVERAL = -1, -2
NAN_IS_ORDER = "an arg-max or arg-min over NaN depends on the order of the comparisons"

_np_dtype, _apply_reduce = interpreter._get_np_dtype, interpreter.ReduceOps.apply_impl


class Storage:
    """The record of which program touched each byte of one storage during one launch."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.address, size = storage.data_ptr(), storage.nbytes()
        self.stored_by = np.full(size, NONE_YET, np.int32)  # program
        self.loaded_by = np.full(size, NONE_YET, np.int32)  # program, or SEVERAL
        self.stored_in = np.full(size, NONE_YET, np.int32)  # stretch of a program, between two barriers
        self.loaded_in = np.full(size, NONE_YET, np.int32)
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.address))

    def read(self, at: np.ndarray, itemsize: int) -> np.ndarray:
        """Returns the bits of the elements that start at bytes `at`."""
        return self.bytes[at[:, None] + np.arange(itemsize)].view(f"u{itemsize}")[:, 0]


class Argument:
    """A tensor argument of a kernel, to which the interpreter gives a separate address."""

    def __init__(self, name: str, slot: int, tensor: Tensor, storage: Storage) -> None:
        self.name, self.storage, self.dtype = name, storage, tensor.dtype
        self.first = (slot << SLOT) + ORIGIN + tensor.data_ptr() % PAGE
        self.start = tensor.data_ptr() - storage.address  # bytes
        steps = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((n - 1) * stride for n, stride in steps) if tensor.numel() else 0
        self.extent = span * tensor.element_size()  # bytes

    def data_ptr(self) -> int:
        return self.first


class Launch:
    """The tensors of one launch, and the progress of its programs."""

    def __init__(self) -> None:
        self.arguments: list[Argument] = []
        self.storages: dict[int, Storage] = {}
        self.program = self.stretch = 0

    def take(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        memory = value.untyped_storage()
        storage = self.storages.setdefault(memory.data_ptr(), Storage(memory))
        self.arguments.append(Argument(name, len(self.arguments), value, storage))
        return self.arguments[-1]

    def access(self, pointers: np.ndarray, mask: np.ndarray, itemsize: int, values: np.ndarray | None) -> np.ndarray:
        """Checks a load, or a store of `values`; returns the true addresses of unmasked elements, 0 elsewhere."""
        addresses = np.zeros(pointers.shape, np.uint64)
        mask = np.broadcast_to(mask, pointers.shape)
        slots = pointers >> np.uint64(SLOT)
        for slot in np.unique(slots[mask]):
            argument = self.arguments[int(slot)]
            here = mask & (slots == slot)
            offset = pointers[here].astype(np.int64) - argument.first
            outside = (offset < 0) | (offset + itemsize > argument.extent)
            does = "loads" if values is None else "stores"
            self._reject(argument, outside, f"{does} out of bounds (0..{argument.extent} bytes)", offset)
            at = argument.start + offset
            if values is None:
                self._load(argument, at)
            else:
                self._store(argument, at, np.broadcast_to(values, pointers.shape)[here])
            addresses[here] = (argument.storage.address + at).astype(np.uint64)
        return addresses

    def _load(self, argument: Argument, at: np.ndarray) -> None:
        memory = argument.storage
        stored, loaded = memory.stored_by[at], memory.loaded_by[at]
        self._reject(argument, (stored != NONE_YET) & (stored != self.program), "loads what another program stores", at)
        self._reject(argument, memory.stored_in[at] == self.stretch, "loads what it stored, no barrier between", at)
        memory.loaded_by[at] = np.where((loaded == NONE_YET) | (loaded == self.program), self.program, SEVERAL)
        memory.loaded_in[at] = self.stretch

    def _store(self, argument: Argument, at: np.ndarray, values: np.ndarray) -> None:
        memory = argument.storage
        for by, does in ((memory.stored_by[at], "stores"), (memory.loaded_by[at], "loads")):
            self._reject(argument, (by != NONE_YET) & (by != self.program), f"stores what another program {does}", at)
        bits = np.ascontiguousarray(values).view(f"u{values.itemsize}")
        again = memory.stored_in[at] == self.stretch
        again[again] = memory.read(at[again], values.itemsize) != bits[again]
        self._reject(argument, again, "stores over what it stored, no barrier between", at)
        loaded = memory.loaded_in[at] == self.stretch
        self._reject(argument, loaded, "stores what it loaded, no barrier between", at)
        order = np.argsort(at, kind="stable")
        bits = bits[order]
        differ = (at[order][1:] == at[order][:-1]) & (bits[1:] != bits[:-1])
        self._reject(argument, differ, "stores different values at once", at[order][1:])
        memory.stored_by[at] = self.program
        memory.stored_in[at] = self.stretch

    def _reject(self, argument: Argument, where: np.ndarray, what: str, at: np.ndarray) -> None:
        if where.any():
            raise RuntimeError(
                f"program {self.program} {what}: {int(where.sum())} elements of {argument.name}, first at byte "
                f"{at[where][0]}"
            )


class Builder(interpreter.InterpreterBuilder):
    """The interpreter's operations, with the checks, and with bfloat16 as a numpy type."""

    launch: Launch

    def __init__(self) -> None:
        super().__init__()
        self.options = interpreter.InterpreterOptions(sanitize_overflow=False)  # computed, then read in debug mode only

    def set_grid_idx(self, x: int, y: int, z: int) -> None:
        super().set_grid_idx(x, y, z)
        self.launch.program = (x * self.grid_dim[1] + y) * self.grid_dim[2] + z
        self.launch.stretch += 1

    def create_barrier(self) -> None:
        self.launch.stretch += 1

    def create_masked_load(
        self, ptrs: TensorHandle, mask: TensorHandle, other: TensorHandle | None, *rest: Any
    ) -> TensorHandle:
        element = ptrs.get_element_ty()
        addresses = self.launch.access(ptrs.data, mask.data, np_dtype(element).itemsize, None)
        moved = TensorHandle(addresses, tl.pointer_type(bits_of(element)))
        loaded = super().create_masked_load(moved, mask, None if other is None else as_bits(other), *rest)
        return TensorHandle(loaded.data.view(np_dtype(element)), element)

    def create_masked_store(self, ptrs: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> None:
        addresses = self.launch.access(ptrs.data, mask.data, value.data.itemsize, value.data)
        moved = TensorHandle(addresses, tl.pointer_type(bits_of(ptrs.get_element_ty())))
        super().create_masked_store(moved, as_bits(value), mask, *rest)

    def create_atomic_cas(self, *args: Any) -> TensorHandle:
        raise NotImplementedError("atomics are not among what is checked")

    create_atomic_rmw = create_atomic_cas

    def get_bf16(self, value: float) -> TensorHandle:
        return TensorHandle(np.array([value], ml_dtypes.bfloat16), tl.bfloat16)

    def cast_impl(self, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        return TensorHandle(src.data.astype(np_dtype(dst_type)), dst_type.scalar)

    def create_fp_to_fp(self, src: TensorHandle, dst_type: tl.dtype, rounding: Any) -> TensorHandle:
        if rounding not in (None, interpreter._ir.ROUNDING_MODE.RTNE):
            raise NotImplementedError(f"rounding {rounding}")
        return self.cast_impl(src, dst_type)

    def create_fma(self, x: TensorHandle, y: TensorHandle, z: TensorHandle) -> TensorHandle:
        wide = (t.data.astype(np.float64) for t in (x, y))
        return TensorHandle((np.multiply(*wide) + z.data).astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a: TensorHandle, b: TensorHandle, d: TensorHandle, *rest: Any) -> TensorHandle:
        wide = (TensorHandle(t.data.astype(d.data.dtype), d.dtype.scalar) for t in (a, b))
        return super().create_dot(*wide, d, *rest)


class Executor(interpreter.GridExecutor):
    """One launch, on tensors of the CPU."""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        with np.errstate(all="ignore"):  # a GPU does not warn of an infinity
            super().__call__(*args, **kwargs)

    def _init_args_hst(self, args_dev: tuple, kwargs: dict[str, Any]) -> tuple[list, dict[str, Any]]:
        launch = interpreter.interpreter_builder.launch = Launch()
        named = zip(self.arg_names, args_dev, strict=False)
        return [launch.take(*pair) for pair in named], {name: launch.take(name, a) for name, a in kwargs.items()}

    def _restore_args_dev(self, *args: Any) -> None:
        """Does nothing, since nothing was copied."""


def bits_of(dtype: tl.dtype) -> tl.dtype:
    """Returns the type as which libtriton moves an element: from Triton 3.9 on it takes no array of numpy's
    bfloat16."""
    return tl.uint16 if dtype == tl.bfloat16 else dtype


def as_bits(value: TensorHandle) -> TensorHandle:
    """Returns the same bits as a type that libtriton moves."""
    return TensorHandle(value.data.view(np.uint16), tl.uint16) if value.dtype.scalar == tl.bfloat16 else value


def np_dtype(dtype: tl.dtype) -> np.dtype:
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else np_scalar(dtype.scalar)


@functools.cache
def np_scalar(dtype: tl.dtype) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16) if dtype == tl.bfloat16 else _np_dtype(dtype)


def apply_reduce(self: interpreter.ReduceOps, inputs: tuple[tl.tensor, ...]) -> Any:
    if len(inputs) > 1 and np.isnan(inputs[0].handle.data.astype(np.float64)).any():
        raise ValueError(NAN_IS_ORDER)
    return _apply_reduce(self, inputs)


def multiple_of(value: tl.tensor, divisor: Any) -> tl.tensor:
    """Checks the divisor: in elements for an integer, in bytes for a pointer, as in the compiler."""
    divisor = tl.core._unwrap_if_constexpr(divisor)
    if (value.handle.data % divisor).any():
        raise ValueError(f"tl.multiple_of(..., {divisor}) does not hold")
    return value


def index(value: tl.tensor) -> int:
    """Returns the value of a tensor with one element. Before Triton 3.7 it may have a dimension, which numpy 2.4
    does not convert."""
    return int(value.handle.data.squeeze())


class Kept:
    """The patch of triton.language. Triton 3.6 and later undo it after each launch; here it is kept."""

    def restore(self) -> None:
        pass


@triton.jit
def probe(x, y, out, sums, n, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(x + i), tl.load(y + i, mask=i < n, other=0.0)
    total = tl.zeros([N], tl.float32)
    for _ in range(0, tl.cdiv(n, 2)):
        total += tl.fma(a.to(tl.float32), b.to(tl.float32), 1.0)
    tl.store(out + i, a * b)
    tl.store(sums, tl.max(total, 0))
    tl.store(sums + 1, tl.argmax(total, 0).to(tl.float32))


def check() -> None:
    """Raises ImportError unless a test kernel gives the known result, and an out-of-bounds load is found."""
    N, n = 16, 11
    x = torch.linspace(-3, 2.7, N).bfloat16()
    y = torch.linspace(0.1, 4.3, N).bfloat16()
    out, sums = torch.empty(N, dtype=torch.bfloat16), torch.empty(2)
    masked = torch.where(torch.arange(N) < n, y, 0)
    total = 6 * (x.double() * masked.double() + 1)
    try:
        probe[(1,)](x, y, out, sums, n, N)
    except Exception as error:  # of any type, since Triton raises it
        raise ImportError(f"{HERE} does not run a kernel of the tests: {error!r}") from error
    if not torch.equal(out, x * masked):
        raise ImportError(f"{HERE} multiplies bfloat16 to {out.tolist()}, not {(x * masked).tolist()}")
    if sums[1] != total.argmax() or abs(sums[0] - total.max()) > 1e-5:
        raise ImportError(f"{HERE} finds the maximum {sums.tolist()}, not {[float(total.max()), int(total.argmax())]}")
    try:
        probe[(1,)](x[: N - 1], y, out, sums, n, N)
    except InterpreterError as error:
        if "loads out of bounds" in str(error):
            return
    raise ImportError(f"{HERE} loads out of bounds, and the tests do not see it")


def install() -> None:
    """Installs the interpreter, before the first launch of a process. Raises ImportError if it is not reliable here."""
    interpreter._get_np_dtype = np_dtype
    interpreter.ReduceOps.apply_impl = apply_reduce
    interpreter.GridExecutor = Executor
    interpreter.interpreter_builder = Builder()
    interpreter.interpreter_semantic = TritonSemantic(interpreter.interpreter_builder)
    # Patched once. The interpreter would patch triton.language for every function that a kernel calls: half its time.
    interpreter._patch_lang(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: Kept()
    tl.tensor.__index__ = index
    tl.multiple_of = multiple_of
    check()
