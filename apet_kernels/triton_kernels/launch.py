"""The host side: a call becomes a list of launches, M + 4 for `compress`, and nothing here looks at the data.

The list is built from shapes, so meta tensors serve as well: `api.plan` counts it, and tests compile it for GPUs that
are not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from . import configs
from .device import FIELDS
from .s1_norms import s1_norms
from .s1_s3_step import s1_s3_step
from .s4_topk import APPEND, INPLACE, OVERWRITE, s4_topk
from .s5_assign import s5_assign
from .s5_mean import s5_mean
from .s5_rows import s5_rows

LAYOUTS = {"inplace": INPLACE.value, "overwrite": OVERWRITE.value, "append": APPEND.value}
# Programs that fill the largest devices (132 to 304 multiprocessors): where dropped tokens make fewer tiles than this,
# several programs share the targets of a tile. More than 8 would not shorten s5_assign, which has to load its rows.
ENOUGH_PROGRAMS = 256
MOST_SHARES = 8
# A sweep waits for memory, so at least two programs of 8 warps should be at it on a multiprocessor of 65536 registers.
STEP_REGISTERS = 128


@dataclass(frozen=True)
class Launch:
    """One kernel launch over a 1-D grid."""

    kernel: Any  # a triton.JITFunction
    programs: int
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.args, **self.constants, **self.options)


@dataclass(frozen=True)
class Call:
    """The launches of one call, and what they leave."""

    launches: list[Launch]
    results: tuple[Tensor, ...]
    workspace_bytes: int

    def run(self) -> tuple[Tensor, ...]:
        for launch in self.launches:
            launch.run()
        return self.results


class _Builder:
    """What all launches of a call share: the tokens in standard form, tiles, workspace, and the table of images."""

    def __init__(self, x: Tensor, images: int, max_tokens: int, device_class: str) -> None:
        D = x.shape[-1]
        # Rows of whole 16-byte words are loaded by words, so they have to start at one; which form is loaded follows
        # from D and dtype alone, since another form could mean another order of sums.
        self.align = 16 if D * x.element_size() % 16 == 0 else x.element_size()
        strides = [n * x.element_size() for n in x.stride()[:-1]]
        if x.stride(-1) != 1 or any(n % self.align for n in (*strides, 0 if x.is_meta else x.data_ptr())):
            x = x.clone(memory_format=torch.contiguous_format)
        self.x = x
        self.images, self.max_tokens, self.tokens = images, max_tokens, x.shape[:-1].numel()
        self.device_class = device_class
        self.tiles = configs.tiles(device_class, D, x.element_size())
        self.launches: list[Launch] = []
        self.workspace_bytes = 0
        self.table = self.new(torch.int64, images, FIELDS.value)
        self.norm2 = self.new(torch.float32, self.tokens)

    def new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Workspace: part of every call, its size a matter of shapes."""
        tensor = torch.empty(shape, dtype=dtype, device=self.x.device)
        self.workspace_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def add(
        self,
        kernel: Any,
        programs: int,
        args: dict[str, Any],
        constants: dict[str, Any],
        warps: int,
        stages: int = 2,
        registers: int = 255,
    ) -> None:
        # Products and sums become one rounding where the kernel says fma, not where a compiler finds them.
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
        if self.device_class.startswith("sm_"):
            options["maxnreg"] = registers  # of a thread: left alone, ptxas spills a little to fit one more program
        self.launches.append(Launch(kernel, programs, args, constants, options))

    # ---- s1 to s3

    def s1_norms(self, offsets: dict[str, Any], start: int) -> None:
        t = self.tiles
        self.programs = min(-(-self.max_tokens // t.step_n), configs.PARTIALS)
        self.nearest, self.rest = self.new(torch.float32, self.tokens), self.new(torch.float32, self.tokens)
        self.candidates = self.new(torch.int64, 2, self.images, configs.PARTIALS)
        self.step_constants = {
            "D": self.x.shape[-1],
            "ALIGN": self.align,
            "BLOCK_N": t.step_n,
            "BLOCK_D": t.step_d,
            "PARTIALS": configs.PARTIALS,
            "SUM": tl.float64 if self.x.shape[-1] <= configs.NARROW else tl.float32,
        }
        args = {
            "x": self.x,
            "images": self.table,
            "norm2": self.norm2,
            "nearest": self.nearest,
            "rest": self.rest,
            "candidates": self.candidates,
            "stride_xb": self.x.stride(0) if self.x.dim() == 3 else 0,
            "stride_xn": self.x.stride(-2),
            "max_tokens": self.max_tokens,
            "image_count": self.images,
            "start": start,
            "programs": self.programs,
            **offsets,
        }
        self.add(
            s1_norms, self.images * self.programs, args, self.step_constants, t.step_warps, registers=STEP_REGISTERS
        )

    def s1_s3_steps(self, basis: Tensor, e2: Tensor, M: int, select: str, ridge: float) -> None:
        args = {
            "x": self.x,
            "images": self.table,
            "norm2": self.norm2,
            "nearest": self.nearest,
            "rest": self.rest,
            "y": self.new(torch.float32, M, self.tokens),
            "inverse": self.new(torch.float64, self.images, M, M),
            "candidates": self.candidates,
            "basis": basis,
            "e2": e2,
            "stride_xn": self.x.stride(-2),
            "tokens": self.tokens,
            "image_count": self.images,
            "M": M,
            "qr": int(select == "qr"),
            "ridge": ridge,
            "programs": self.programs,
        }
        constants = {**self.step_constants, "BLOCK_M": max(configs.power_of_2(M), 2)}
        for step in range(M):
            self.add(
                s1_s3_step,
                self.images * self.programs,
                {**args, "step": step},
                constants,
                self.tiles.step_warps,
                registers=STEP_REGISTERS,
            )

    # ---- s4

    def s4_topk(self, e2: Tensor, basis: Tensor, indices: Tensor, M: int, layout: str, appended: int) -> None:
        args = {
            "e2": e2,
            "basis": basis,
            "images": self.table,
            "rank": self.new(torch.int32, self.tokens),
            **self._rows(indices),
            "indices": indices,
            "M": M,
            "layout": LAYOUTS[layout],
            "appended": appended,
        }
        constants = {"BLOCK_M": max(configs.power_of_2(M), 2), "CHUNK": self.tiles.topk_chunk}
        self.add(s4_topk, self.images, args, constants, self.tiles.topk_warps)

    def s5_rows(self, indices: Tensor, targets: Tensor | None) -> None:
        flags = self.table.view(torch.int8) if targets is None else targets.view(torch.int8)
        args = {
            "indices": indices,
            "targets": flags,
            "images": self.table,
            "marks": self.new(torch.int32, self.tokens),
            **self._rows(indices),
            "stride_ib": indices.stride(0),
            "stride_ik": indices.stride(1),
            "stride_tb": flags.stride(0),
            "stride_tk": flags.stride(1),
            "chosen": int(targets is not None),
        }
        self.add(s5_rows, self.images, args, {"CHUNK": self.tiles.topk_chunk}, self.tiles.topk_warps)

    def _rows(self, indices: Tensor) -> dict[str, Tensor]:
        self.rows = {
            "kept": self.new(torch.int32, indices.numel()),
            "source": self.new(torch.int32, indices.numel()),
            "dropped": self.new(torch.int32, self.tokens),
        }
        return self.rows

    # ---- s5

    def s5(
        self,
        result: Tensor,
        indices: Tensor,
        basis: Tensor,
        most_dropped: int,
        max_keep: int,
        appended: int,
        blend: float,
    ) -> None:
        t, D = self.tiles, self.x.shape[-1]
        tiles = max(-(-most_dropped // t.assign_r), 1)
        shares = max(1, min(MOST_SHARES, -(-max_keep // t.assign_t), ENOUGH_PROGRAMS // (self.images * tiles)))
        best = self.new(torch.int64, shares, self.tokens)
        common = {
            "x": self.x,
            "images": self.table,
            **self.rows,
            "best": best,
            "stride_xn": self.x.stride(-2),
            "tokens": self.tokens,
            "shares": shares,
        }
        args = {**common, "norm2": self.norm2, "tiles": tiles}
        constants = {
            "D": D,
            "ALIGN": self.align,
            "BLOCK_R": t.assign_r,
            "BLOCK_T": t.assign_t,
            "BLOCK_D": min(t.assign_d, max(configs.power_of_2(D), 16)),
        }
        self.add(s5_assign, self.images * tiles * shares, args, constants, t.assign_warps, t.assign_stages)
        args = {
            **common,
            "members": self.new(torch.int32, self.tokens),
            "basis": basis,
            "result": result,
            "indices": indices,
            "M": basis.shape[-1],
            "appended": appended,
            "blend": blend,
            "rows_per_image": max(max_keep + appended, 1),
        }
        constants = {
            "D": D,
            "ALIGN": self.align,
            "BLOCK_D": configs.power_of_2(D),
            "CHUNK": t.mean_chunk,
            "GROUP": t.mean_group,
        }
        self.add(s5_mean, self.images * args["rows_per_image"], args, constants, t.mean_warps)

    def call(self, *results: Tensor) -> Call:
        return Call(self.launches, results, self.workspace_bytes)


def _dense(b: _Builder, keep: int, appended: int) -> dict[str, Any]:
    """The arguments of s1_norms that say where images and their rows are, for x [B, N, D]."""
    unread = b.table.view(torch.int32)  # of the dtype that ragged calls give, so that both run one binary
    return {
        "cu_seqlens": unread,
        "cu_keep": unread,
        "ragged": 0,
        "max_keep": keep,
        "total_tokens": 0,
        "total_keep": 0,
        "appended": appended,
    }


def compress(
    x: Tensor,
    keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    device_class: str | None = None,
) -> Call:
    """The launches of the op `compress`; arguments as there, already checked."""
    B, N, D = x.shape
    appended = basis if layout == "append" else 0
    tokens = torch.empty(B, keep + appended, D, dtype=x.dtype, device=x.device)
    indices = torch.empty(B, keep + appended, dtype=torch.int64, device=x.device)
    if B == 0:
        return Call([], (tokens, indices), 0)
    b = _Builder(x, B, N, device_class or configs.device_class(x.device))
    picks, e2 = b.new(torch.int64, B, basis), b.new(torch.float32, b.tokens)
    b.s1_norms(_dense(b, keep, appended), start)
    b.s1_s3_steps(picks, e2, basis, select, ridge)
    b.s4_topk(e2, picks, indices, basis, layout, appended)
    b.s5(tokens, indices, picks, N - keep, keep, appended, blend)
    return b.call(tokens, indices)


def compress_varlen(
    x: Tensor,
    cu_seqlens: Tensor,
    cu_keep: Tensor,
    total_keep: int,
    max_seqlen: int,
    max_keep: int,
    basis: int = 10,
    *,
    layout: str = "inplace",
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    blend: float = 1.0,
    device_class: str | None = None,
) -> Call:
    """The launches of the op `compress_varlen`; arguments as there, already checked."""
    S, (T, D) = cu_seqlens.shape[0] - 1, x.shape
    appended = basis if layout == "append" else 0
    rows = total_keep + S * appended
    longest = min(max_seqlen, T)
    if S == 0 or longest == 0:  # no tokens anywhere: no image fills a row
        return Call([], (x.new_zeros(rows, D), x.new_zeros(rows, dtype=torch.int64)), 0)
    tokens = torch.empty(rows, D, dtype=x.dtype, device=x.device)
    indices = torch.empty(rows, dtype=torch.int64, device=x.device)
    b = _Builder(x, S, longest, device_class or configs.device_class(x.device))
    picks, e2 = b.new(torch.int64, S, basis), b.new(torch.float32, T)
    most_kept = min(max_keep, longest, total_keep)
    offsets = {
        "cu_seqlens": cu_seqlens.contiguous(),
        "cu_keep": cu_keep.contiguous(),
        "ragged": 1,
        "max_keep": most_kept,
        "total_tokens": T,
        "total_keep": total_keep,
        "appended": appended,
    }
    b.s1_norms(offsets, start)
    b.s1_s3_steps(picks, e2, basis, select, ridge)
    b.s4_topk(e2, picks, indices, basis, layout, appended)
    b.s5(tokens, indices, picks, longest, most_kept, appended, blend)
    return b.call(tokens, indices)


def score(
    x: Tensor,
    basis: int = 10,
    *,
    select: str = "fps",
    start: int = -1,
    ridge: float = 1e-5,
    device_class: str | None = None,
) -> Call:
    """The launches of the op `score`; arguments as there, already checked."""
    B, N, _ = x.shape
    picks = torch.empty(B, basis, dtype=torch.int64, device=x.device)
    e2 = torch.empty(B, N, dtype=torch.float32, device=x.device)
    if B == 0:
        return Call([], (e2, picks), 0)
    b = _Builder(x, B, N, device_class or configs.device_class(x.device))
    b.s1_norms(_dense(b, N, 0), start)
    b.s1_s3_steps(picks, e2, basis, select, ridge)
    return b.call(e2, picks)


def merge(x: Tensor, indices: Tensor, *, targets: Tensor | None = None, device_class: str | None = None) -> Call:
    """The launches of the op `merge`; arguments as there, already checked."""
    (B, N, D), K = x.shape, indices.shape[1]
    tokens = torch.empty(B, K, D, dtype=x.dtype, device=x.device)
    if B == 0:
        return Call([], (tokens,), 0)
    b = _Builder(x, B, N, device_class or configs.device_class(x.device))
    b.s1_norms(_dense(b, K, 0), -1)
    b.s5_rows(indices, targets)
    # Repeated indices leave more than N - K tokens over. No row is blank and none is the basis', so neither is read.
    b.s5(tokens, indices, indices, N - 1, K, 0, 1.0)
    return b.call(tokens)
