"""Groups the visual tokens of a call into the units that are compressed together, and compresses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

import apet_kernels
from apet_kernels.ops import DTYPES

from .config import Keep, Options, count
from .guard import guarded
from .sequence import Packing, pack


@dataclass
class VisualTokens:
    """The tokens among the rows of some x [T, D] that can be compressed, by unit."""

    where: Tensor  # [N]: their rows, unit after unit, ascending within a unit
    lengths: list[int]  # tokens of each unit
    visuals: list[int]  # the image or video that each unit belongs to, as a number within the call

    def after(self, keep: Keep, options: Options) -> list[int]:
        """Returns the number of rows that remain of each unit; a unit that would not get shorter keeps all of its
        tokens."""
        extra = options.appended
        wanted = (count(keep, v, n, options) + extra for v, n in zip(self.visuals, self.lengths, strict=True))
        return [min(k, n) for k, n in zip(wanted, self.lengths, strict=True)]

    def without(self, gone: Tensor, remaining_counts: list[int]) -> VisualTokens:
        """Returns the tokens that remain without the rows of gone [T] bool. remaining_counts: their number by unit, as
        `after` returns it."""
        return VisualTokens(self.where[~gone[self.where]], remaining_counts, self.visuals)

    def to(self, device: torch.device) -> VisualTokens:
        """Returns the same tokens on another device, if the layers from here on are there."""
        return VisualTokens(self.where.to(device), self.lengths, self.visuals)

    def moved(self, packing: Packing) -> VisualTokens:
        """Returns the positions of the same tokens after [B, L] was shortened to [B, L2]."""
        return VisualTokens(packing.flat(self.where), self.lengths, self.visuals)


@dataclass
class Shorter:
    """The result of compressing some `VisualTokens` of x [T, D]."""

    gone: Tensor  # [T] bool: the rows of x that are dropped
    slots: Tensor  # [R]: the rows of x that are replaced by `rows`
    sources: Tensor  # [R]: the row of x that each of `rows` was made from
    rows: Tensor  # [R, D]: the compressed tokens
    tokens: VisualTokens  # the tokens that remain

    def pack(self, valid: Tensor, pad_left: bool) -> Packing:
        """Returns the packing that closes the gaps in a batch of valid [B, L] tokens, T = B * L."""
        columns = torch.arange(valid.shape[1], device=valid.device).repeat(len(valid))  # [B * L]
        source = columns.index_copy(0, self.slots, columns[self.sources])
        return pack(~self.gone.view_as(valid) & valid, source.view_as(valid), pad_left)

    def placed(self, packing: Packing, x: Tensor) -> Tensor:
        """Returns x [B, L, D] shortened to [B, L2, D], with the compressed rows in their slots."""
        packed = packing.rows(x)
        packed.view(-1, packed.shape[-1])[packing.flat(self.slots)] = self.rows
        return packed


def weights_of(relevance: Tensor, lengths: list[int], share: float) -> Tensor:
    """Returns the weights [T] of packed units, given how relevant each token is: from 1 - share for the least relevant
    token of a unit to 1 for the most relevant one, and 1 where all are equal."""
    unit = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).to(relevance.device)  # [T]
    low, high = (
        relevance.new_zeros(len(lengths)).scatter_reduce(0, unit, relevance, kind, include_self=False)[unit]
        for kind in ("amin", "amax")
    )
    scaled = torch.where(high > low, (relevance - low) / (high - low), 1)
    return 1 - share * (1 - scaled)


def group(units: Sequence[Tensor], flat: Tensor, visuals: Sequence[int]) -> VisualTokens:
    """Groups the tokens of images and videos by unit.

    units: for each image or video, the number of the unit of each of its tokens, or -1 (left out), on the CPU; flat
    [N]: the rows of all these tokens, in the same order; visuals: the number of each image or video.
    """
    sizes = [int(u.max()) + 1 if len(u) else 0 for u in units]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    number = torch.cat([torch.where(u >= 0, u + s, -1) for u, s in zip(units, starts[:-1], strict=True)])
    order = number.argsort(stable=True)[int((number < 0).sum()) :]
    lengths = number[number >= 0].bincount(minlength=starts[-1]).tolist()
    of_unit = [v for v, size in zip(visuals, sizes, strict=True) for _ in range(size)]
    filled = [(n, v) for n, v in zip(lengths, of_unit, strict=True) if n]
    return VisualTokens(flat[order.to(flat.device)], [n for n, _ in filled], [v for _, v in filled])


def shorten(
    x: Tensor,
    tokens: VisualTokens,
    keep: Keep,
    options: Options,
    relevance: Tensor | None = None,
    distinct: float = 0.0,
    warned: set[str] | None = None,
) -> Shorter | None:
    """Compresses the tokens of x [T, D], all units in one call. Returns None if no unit gets shorter.

    relevance: [T], how much each row resembles the prompt; only its order and proportions within a unit matter.
    distinct: how much rows that differ from the rest of their unit are preferred.
    warned: what the user has been warned of, for the guard; None: this stage has no guard.
    """
    remaining_counts = tokens.after(keep, options)
    active = [k < n for k, n in zip(remaining_counts, tokens.lengths, strict=True)]
    if not any(active):
        return None
    if x.dtype not in DTYPES:
        known = f"{', '.join(map(str, DTYPES[:-1]))} or {DTYPES[-1]}"
        raise ValueError(
            f"the model has visual tokens in {x.dtype}, but they can be compressed in {known} only: convert the model, "
            "e.g. model.float()"
        )
    lengths, counts = ([n for n, a in zip(ns, active, strict=True) if a] for ns in (tokens.lengths, remaining_counts))
    where = tokens.where
    if not all(active):
        where = where[torch.tensor(active).repeat_interleave(torch.tensor(tokens.lengths)).to(x.device)]
    extra = options.appended
    kept = [k - extra for k in counts]
    x_active = x[where]
    if options.share:
        kept = apet_kernels.share(x_active, lengths, kept)
    if options.guard is not None and warned is not None:
        kept = guarded(options, x_active, lengths, kept, warned)
    if options.adaptive:  # without appended rows, so counts and kept are the same
        if kept == lengths:
            return None
        adapted = iter(kept)
        remaining_counts = [next(adapted) if a else n for a, n in zip(active, tokens.lengths, strict=True)]
    weights = None if relevance is None else weights_of(relevance[where], lengths, options.relevance)
    if distinct:
        differing = apet_kernels.distinct(x_active, lengths, distinct)
        weights = differing if weights is None else weights * differing
    rows, indices = apet_kernels.compress_packed(x_active, lengths, kept, **options.kernel, weights=weights)
    slots = sources = where[indices]
    if extra:  # there are more rows than kept positions, so they take the first places of the unit
        places = [torch.arange(k) + end - n for k, n, end in zip(counts, lengths, accumulate(lengths), strict=True)]
        slots = where[torch.cat(places).to(x.device)]
    gone = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    gone[where] = True
    gone[slots] = False
    return Shorter(gone, slots, sources, rows, tokens.without(gone, remaining_counts))
