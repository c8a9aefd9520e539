"""Calls of the CUDA backend, executed as compiled PTX. The cases, devices and ways are those of tests/simt/call.py."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.simt import build as simt
from tests.simt import call
from tests.simt.call import Case, Fault, How, NoPath

from . import build

# The devices have few multiprocessors, since every resident CTA has 384 threads to interpret.
H100 = replace(call.H100, multiprocessors=4)
A100 = replace(call.A100, multiprocessors=4)


@functools.cache
def load() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build.library()))
    for name in ("ptx_load", "ptx_launches", "ptx_executed", "apet_cuda_error"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.ptx_unwritten.restype = ctypes.c_int64
    lib.apet_error_message.restype = ctypes.c_size_t
    return lib


def target_of(how: How) -> str:
    return "sm_80" if how.device.capability < 90 else "sm_90a"


def text_of(case: Case, how: How) -> str:
    """Returns the PTX that the call executes, unless it gets another."""
    return build.ptx(build.DTYPES[case.problem.dtype], target_of(how))


def plan(case: Case, how: How) -> call.Plan:
    """Returns the plan of the backend. Raises NoPath if it cannot run the problem as in `how`."""
    lib, result, override, d = load(), call.Plan(), how.override, how.device
    lib.ptx_device(d.capability, d.multiprocessors, d.shared_per_block, d.shared_per_multiprocessor, d.largest_cluster)
    status = lib.apet_cuda_plan_with(ctypes.byref(case.problem), ctypes.byref(override), ctypes.byref(result))
    if status == call.status_numbers()[call.NO_PATH]:
        raise NoPath(result.why.decode())
    _check(case, status)
    return result


def run(case: Case, how: How, text: str | None = None, truncates: bool = False) -> list[str]:
    """Runs the case by the PTX of its dtype and target, or by `text`. Returns the mangled names of launched kernels.

    truncates: the matrix unit truncates sums instead of rounding them (warp.cpp). Raises Fault if the interpreter finds
    one.
    """
    lib, planned = load(), plan(case, how)
    text = text or text_of(case, how)
    if fault := lib.ptx_load(_key(text), text.encode()):
        raise Fault(fault.decode())
    lib.ptx_begin(ctypes.c_uint32(how.seed), int(truncates))
    for name, t in case.inputs.items():
        _add(name, t, writable=False)
    for name, t in case.outputs.items():
        _add(name, t, writable=True)
    room = torch.full((planned.workspace_bytes + 64,), 0xFF, dtype=torch.uint8)
    workspace = ctypes.c_void_p(room.data_ptr() + -room.data_ptr() % 64)
    lib.ptx_workspace(ctypes.byref(case.problem), ctypes.byref(planned), workspace)
    tensors = call.Tensors(**{name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()})
    status = lib.apet_cuda_run(
        *(ctypes.byref(s) for s in (case.problem, tensors, planned)),
        workspace,
        ctypes.c_size_t(planned.workspace_bytes),
        None,
    )
    launches = lib.ptx_launches().decode().splitlines()
    _check(case, status)
    for name in case.outputs:
        if unwritten := lib.ptx_unwritten(name.encode()):
            raise Fault(f"{unwritten} bytes of {name} were not written")
    return launches


def executed(text: str) -> dict[int, int]:
    """Returns how often the last run executed each instruction of its text, by line."""
    pairs = (line.split() for line in load().ptx_executed(_key(text)).decode().splitlines())
    return {int(line): int(count) for line, count in pairs}


def forget(text: str) -> None:
    """Frees the data of a text."""
    load().ptx_forget(_key(text))


def _key(text: str) -> bytes:
    return simt.digest(text).encode()


def _add(name: str, t: Tensor, writable: bool) -> None:
    """Declares the elements of t, without the gaps between them. Outputs have no values yet that may be read."""
    if not t.numel():
        return
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    elements = torch.zeros(last + 1, dtype=torch.uint8)
    if not writable:
        elements.as_strided(t.shape, t.stride()).fill_(1)
    flags = elements.repeat_interleave(t.element_size())
    size, at = ctypes.c_int64(len(flags)), ctypes.c_void_p(t.data_ptr())
    load().ptx_array(name.encode(), at, size, int(writable), ctypes.c_void_p(flags.data_ptr()))


def _check(case: Case, status: int) -> None:
    if status == 0:
        return
    if status == call.status_numbers()["APET_CUDA_FAILED"]:
        raise Fault(load().apet_cuda_error().decode())
    message = ctypes.create_string_buffer(512)
    load().apet_error_message(ctypes.byref(case.problem), status, message, ctypes.c_size_t(512))
    raise Fault(message.value.decode())


def functions(how: How, truncates: bool = False) -> SimpleNamespace:
    """Returns compress, compress_varlen, score and merge in one way; score is never fused, so it uses clusters then."""

    def function(name: str):
        def call_it(*args, **kwargs):
            case = call.CASES[name](*args, **kwargs)
            way = replace(how, path="cluster") if (name, how.path) == ("score", "fused") else how
            run(case, way, truncates=truncates)
            results = tuple(case.outputs.values())
            return results if len(results) > 1 else results[0]

        return call_it

    return SimpleNamespace(**{name: function(name) for name in call.CASES})
