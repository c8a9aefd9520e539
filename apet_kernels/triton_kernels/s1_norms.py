"""Launch 1: computes squared norms, and the first basis candidate of every program.

    norm_sq[n] = ||x_n||^2        first basis token = arg max_n norm_sq[n], or `start`

Programs are (image, tile of BLOCK_N tokens). A program takes every `programs`-th tile of its image, so an image of any
size has at most PARTIALS candidates. The next launch takes their maximum.

    x [N, D] --read once--> norm_sq, dist_sq, resid_sq [N]    candidates [PARTIALS]: the best key of each program

The first program of an image also writes its row of the table of images (device.py). For ragged input it reads
cu_seqlens and cu_keep and clamps their entries into range and to their running maximum, so that images never overlap,
whatever they hold.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import configs
from .call import Call
from .device import (
    BASE,
    DROPPED_COUNT,
    FIELDS,
    FIRST_TOKEN,
    FLT_MAX,
    KEEP,
    ROW,
    ROW_END,
    TOKEN,
    TOKENS,
    jit,
    pack,
    tile_rows,
    weighted,
)

# The sweeps wait for memory, so two programs of 8 warps should run on a multiprocessor of 65536 registers.
SWEEP_REGISTERS = 128


@triton.jit
def running_extent(cu, s, limit, CHUNK: tl.constexpr):
    """Returns the running maxima of cu[0..s] and cu[0..s+1], clamped into [0, limit]."""
    j = tl.arange(0, CHUNK)
    lower = tl.zeros((CHUNK,), tl.int64)
    upper = tl.zeros((CHUNK,), tl.int64)
    for j0 in range(0, s + 2, CHUNK):
        entry = tl.load(cu + j0 + j, mask=j0 + j <= s + 1, other=0).to(tl.int64)
        entry = tl.minimum(tl.maximum(entry, 0), limit)
        upper = tl.maximum(upper, entry)
        lower = tl.maximum(lower, tl.where(j0 + j <= s, entry, 0))
    return tl.max(lower, 0), tl.max(upper, 0)


@jit
def s1_norms(
    x,  # [images, N, D], or ragged [T, D]
    cu_seqlens,  # [images + 1] int32, ragged only
    cu_keep,  # [images + 1] int32, ragged only
    table,  # [images, FIELDS] int64, written
    norm_sq,  # [all_tokens] float32, written
    dist_sq,  # [all_tokens] float32, written: inf, or 0 where the norm is not finite: never a candidate
    resid_sq,  # [all_tokens] float32, written: norm_sq, from which s1_s3_sweep subtracts ||y||^2
    candidates,  # [2, images, PARTIALS] int64, the first half written
    weights,  # [all_tokens] float32, if WEIGHTED
    stride_xb: tl.int64,  # in elements, 0 for ragged input
    stride_xn: tl.int64,
    ragged: tl.int32,
    max_tokens: tl.int64,  # N, or max_seqlen
    max_keep: tl.int64,  # K, or max_keep
    images: tl.int64,
    total_tokens: tl.int64,  # T, ragged only
    total_keep: tl.int64,  # ragged only
    appended: tl.int64,  # rows that follow the kept ones: M with layout="append", else 0
    start: tl.int64,
    programs: tl.int32,  # of one image, at most PARTIALS
    D: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PARTIALS: tl.constexpr,
    SUM: tl.constexpr,  # the dtype of sums over D
    WEIGHTED: tl.constexpr,
):
    s = (tl.program_id(0) // programs).to(tl.int64)
    tile = tl.program_id(0) % programs
    if ragged != 0:
        first_token, end = running_extent(cu_seqlens, s, total_tokens, 128)
        tokens = tl.minimum(end - first_token, max_tokens)
        row, row_end = running_extent(cu_keep, s, total_keep, 128)
        keep = tl.minimum(tl.minimum(row_end - row, max_keep), tokens)
        row_end = tl.where(s == images - 1, total_keep, row_end)  # the last image takes all unfilled rows after it
        token = first_token
        base = first_token * stride_xn
    else:
        first_token = s * 0
        tokens = max_tokens
        row = s * max_keep
        row_end = row + max_keep
        keep = max_keep
        token = s * max_tokens
        base = s * stride_xb
    if tile == 0:
        image = table + s * FIELDS
        tl.store(image + BASE, base)
        tl.store(image + TOKEN, token)
        tl.store(image + FIRST_TOKEN, first_token)
        tl.store(image + TOKENS, tokens)
        tl.store(image + ROW, row + s * appended)
        tl.store(image + KEEP, keep)
        tl.store(image + ROW_END, row_end + (s + 1) * appended)
        tl.store(image + DROPPED_COUNT, tokens - keep)

    given = tl.minimum(start, tokens - 1)
    d = tl.arange(0, BLOCK_D)
    best = tl.zeros((BLOCK_N,), tl.int64)
    for t in range(tile, tl.cdiv(tokens, BLOCK_N), programs):
        n, inside, rows = tile_rows(x, base, stride_xn, t, tokens, ALIGN, BLOCK_N)
        squares = tl.zeros((BLOCK_N, BLOCK_D), SUM)
        for d0 in range(0, D, BLOCK_D):
            mask = inside[:, None] & (d0 + d < D)[None, :]
            v = tl.load(rows[:, None] + (d0 + d)[None, :], mask=mask, other=0.0).to(SUM)
            squares = tl.fma(v, v, squares)
        n_norm_sq = tl.sum(squares, 1).to(tl.float32)
        finite = n_norm_sq <= FLT_MAX  # false for NaN
        tl.store(norm_sq + token + n, n_norm_sq, mask=inside)
        tl.store(dist_sq + token + n, tl.where(finite, float("inf"), 0.0), mask=inside)
        tl.store(resid_sq + token + n, n_norm_sq, mask=inside)
        value = weighted(weights + token + n, n_norm_sq, inside, WEIGHTED)
        value = tl.where(n == given, float("inf"), value)  # above every norm: `start` is taken whatever its norm
        best = tl.maximum(best, tl.where(inside & finite & (value > 0), pack(value, n), 0))
    tl.store(candidates + s * PARTIALS + tile, tl.max(best, 0))


class Extents(NamedTuple):
    """The places of images in x, and of their rows in the result."""

    max_keep: int  # K, or the largest K of a ragged image
    appended: int
    cu_seqlens: Tensor | None = None  # [images + 1] int32; this and the following fields are for ragged input only
    cu_keep: Tensor | None = None  # [images + 1] int32
    total_tokens: int = 0
    total_keep: int = 0


class Norms(NamedTuple):
    """The tensors that s1_norms writes, and how it divides the images between programs."""

    table: Tensor  # [images, FIELDS] int64
    norm_sq: Tensor  # [all tokens] float32
    dist_sq: Tensor  # [all tokens] float32
    resid_sq: Tensor  # [all tokens] float32
    candidates: Tensor  # [2, images, PARTIALS] int64
    programs: int  # programs of each image
    weights: Tensor  # [all tokens] float32; any tensor if they are not WEIGHTED
    constants: dict[str, Any]  # constexpr arguments that s1_s3_sweep shares


def launch(call: Call, extents: Extents, start: int = -1) -> Norms:
    """Adds the launch of s1_norms."""
    x, tiles, images = call.x, call.tiles, call.images
    table = call.new(torch.int64, images, FIELDS.value)
    norm_sq, dist_sq, resid_sq = (call.new(torch.float32, call.all_tokens) for _ in range(3))
    candidates = call.new(torch.int64, 2, images, configs.PARTIALS)
    weights = norm_sq if call.weights is None else call.weights
    # Dense calls pass this in place of the cu tensors. It has their dtype, so that both kinds of calls run one binary.
    unread = table.view(torch.int32)
    programs = min(-(-call.max_tokens // tiles.sweep_n), configs.PARTIALS)
    constants = {
        "D": call.dim,
        "ALIGN": call.align,
        "BLOCK_N": tiles.sweep_n,
        "BLOCK_D": tiles.sweep_d,
        "PARTIALS": configs.PARTIALS,
        "SUM": tl.float64 if call.dim <= configs.NARROW else tl.float32,
        "WEIGHTED": call.weights is not None,
    }
    args = {
        "x": x,
        "cu_seqlens": unread if extents.cu_seqlens is None else extents.cu_seqlens,
        "cu_keep": unread if extents.cu_keep is None else extents.cu_keep,
        "table": table,
        "norm_sq": norm_sq,
        "dist_sq": dist_sq,
        "resid_sq": resid_sq,
        "candidates": candidates,
        "weights": weights,
        "stride_xb": x.stride(0) if x.dim() == 3 else 0,
        "stride_xn": x.stride(-2),
        "ragged": int(extents.cu_seqlens is not None),
        "max_tokens": call.max_tokens,
        "max_keep": extents.max_keep,
        "images": images,
        "total_tokens": extents.total_tokens,
        "total_keep": extents.total_keep,
        "appended": extents.appended,
        "start": start,
        "programs": programs,
    }
    call.add(s1_norms, images * programs, args, constants, tiles.sweep_warps, registers=SWEEP_REGISTERS)
    return Norms(table, norm_sq, dist_sq, resid_sq, candidates, programs, weights, constants)
