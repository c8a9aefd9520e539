"""Shortens a padded batch: where its tokens go, and the masks and positions that follow. All shapes are [B, L, ...]."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Packing:
    """How a batch of rows of length L was shortened to L2."""

    index: Tensor  # [B, L2]: the old column of each new column
    # [B, L2] bool: False in padding. Padding repeats a token that stays, since transformers 4.57 counts the non-zero
    # keys of a static cache, and a dropped token may be infinite.
    valid: Tensor
    source: Tensor  # [B, L2]: as index, but for appended basis rows the column of their token
    moved: Tensor  # [B, L]: the new column of each old column; meaningless for a column that was dropped

    def to(self, device: torch.device) -> Packing:
        """Returns the same packing on another device."""
        return Packing(*(t.to(device) for t in (self.index, self.valid, self.source, self.moved)))

    def rows(self, x: Tensor) -> Tensor:
        """Returns the rows of x [B, L, D] that stay, as [B, L2, D]."""
        x = x.to(self.index.device)
        return x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def along(self, x: Tensor, dim: int) -> Tensor:
        """Returns x [..., B or 1, L, ...], with L at `dim`, shortened to L2 by `source`, on the device of the
        packing."""
        x = x.to(self.source.device)  # in a model on several devices, tensors that all layers share stay on the first
        dim %= x.dim()
        shape = [*x.shape]
        shape[dim - 1] = self.source.shape[0]
        index = self.source.reshape(*self.source.shape, *(1,) * (x.dim() - dim - 1))
        shape[dim] = self.source.shape[1]
        return x.expand(*shape[:dim], x.shape[dim], *shape[dim + 1 :]).gather(dim, index.expand(shape))

    def flat(self, where: Tensor) -> Tensor:
        """Converts flat positions in [B, L] to flat positions in [B, L2]."""
        length = self.moved.shape[1]
        return where // length * self.index.shape[1] + self.moved.reshape(-1)[where]

    def origin(self) -> Tensor:
        """Returns, for each token of [B, L2], the flat position in [B, L] of the token that it was made from."""
        starts = torch.arange(len(self.source), device=self.source.device)[:, None] * self.moved.shape[1]
        return self.source + starts


def pack(keep: Tensor, source: Tensor, pad_left: bool) -> Packing:
    """Moves the tokens of `keep` [B, L] bool to one side of each row, in order. source [B, L]: see `Packing`."""
    counts = keep.sum(1, keepdim=True)  # [B, 1]
    longest = int(counts.max())
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True, descending=not pad_left)  # [B, L]
    columns = torch.arange(longest, device=keep.device)
    index = order[:, -longest:] if pad_left else order[:, :longest]
    valid = columns >= longest - counts if pad_left else columns < counts
    index = torch.where(valid, index, index[:, -1:] if pad_left else index[:, :1])
    moved = keep.cumsum(1) - 1 + (longest - counts if pad_left else 0)
    return Packing(index, valid, source.gather(1, index), moved)


def counted(valid: Tensor) -> Tensor:
    """Returns positions 0, 1, 2, ... over the valid tokens of each row, [B, L] int64; 0 in padding before them."""
    return (valid.cumsum(1) - 1).clamp(min=0)
