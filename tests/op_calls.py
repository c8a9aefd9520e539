"""Calls of every op: right ones, and wrong ones with their error messages."""

from __future__ import annotations

import pytest
import torch

from tests.data import tokens

OPS = torch.ops.apet
CU, CU_KEEP = torch.tensor([0, 9, 20], dtype=torch.int32), torch.tensor([0, 4, 9], dtype=torch.int32)


def calls(dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Name -> op, arguments, keyword arguments; every op and layout at least once."""
    x, packed = tokens(2, 20, 7, dtype=dtype, seed=1), tokens(20, 7, dtype=dtype, seed=2)
    at = torch.tensor([[3, 0, 7], [2, 2, 19]])
    return {
        "compress": (OPS.compress, (x, 6, 3), {}),
        "compress overwrite": (OPS.compress, (x, 6, 3), {"layout": "overwrite", "blend": 0.5, "ridge": 1e-3}),
        "compress append": (OPS.compress, (x, 6, 10), {"layout": "append", "select": "qr", "start": 4}),
        "compress paper": (OPS.compress, (x, 6, 3), {"select": "fps"}),
        "compress_varlen": (OPS.compress_varlen, (packed, CU, CU_KEEP, 9, 11, 5, 3), {}),
        "compress_varlen append": (OPS.compress_varlen, (packed, CU, CU_KEEP, 9, 11, 5, 3), {"layout": "append"}),
        "compress rounds": (OPS.compress, (x, 18), {"refine": 1}),
        "compress weights": (OPS.compress, (x, 18), {"weights": tokens(2, 20, seed=3).abs()}),
        "compress_varlen weights": (
            OPS.compress_varlen,
            (packed, CU, CU_KEEP, 9, 11, 5, 3),
            {"weights": tokens(20, seed=4).abs()},
        ),
        "compress_varlen rounds": (OPS.compress_varlen, (packed, CU, CU_KEEP, 9, 11, 5), {}),
        "score": (OPS.score, (x, 3), {"select": "qr"}),
        "merge": (OPS.merge, (x, at), {}),
        "merge targets": (OPS.merge, (x, at), {"targets": at < 10}),
    }


NAMES = list(calls())


def flat(result) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def x3(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(*(shape or (2, 20, 7)), **options)


WRONG_CALLS = [
    ("compress", (x3(20, 7), 3), {}, "x has 2 dimensions"),
    ("compress", (x3(dtype=torch.float64), 3), {}, "Double"),
    ("compress", (x3(dtype=torch.int32), 3), {}, "Int"),
    ("compress", (x3(2, 20, 0), 3), {}, "x has 0 features"),
    ("compress", (x3(2, 0, 7), 3), {}, "x has 0 tokens"),
    ("compress", (x3(), 0), {}, "keep=0"),
    ("compress", (x3(), -4), {}, "keep=-4"),
    ("compress", (x3(), 21), {}, r"keep=21.*20"),
    ("compress", (x3(), 3, 0), {}, "basis=0"),
    ("compress", (x3(), 3, 65), {}, "basis=65"),
    ("compress", (x3(), 3, -5), {}, "basis=-5"),
    ("compress", (x3(), 3, 2**40), {}, "basis=1099511627776"),
    ("compress", (x3(2, 90, 7), 80, 81), {"select": "qr"}, r"basis=81 is outside 1\.\.80"),
    ("compress", (x3(2, 90, 7), 80, 70), {"select": "fps"}, r"basis=70 is outside 1\.\.64"),
    ("compress", (x3(), 3, 65), {"select": "qr"}, r"basis=65 is outside 1\.\.64"),
    ("compress", (x3(), 3, 0), {"select": "qr"}, "basis=0"),
    ("compress", (x3(), 3, -1), {"select": "qr"}, r"basis=-1 is outside"),
    ("compress", (x3(), 3), {"select": "fps"}, "basis=None needs select='qr', got select='fps'; give basis in 1..64"),
    ("compress", (x3(), 3), {"layout": "append"}, "basis=None needs layout='inplace'.*append'; give basis in 1..64"),
    ("compress", (x3(2, 90, 7), 80, 70), {"select": "qr", "layout": "overwrite"}, "basis=70 needs layout='inplace'"),
    ("compress", (x3(), 3, None), {"select": "qr", "refine": 9}, r"refine=9 is outside 0\.\.8"),
    ("compress", (x3(), 3, None), {"select": "qr", "refine": -1}, "refine=-1"),
    ("compress", (x3(), 12, 10), {"refine": 2}, "refine=2 needs basis=None or basis=keep, got basis=10 and keep=12"),
    ("compress", (x3(), 12, 12), {"refine": 2, "layout": "append"}, "refine=2 needs layout='inplace'.*append"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, 9, 11, 5, 5), {"refine": 1}, "refine=1 of ragged.*got 5"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, 9, 11, 5), {"select": "fps"}, "basis=None needs select='qr'"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, 9, 11, 5, 2**31), {}, r"basis=2147483648 is outside 1\.\.2147483647"),
    ("score", (x3(), None), {"select": "qr"}, r"basis=None means basis=keep, but score has no keep; give .* 1\.\.64"),
    ("score", (x3(), 65), {"select": "qr"}, r"basis=65 is outside 1\.\.64"),
    ("compress", (x3(), 12), {"blend": 1 - 1e-10}, "needs layout='overwrite'"),
    ("compress", (x3(), 3), {"layout": "sideways"}, "sideways"),
    ("compress", (x3(), 3), {"select": "random"}, "random"),
    ("compress", (x3(), 3), {"start": -2}, "start=-2"),
    ("compress", (x3(), 3), {"start": 20}, "start=20"),
    ("compress", (x3(), 3), {"ridge": -1e-3}, "ridge=-0.001"),
    ("compress", (x3(), 3), {"ridge": float("inf")}, "ridge=inf"),
    ("compress", (x3(), 3), {"ridge": float("nan")}, "ridge=nan"),
    ("compress", (x3(), 12, 10), {"layout": "overwrite", "blend": 1.5}, "blend=1.5"),
    ("compress", (x3(), 12, 10), {"layout": "overwrite", "blend": -0.5}, "blend=-0.5"),
    ("compress", (x3(), 12, 10), {"layout": "overwrite", "blend": float("nan")}, "blend=nan"),
    ("compress", (x3(), 12), {"blend": 0.5}, r"blend=0.5.*inplace"),
    ("compress", (x3(), 12, 10), {"layout": "append", "blend": 0.5}, r"blend=0.5.*append"),
    ("compress", (x3(), 10, 10), {"layout": "overwrite"}, r"keep=10.*basis=10"),
    ("compress", (x3(), 3, 4), {"layout": "overwrite"}, r"keep=3.*basis=4"),
    ("compress_varlen", (x3(), CU, CU_KEEP, 9, 11, 5), {}, "x has 3 dimensions"),
    ("compress_varlen", (x3(20, 7), CU.long(), CU_KEEP, 9, 11, 5), {}, r"cu_seqlens.*Long \[3\]"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP.float(), 9, 11, 5), {}, "cu_keep.*Float"),
    ("compress_varlen", (x3(20, 7), CU[:2], CU_KEEP, 9, 11, 5), {}, "2 entries.*3"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, 21, 11, 5), {}, r"total_keep=21.*20"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, -1, 11, 5), {}, "total_keep=-1"),
    ("compress_varlen", (x3(20, 7), CU[:0], CU_KEEP[:0], 0, 11, 5), {}, r"cu_seqlens .*, got Int \[0\]"),
    ("compress_varlen", (x3(20, 7), CU[None], CU_KEEP, 9, 11, 5), {}, r"cu_seqlens .*, got Int \[1, 3\]"),
    ("compress_varlen", (x3(20, 7), CU, CU_KEEP, 2, -3, 4), {}, "max_seqlen=-3 and max_keep=4"),
    ("compress", (x3(), 3), {"weights": torch.ones(2, 19)}, r"weights must be Float \[2, 20\], .* got Float \[2, 19\]"),
    ("compress", (x3(), 3), {"weights": torch.ones(2, 20).half()}, r"got Half \[2, 20\]"),
    ("compress", (x3(), 3), {"weights": torch.ones(2, 20, 1)}, r"got Float \[2, 20, 1\]"),
    (
        "compress_varlen",
        (x3(20, 7), CU, CU_KEEP, 9, 11, 5),
        {"weights": torch.ones(2, 10)},
        r"weights must be Float \[20\]",
    ),
    ("score", (x3(), 0), {}, "basis=0"),
    ("score", (x3(), 3), {"start": 20}, "start=20"),
    ("merge", (x3(), torch.zeros(2, 3)), {}, "indices.*Float"),
    ("merge", (x3(), torch.zeros(2, 0, dtype=torch.int64)), {}, "K=0 is outside 1..20"),
    ("merge", (x3(), torch.zeros(3, 3, dtype=torch.int64)), {}, r"int64 \[2, K\], got Long \[3, 3\]"),
    ("merge", (x3(), torch.zeros(2, 3, dtype=torch.int64)), {"targets": torch.ones(2, 3)}, "targets.*Float"),
    (
        "merge",
        (x3(), torch.zeros(2, 3, dtype=torch.int64)),
        {"targets": torch.ones(2, 4).bool()},
        r"bool \[2, 3\].*Bool \[2, 4\]",
    ),
]


def error_of(function, args, options) -> str:
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function(*args, **options)
    return str(caught.value).splitlines()[0]
