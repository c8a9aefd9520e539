"""The CUDA backend on the CPU: the four functions of the op for CPU tensors, by csrc/cuda compiled with g++."""

from __future__ import annotations

import ctypes
import functools
import itertools
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apet_kernels import ops
from apet_kernels.options import LAYOUTS, PAPER, SELECTS, Options

from . import build
from .abi import (
    BASIS_KEEP,
    COMPRESS,
    DTYPES,
    MERGE,
    NAMES,
    NO_PATH,
    PATHS,
    SCORE,
    Override,
    Plan,
    Problem,
    Tensors,
    Terms,
    int64,
    status_numbers,
)


@dataclass(frozen=True)
class Device:
    """The simulated GPU (simt::Device). It has few multiprocessors, since every resident thread needs a stack."""

    capability: int = 90
    multiprocessors: int = 16
    shared_per_block: int = 227 << 10
    shared_per_multiprocessor: int = 228 << 10
    largest_cluster: int = 16


H100 = Device()
A100 = Device(80, 16, 163 << 10, 164 << 10, 0)
RTX_3090 = Device(86, 8, 99 << 10, 100 << 10, 0)
RTX_5090 = Device(120, 8, 99 << 10, 100 << 10, 8)


class NoPath(Exception):
    """The device cannot run the problem in this way."""


class Fault(Exception):
    """A kernel has undefined behaviour, or a launch failed."""


@dataclass
class Case:
    """One call: the problem, its inputs and its outputs by their names in apet_tensors."""

    problem: Problem
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class How:
    """A way to run a case; it must not change a bit of the result."""

    device: Device = H100
    path: str = "best"
    ctas_per_image: int = 0  # 0: chosen
    resident: int = -1  # -1: as many as fit
    tile: int = 0  # 0: chosen
    seed: int = 0
    tile_rows: int = 0  # 0: chosen

    @property
    def override(self) -> Override:
        return Override(PATHS.index(self.path), self.ctas_per_image, self.resident, self.tile, self.tile_rows)


_variant = ""  # of build.VARIANTS, the kernels that calls run


def load() -> ctypes.CDLL:
    """Returns the library of the simulated device."""
    return _load(_variant)


@contextmanager
def slow_float64() -> Iterator[None]:
    """Runs the kernels as they are compiled for GPUs whose float64 is slow (csrc/cuda/wide.cuh)."""
    global _variant
    _variant = "slow float64"
    try:
        yield
    finally:
        _variant = ""


@functools.cache
def _load(variant: str) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(build.library(variant)))
    for name in ("simt_run", "simt_launches", "apet_cuda_error"):
        getattr(lib, name).restype = ctypes.c_char_p
    lib.apet_error_message.restype = ctypes.c_size_t
    return lib


def use_device(device: Device) -> None:
    """Sets the device of later plans and launches."""
    traits = (device.capability, device.multiprocessors, device.shared_per_block)
    load().simt_use_device(*traits, device.shared_per_multiprocessor, device.largest_cluster)


def plan(problem: Problem, how: How) -> Plan:
    """Returns the plan of the backend. Raises NoPath if it cannot run the problem as in `how`."""
    lib, result, override = load(), Plan(), how.override
    use_device(how.device)
    status = lib.apet_cuda_plan_with(ctypes.byref(problem), ctypes.byref(override), ctypes.byref(result))
    if status == status_numbers()[NO_PATH]:
        raise NoPath(result.why.decode())
    _check(problem, status)
    return result


def terms(problem: Problem, how: How) -> dict[str, float]:
    """Returns what the estimate of the plan is the sum of, in us."""
    planned, result = plan(problem, how), Terms()
    _check(problem, load().apet_cuda_terms_of(*(ctypes.byref(s) for s in (problem, planned, result))))
    return {name.removesuffix("_us"): getattr(result, name) for name, _ in Terms._fields_}


@dataclass
class Started:
    """A call whose launches are queued, and its workspace."""

    room: Tensor
    inside: slice


def start(case: Case, how: How, stream: int = 0) -> Started:
    """Queues the launches of the case on a stream."""
    lib, problem = load(), case.problem
    planned = plan(problem, how)
    # The workspace, and 100 bytes around it, hold values that no kernel writes.
    room = torch.full((planned.workspace_bytes + 192,), 0xFF, dtype=torch.uint8)
    first = -room.data_ptr() % 64 + 64
    tensors = Tensors(**{name: t.data_ptr() for name, t in (case.inputs | case.outputs).items()})
    status = lib.apet_cuda_run(
        *(ctypes.byref(s) for s in (problem, tensors, planned)),
        ctypes.c_void_p(room.data_ptr() + first),
        ctypes.c_size_t(planned.workspace_bytes),
        ctypes.c_void_p(stream),
    )
    if status:
        lib.simt_run()  # runs the launches that were queued before the failure
        _check(problem, status)
    return Started(room, slice(first, first + planned.workspace_bytes))


