"""Shortening a padded batch: which tokens go where, and the masks and positions that follow. All shapes [B, L, ...]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask


@dataclass
class Packing:
    """How a batch of rows of length L was shortened to L2."""

    index: Tensor  # [B, L2]: the column that each new column held
    # [B, L2] bool: False where it is padding, which repeats a token that stayed (4.57 counts the non-zero keys of a
    # static cache, and what left may be infinite)
    valid: Tensor
    source: Tensor  # [B, L2]: as index, but for appended basis rows the column of their token
    moved: Tensor  # [B, L]: the new column of an old one; of no meaning where that went

    def rows(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L2, D]."""
        x = x.to(self.index.device)
        return x.gather(1, self.index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    def along(self, x: Tensor, dim: int) -> Tensor:
        """x [..., B or 1, L, ...] with L at `dim` -> the same with L2, by source; on the device of the packing."""
        x = x.to(self.source.device)  # with a model on several devices, what all layers share stays on the first
        dim %= x.dim()
        shape = [*x.shape]
        shape[dim - 1] = self.source.shape[0]
        index = self.source.reshape(*self.source.shape, *(1,) * (x.dim() - dim - 1))
        shape[dim] = self.source.shape[1]
        return x.expand(*shape[:dim], x.shape[dim], *shape[dim + 1 :]).gather(dim, index.expand(shape))

    def flat(self, where: Tensor) -> Tensor:
        """Flat positions in [B, L] -> flat positions in [B, L2]."""
        length = self.moved.shape[1]
        return where // length * self.index.shape[1] + self.moved.reshape(-1)[where]

    def origin(self) -> Tensor:
        """[B, L2] -> the flat position in [B, L] that each new token held."""
        starts = torch.arange(len(self.index), device=self.index.device)[:, None] * self.moved.shape[1]
        return self.index + starts


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


def one_of(mask: Any) -> Any:
    """generate() may build a mask for each type of layer; the padding is the same in all."""
    if not isinstance(mask, dict):
        return mask
    return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))


def padding(
    mask: Any, batch: int, length: int, device: torch.device, window: int | None, *, slides: bool, past: int = 0
) -> Tensor:
    """Which tokens of a prompt are no padding, [batch, past + length] bool, from any mask that a model may be given.

    mask: None, 2-D [B, past + length], 4-D [B, 1, length, columns] bool or additive, a flex_attention BlockMask, or a
    dict of such by the type of the layers; window: of layers that slide, which are all of them if `slides`; past: what
    the cache holds. Raises ValueError where a mask is more than causal with padding.
    """
    given = mask if isinstance(mask, dict) else {"sliding_attention" if slides else "full_attention": mask}
    valid = None
    for kind, one in sorted(given.items()):  # full before sliding attention
        if one is None:
            continue
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(f"layers of type '{kind}' have a mask of their own, from which tokens cannot be dropped")
        found = _padding(one, batch, length, device, window if kind == "sliding_attention" else None, past)
        valid = found if valid is None else valid
    return torch.ones(batch, past + length, dtype=torch.bool, device=device) if valid is None else valid


def _padding(mask: Any, batch: int, length: int, device: torch.device, window: int | None, past: int) -> Tensor:
    total = past + length
    if not isinstance(mask, Tensor):
        mask = create_mask(mask.mask_mod, batch, None, length, total, device=device)
    if mask.dim() not in (2, 4) or mask.shape[-1] < total or (past and window is not None and mask.dim() == 4):
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not say which of {total} tokens are padding, {past} of "
            "which the cache holds; give a 2-D mask over all of them"
        )
    if mask.dim() == 2:
        return mask[:, :total].to(device, torch.bool)
    seen = mask[:, 0, :, :total].to(device)
    seen = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, -1, -1)  # [B, length, total]
    valid = seen.any(1)  # some query sees it, at least its own
    causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)
    if window is not None:
        causal = causal.triu(1 - window)
    queries = valid[:, past:, None]
    if not torch.equal(seen & queries, causal & valid[:, None] & queries):
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} is not causal with padding, so tokens cannot leave it"
        )
    return valid


def counted(valid: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... over the valid tokens of each row, [B, L] int64; 0 in padding before them."""
    return (valid.cumsum(1) - 1).clamp(min=0)
