"""Compression in the model: compresses the units of a batch of items together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

import apet_kernels

from .plan import Plan


class Batch:
    """The images or videos of a call of the encoder, and the rows of them that are left."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self.plans = plans
        self.left: Tensor | None = None  # [R]: the rows that are left, counted over all items, ascending
        self._indices: Tensor | None = None  # the kept tokens, as indices into `_rows` and `_sources`
        sizes = [len(p.units) for p in plans]
        self._rows = _joined([p.order for p in plans], sizes)
        self._fixed = _joined([(p.units < 0).nonzero()[:, 0] for p in plans], sizes)
        self.features = sum(p.features for p in plans)
        sources = [p.sources[p.order] for p in plans if p.sources is not None]
        self._sources = _joined(sources, [p.features for p in plans]) if sources else None

    def project(self, x: Tensor) -> Tensor:
        """Compresses the projector's input x [..., C] to the kept tokens [K, C]; `unproject` is its counterpart."""
        x = x.reshape(-1, x.shape[-1])
        if self._indices is not None or len(x) != self.features:
            raise RuntimeError(f"the projector was called with {len(x)} tokens, the batch has {self.features}")
        tokens, self._indices = compress(x[self._sources.to(x.device)], self.plans)
        return tokens

    def unproject(self, tokens: Tensor) -> Tensor:
        """Scatters projected tokens [K, D] to [features, D], with zeros for dropped tokens."""
        full = tokens.new_zeros(self.features, tokens.shape[-1])
        full[self._sources.to(tokens.device)[self._indices]] = tokens
        return full

    def shorten(self, rows: Sequence[Tensor], width: int | None) -> list[Tensor]:
        """Compresses the rows [N, D] of each item to [R, D], by their first `width` channels."""
        x = torch.cat([r.reshape(-1, r.shape[-1]) for r in rows])
        where, fixed = self._rows.to(x.device), self._fixed.to(x.device)
        if self._indices is None:
            tokens, self._indices = compress(x[where, :width], self.plans)
            kept = where[self._indices]
            if width is not None:
                tokens = torch.cat([tokens, x[kept, width:]], dim=1)
        else:
            kept = where[self._indices]
            tokens = x[kept]
        self.left, order = torch.cat([kept, fixed]).sort()
        return list(torch.cat([tokens, x[fixed]])[order].split([p.rows for p in self.plans]))


def compress(x: Tensor, plans: Sequence[Plan]) -> tuple[Tensor, Tensor]:
    """Compresses x [T, D], unit after unit and item after item, to tokens [R, D]; also returns their rows in x [R]
    int64.

    Successive items with the same options (except for how many tokens to keep) take one call of the kernel.
    """
    tokens, indices, start = [], [], 0
    for _, group in itertools.groupby(plans, key=lambda plan: plan.kernel):
        batch = list(group)
        lengths = [n for plan in batch for n in plan.lengths]
        end = start + sum(lengths)
        rows, where = apet_kernels.compress_packed(
            x[start:end], lengths, [k for plan in batch for k in plan.kept], **batch[0].kernel
        )
        tokens.append(rows)
        indices.append(where + start)
        start = end
    return torch.cat(tokens), torch.cat(indices)


def _joined(parts: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Converts row numbers within each item to row numbers over all items, one after another."""
    starts = itertools.accumulate(sizes, initial=0)
    return torch.cat([part + start for part, start in zip(parts, starts, strict=False)])
