"""The function that SGLang calls instead of its CUDA kernel, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(
    positions: Tensor, query: Tensor, key: Tensor | None, head_size: int, cache: Tensor, is_neox: bool
) -> None:
    """Rotates query and key [T, heads * head_size] in place; cache [positions, R]: cosines, then sines."""
    cos, sin = (part[:, None].float() for part in cache[positions.flatten()].chunk(2, -1))  # [T, 1, R / 2]
    width = 2 * cos.shape[-1]
    for x in (query, key):
        if x is None:
            continue
        heads = x.view(x.shape[0], -1, head_size)
        turned = heads[..., :width].float()
        a, b = turned.chunk(2, -1) if is_neox else (turned[..., ::2], turned[..., 1::2])
        parts = a * cos - b * sin, b * cos + a * sin
        turned = torch.cat(parts, -1) if is_neox else torch.stack(parts, -1).flatten(-2)
        heads[..., :width] = turned.to(x.dtype)
