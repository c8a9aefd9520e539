"""Reads which pairs of tokens an attention mask shows beyond causal attention, and keeps them when tokens are dropped.

Over the tokens that are no padding, the mask of one kind of layers is causal attention (within a window or a chunk, if
the layers have one), perhaps with additional pairs: in Gemma the tokens of an image see each other both ways. The
additional pairs are kept and gathered in both dimensions. The causal part is built again by transformers' own functions
over the remaining columns, because in later steps windows and chunks are counted over these, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from .mask_functions import KINDS, RECURRENT
from .sequence import Packing

More = dict[str, Tensor]  # kind of layers -> the pairs [B, L, past + L] bool seen in addition to the causal ones


@dataclass(frozen=True)
class Reach:
    """The window and chunk size that limit which tokens the layers of a decoder see."""

    single: str  # the kind of layers that the mask is for, if there is one mask for all layers
    window: int | None = None  # tokens, of "sliding_attention"
    chunk: int | None = None  # tokens, of "chunked_attention"

    def causal(self, kind: str, valid: Tensor, past: int) -> Tensor:
        """Returns the pairs [B or 1, L, past + L] bool that layers of a kind see; valid [B, past + L]: no padding."""
        total = valid.shape[1]
        pairs = torch.ones(total - past, total, dtype=torch.bool, device=valid.device).tril(past)
        if kind == "sliding_attention" and self.window is not None:
            return pairs.triu(past + 1 - self.window)[None]
        if kind == "chunked_attention" and self.chunk is not None:  # chunks begin with the first token
            columns = torch.arange(total, device=valid.device)
            number = (columns - (valid.cumsum(1) == 0).sum(1, keepdim=True)).div(self.chunk, rounding_mode="floor")
            return pairs & (number[:, past:, None] == number[:, None, :])
        return pairs[None]


def read(mask: Any, batch: int, length: int, device: torch.device, reach: Reach, past: int = 0) -> tuple[Tensor, More]:
    """Returns which tokens are no padding, [batch, past + length] bool, and the pairs seen beyond causal attention.

    mask: None, 2-D [B, past + length], 4-D [B, 1, length, columns] bool or additive, a flex_attention BlockMask, or a
    dict of these by the kind of the layers; past: the number of tokens in the cache. Every mask of a dict is read.
    Raises ValueError if a mask hides what causal attention shows.
    """
    given = mask if isinstance(mask, Mapping) else {reach.single: mask}
    valid: Tensor | None = None
    more: More = {}
    for kind, one in sorted(given.items()):
        if one is None or kind in RECURRENT:  # the masks of the other kinds show the same padding
            continue
        if kind not in KINDS:
            raise ValueError(f"layers of type '{kind}' have a mask of their own, from which tokens cannot be dropped")
        found, beside = _read(one, kind, batch, length, device, reach, past)
        if valid is not None and not torch.equal(valid, found):
            raise ValueError(f"the attention masks of {', '.join(sorted(given))} differ in their padding")
        valid = found
        if beside is not None:
            more[kind] = beside
    if valid is None:
        valid = torch.ones(batch, past + length, dtype=torch.bool, device=device)
    return valid, more


def _read(
    mask: Any, kind: str, batch: int, length: int, device: torch.device, reach: Reach, past: int
) -> tuple[Tensor, Tensor | None]:
    """Returns what `read` does, for the mask of one kind of layers; None instead of no pairs."""
    total = past + length
    if not isinstance(mask, Tensor):
        mask = create_mask(mask.mask_mod, batch, None, length, total, device=device)
    if mask.dim() not in (2, 4) or mask.shape[-1] < total:
        raise ValueError(
            f"attention_mask of shape {tuple(mask.shape)} does not say which of {total} tokens are padding, {past} of "
            "which the cache holds; give a 2-D mask over all of them"
        )
    if mask.dim() == 2:
        return mask[:, :total].to(device, torch.bool), None
    if mask.shape[1] != 1 and not torch.equal(mask, mask[:, :1].expand_as(mask)):
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} differs between heads, which is not supported"
        )
    seen = mask[:, 0, :, :total].to(device)
    seen = (seen if seen.dtype == torch.bool else seen == 0).expand(batch, -1, -1)  # [B, length, total]
    valid = seen.any(1)  # a token that is no padding is seen by some query, at least by its own
    pairs = valid[:, past:, None] & valid[:, None, :]
    causal, seen = reach.causal(kind, valid, past) & pairs, seen & pairs
    if (causal & ~seen).any():
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} hides tokens that causal attention shows, so tokens "
            "cannot leave it"
        )
    beside = seen & ~causal
    return valid, beside if beside.any() else None


def packed(more: More, packing: Packing, past: int) -> More:
    """Returns the same pairs after [B, L] was shortened to [B, L2]: bool [B, L2, past + L2] for each kind of layers."""
    columns = torch.arange(past, device=packing.index.device).expand(len(packing.index), -1)
    columns = torch.cat([columns, packing.index + past], dim=1)  # [B, past + L2]
    valid = torch.cat([torch.ones_like(columns[:, :past], dtype=torch.bool), packing.valid], dim=1)
    found = {}
    for kind, pairs in more.items():
        pairs = pairs.to(packing.index.device)
        rows = pairs.gather(1, packing.index[:, :, None].expand(-1, -1, pairs.shape[2]))  # [B, L2, past + L]
        pairs = rows.gather(2, columns[:, None, :].expand(-1, rows.shape[1], -1))
        found[kind] = pairs & valid[:, None, :] & packing.valid[:, :, None]
    return found
