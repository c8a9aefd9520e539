"""The structures and numbers of csrc/apet.h, for ctypes."""

from __future__ import annotations

import ctypes
import functools
import re

import torch

from .build import CSRC

PATHS = ("best", "fused", "cluster", "cooperative")  # apet_cuda_path
DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # apet_dtype
COMPRESS, SCORE, MERGE = range(3)  # apet_op
BASIS_KEEP = -1  # APET_BASIS_KEEP
NO_PATH = "APET_NO_CUDA_PATH"
int32, int64 = ctypes.c_int32, ctypes.c_int64


class Problem(ctypes.Structure):
    """apet_problem."""

    _fields_ = [
        *((name, int32) for name in ("op", "dtype", "layout", "select", "basis", "ragged")),
        *(
            (name, int64)
            for name in ("images", "tokens", "dim", "keep", "stride_xb", "stride_xn", "stride_xd", "start")
        ),
        *((name, ctypes.c_double) for name in ("ridge", "blend")),
        *((name, int64) for name in ("total_tokens", "total_keep", "refine")),
    ]


class Override(ctypes.Structure):
    """apet_cuda_override."""

    _fields_ = [(name, int32) for name in ("path", "ctas_per_image", "resident", "tile", "tile_rows")]


class Plan(ctypes.Structure):
    """apet_cuda_plan_t."""

    _fields_ = [
        *(
            (name, int32)
            for name in ("path", "launches", "ctas_per_image", "images_in_flight", "slice", "resident", "state_shared")
        ),
        *((name, int32) for name in ("basis_shared", "tile", "first_shared_bytes", "second_shared_bytes")),
        ("tile_rows", int32),
        ("workspace_bytes", ctypes.c_size_t),
        ("estimated_us", ctypes.c_double),
        ("why", ctypes.c_char * 256),
    ]


class Terms(ctypes.Structure):
    """apet_cuda_terms."""

    _fields_ = [
        (f"{name}_us", ctypes.c_double)
        for name in (
            *("launches", "barriers", "memory", "sweeps", "exchanges", "algebra", "topk", "rounds", "products"),
            *("lists", "means"),
        )
    ]


INPUTS = ("x", "cu_seqlens", "cu_keep", "kept", "kept_targets", "weights")
NAMES = (*INPUTS, "tokens", "indices", "residual", "basis_indices")


class Tensors(ctypes.Structure):
    """apet_tensors."""

    _fields_ = [(name, ctypes.c_void_p) for name in NAMES]


@functools.cache
def status_numbers() -> dict[str, int]:
    """apet_status, read from the header."""
    text = (CSRC / "apet.h").read_text().partition("typedef enum apet_status {")[2].partition("}")[0]
    return {name: int(number) for name, number in re.findall(r"^ *(APET_\w+) = (\d+),", text, re.M)}