def finish(*started: Started, seed: int) -> list[str]:
    """Runs all queued launches, different streams at once. Returns a line for each launch."""
    lib = load()
    lib.simt_use_seed(seed)
    fault = lib.simt_run()
    launches = lib.simt_launches().decode().splitlines()
    if fault:
        raise Fault(fault.decode())
    for call in started:
        if (call.room[: call.inside.start] != 0xFF).any() or (call.room[call.inside.stop :] != 0xFF).any():
            raise Fault("something was written beside the workspace")
    return launches


def run(case: Case, how: How) -> list[str]:
    """Runs the case in this process. Returns a line for each launch."""
    load().simt_launches()  # clears the list of launches, which may hold those of earlier calls
    return finish(start(case, how), seed=how.seed)


def run_in_program(case: Case, how: How, program: Path, timeout: float = 300) -> str:
    """Runs the case in a sanitized build of driver.cpp. Returns its standard error. Outputs are filled if the program
    ends normally."""
    device = how.device
    numbers = (
        *(ctypes.sizeof(t) for t in (Problem, Override, Plan)),
        *(device.capability, device.multiprocessors, device.shared_per_block, device.shared_per_multiprocessor),
        *(device.largest_cluster, how.seed),
    )
    with tempfile.TemporaryDirectory() as folder:
        file, result = Path(folder, "case"), Path(folder, "result")
        with file.open("wb") as f:
            f.write(bytes((int64 * len(numbers))(*numbers)) + bytes(case.problem) + bytes(how.override))
            for name in NAMES:
                t = case.inputs.get(name)
                content = b"" if t is None else reach(t)
                size = len(content) if name in case.inputs else _bytes(case.outputs.get(name))
                # A size of -1 means that the tensor is not given; 0 means that it has no elements.
                f.write(bytes(int64(size if name in case.inputs or name in case.outputs else -1)) + content)
        done = subprocess.run([program, file, result], capture_output=True, timeout=timeout)
        if done.returncode == 0:
            content = bytearray(result.read_bytes())
            for t in case.outputs.values():
                if t.numel():
                    part, content = content[: _bytes(t)], content[_bytes(t) :]
                    t.view(-1).view(torch.uint8).copy_(torch.frombuffer(part, dtype=torch.uint8))
    return done.stderr.decode(errors="replace") + ("" if done.returncode == 0 else f"\nexit code {done.returncode}")


def _bytes(t: Tensor | None) -> int:
    return 0 if t is None else t.numel() * t.element_size()


def reach(t: Tensor) -> bytes:
    """Returns the memory from t's first element to its last."""
    if not t.numel():
        return b""
    last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    flat = t.as_strided((last + 1,), (1,)).contiguous()
    return flat.view(torch.uint8).numpy().tobytes()


def _check(problem: Problem, status: int) -> None:
    if status == 0:
        return
    lib = load()
    text = ctypes.create_string_buffer(512)
    lib.apet_error_message(ctypes.byref(problem), status, text, ctypes.c_size_t(512))
    failed = status == status_numbers()["APET_CUDA_FAILED"]
    raise Fault(text.value.decode() + (f" {lib.apet_cuda_error().decode()}" if failed else ""))


# ---- cases


def _problem(op: int, x: Tensor, options: Options | None = None, **values: object) -> Problem:
    """Returns a Problem. values: other fields, for ragged images also the sizes that x does not determine."""
    if options is not None:
        values |= options.arguments
        values["basis"] = BASIS_KEEP if options.basis is None else options.basis
        values["layout"], values["select"] = LAYOUTS.index(options.layout), SELECTS.index(options.select)
    ragged = x.dim() == 2
    if ragged:
        values["total_tokens"] = x.shape[0]
    else:
        values["images"], values["tokens"], values["stride_xb"] = x.shape[0], x.shape[1], x.stride(0)
    strides = {"stride_xn": x.stride(-2), "stride_xd": x.stride(-1)}
    values = {"blend": 1.0} | values
    return Problem(op=op, dtype=DTYPES.index(x.dtype), ragged=ragged, dim=x.shape[-1], **strides, **values)


