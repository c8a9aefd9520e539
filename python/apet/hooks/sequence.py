"""Shortening a padded batch: which tokens go where, and the masks and positions that follow. All shapes [B, L, ...]."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask
from transformers import masking_utils

# transformers 5 takes the layer whose cache the mask is for; 4.57 asks the cache about its first layer.
MASKS_TAKE_LAYER = "layer_idx" in inspect.signature(masking_utils.create_causal_mask).parameters


@dataclass
class Packing:
    """How a batch of rows of length L was shortened to L2.

    index [B, L2]: the column that each new column held; valid [B, L2] bool: False where it is padding, which repeats a
    token that stayed (4.57 counts the non-zero keys of a static cache, and what left may be infinite);
    source [B, L2]: as index, but for appended basis rows the column of their token; moved [B, L]: the new column of an
    old one (meaningless where it went).
    """

    index: Tensor
    valid: Tensor
    source: Tensor
    moved: Tensor

    def rows(self, x: Tensor) -> Tensor:
        """x [B, L, D] -> [B, L2, D]."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def along(self, x: Tensor, dim: int) -> Tensor:
        """x [..., B or 1, L, ...] with L at `dim` -> the same with L2, by source."""
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


def pack(keep: Tensor, source: Tensor, left: bool) -> Packing:
    """Moves the tokens of `keep` [B, L] bool to one side of each row, in order. source [B, L]: see `Packing`."""
    counts = keep.sum(1, keepdim=True)  # [B, 1]
    longest = int(counts.max())
    order = torch.argsort(keep.to(torch.uint8), dim=1, stable=True, descending=not left)  # [B, L]
    columns = torch.arange(longest, device=keep.device)
    index = order[:, -longest:] if left else order[:, :longest]
    valid = columns >= longest - counts if left else columns < counts
    index = torch.where(valid, index, index[:, -1:] if left else index[:, :1])
    moved = keep.cumsum(1) - 1 + (longest - counts if left else 0)
    return Packing(index, valid, source.gather(1, index), moved)


def one_of(mask: Any) -> Any:
    """generate() may build a mask for each type of layer; the padding is the same in all."""
    if not isinstance(mask, dict):
        return mask
    return mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()))


def padding(mask: Any, batch: int, length: int, device: torch.device, window: int | None) -> Tensor:
    """Which of the tokens of a prompt are no padding, [batch, length] bool, from any mask that a model may be given.

    mask: None, 2-D [B, length], 4-D [B, 1, length, columns] bool or additive, a flex_attention BlockMask, or a dict of
    such by the layers' type; window: how far layers see if all of them slide. Raises ValueError where a mask is more
    than causal with padding.
    """
    full = isinstance(mask, dict) and "full_attention" in mask
    mask = one_of(mask)
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=device)
    if not isinstance(mask, Tensor):
        mask = create_mask(mask.mask_mod, batch, None, length, length, device=device)
    if mask.dim() == 2:
        return mask[:, :length].to(device, torch.bool)
    seen = mask[:, 0, :, :length].to(device)
    seen = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, -1, -1)
    valid = seen.any(1)  # some query sees it, at least its own
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    if window is not None and not full:
        causal = causal.triu(1 - window)
    if not torch.equal(seen & valid[..., None], causal & valid[:, None] & valid[..., None]):
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} is not causal with padding, so tokens cannot leave it"
        )
    return valid


def counted(valid: Tensor) -> Tensor:
    """Positions 0, 1, 2, ... over the valid tokens of each row, [B, L] int64; 0 in padding before them."""
    return (valid.cumsum(1) - 1).clamp(min=0)


def layer_mask(config: Any, x: Tensor, mask: Tensor, cache: Any, layer: int, past: Any, sliding: bool) -> Any:
    """The mask of one layer, built by transformers for its attention implementation from mask [B, past + L] bool.

    x [B, L, D]: only its shape, dtype and device count.
    """
    name = "create_sliding_window_causal_mask" if sliding else "create_causal_mask"
    create = getattr(masking_utils, name)
    if MASKS_TAKE_LAYER:
        return create(config=config, inputs_embeds=x, attention_mask=mask, past_key_values=cache, layer_idx=layer)
    position = torch.arange(x.shape[1], device=x.device) + past
    shown = _OnlyLayer(cache, layer, sliding) if cache is not None else None
    return create(config=config, input_embeds=x, attention_mask=mask, cache_position=position, past_key_values=shown)


class _OnlyLayer:
    """What 4.57 asks a cache when it builds a mask, answered for one layer: it would ask about layer 0."""

    def __init__(self, cache: Any, layer: int, sliding: bool):
        self.cache, self.layer = cache, layer
        self.is_sliding = [sliding]
        self.is_compileable = cache.is_compileable

    def get_mask_sizes(self, queries: Tensor, _: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(queries, self.layer)