def _readable(x: Tensor) -> Tensor:
    """Returns x with a contiguous last dimension, as the torch bindings pass it to the kernels."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def compress_case(
    x: Tensor, keep: int, basis: int | None = None, *, weights: Tensor | None = None, **options: Any
) -> Case:
    """options: the other fields of `Options`."""
    ops.check_compress(x, keep, basis, weights=weights, **options)
    x, chosen = _readable(x), Options(basis, **options)
    return Case(
        _problem(COMPRESS, x, chosen, keep=keep),
        {"x": x, **_weights(weights)},
        _tokens(x, (x.shape[0], chosen.rows(keep))),
    )


def compress_varlen_case(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int | None = None,
    *,
    weights: Tensor | None = None,
    **options: Any,
) -> Case:
    """options: the other fields of `Options`."""
    sizes = (total_keep, max_seqlen, max_keep)
    ops.check_compress_varlen(x, cu_seqlens, cu_keep, *sizes, basis, weights=weights, **options)
    x, chosen, images = _readable(x), Options(basis, **options), len(cu_seqlens) - 1
    sizes = {"images": images, "tokens": min(max_seqlen, x.shape[0]), "keep": min(max_keep, total_keep)}
    problem = _problem(COMPRESS, x, chosen, **sizes, total_keep=total_keep)
    offsets = {"cu_seqlens": cu_seqlens.contiguous(), "cu_keep": cu_keep.contiguous()}
    return Case(problem, {"x": x, **offsets, **_weights(weights)}, _tokens(x, (chosen.rows(total_keep, images),)))


def score_case(x: Tensor, basis: int = 10, **options: Any) -> Case:
    """options: select, start and ridge."""
    options = {"select": PAPER["select"]} | options
    ops.check_score(x, basis, **options)
    x = _readable(x)
    problem = _problem(SCORE, x, Options(basis, **options))
    outputs = {
        "residual": x.new_empty(x.shape[:2], dtype=torch.float32),
        "basis_indices": x.new_empty(x.shape[0], basis, dtype=torch.int64),
    }
    return Case(problem, {"x": x}, outputs)


def merge_case(x: Tensor, indices: Tensor, *, targets: Tensor | None = None) -> Case:
    ops.check_merge(x, indices, targets=targets)
    x = _readable(x)
    problem = _problem(MERGE, x, keep=indices.shape[1])
    inputs = {"x": x, "kept": indices.contiguous()}
    if targets is not None:
        inputs["kept_targets"] = targets.contiguous()
    return Case(problem, inputs, {"tokens": x.new_empty(*indices.shape, x.shape[-1])})


def _weights(weights: Tensor | None) -> dict[str, Tensor]:
    return {} if weights is None else {"weights": weights.contiguous()}


def _tokens(x: Tensor, rows: tuple[int, ...]) -> dict[str, Tensor]:
    return {"tokens": x.new_empty(*rows, x.shape[-1]), "indices": x.new_empty(rows, dtype=torch.int64)}


CASES = {"compress": compress_case, "compress_varlen": compress_varlen_case, "score": score_case, "merge": merge_case}


@dataclass
class Functions:
    """compress, compress_varlen, score and merge for CPU tensors. Every call uses the next of `ways`, since none may
    change a bit. If a problem cannot run in this way, the device chooses another."""

    ways: Iterator[How] = field(default_factory=lambda: itertools.cycle(DEFAULT_WAYS))

    def __getattr__(self, name: str):
        if name not in CASES:
            raise AttributeError(name)

        def function(*args, **kwargs):
            ops.check_grad(*(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)))
            case, how = CASES[name](*args, **kwargs), next(self.ways)
            try:
                run(case, how)
            except NoPath:
                run(case, How(how.device, seed=how.seed))
            results = tuple(case.outputs.values())
            return results if len(results) > 1 else results[0]

        return function


# There are few CTAs per image, because switches between CUDA threads take most of the time.
DEFAULT_WAYS = [
    How(path="fused", ctas_per_image=2),
    How(path="cluster", ctas_per_image=2, seed=1),
    How(A100, path="cooperative", ctas_per_image=3, resident=4, seed=2),
    How(path="fused", ctas_per_image=3, seed=3),
    How(RTX_3090, path="cooperative", ctas_per_image=2, tile=64, seed=4),
    How(RTX_5090, seed=5),
]


@contextmanager
def always(how: How) -> Iterator[Functions]:
    """Yields the functions, with every call in this way. They raise NoPath if a call cannot run so."""
    yield Functions(itertools.repeat(how))
