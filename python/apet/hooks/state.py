"""What is remembered of a prompt (on its cache, for decoding) and of the forward that is running."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sequence import Packing
from .units import Shorter, Tokens

PREFILL = "how long a shortened prompt is depends on its data; only decoding compiles"


@dataclass
class Part:
    """What a shortened prompt became in some layers: those before `llm_layer`, or those from it on.

    mask [B, length] bool, or if fixed [B, capacity] with True after the prompt: a cache of fixed size gets masks of
    fixed size, or a compiled decode step would be compiled again and again; offset [B, 1]: what a token's position is
    beyond its column in the cache.
    """

    mask: Tensor
    offset: Tensor
    fixed: bool

    def columns(self, past: int | Tensor, new: int, tail: Tensor | None) -> Tensor:
        """The mask over the cache and `new` tokens more: [B, past + new] bool, or [B, capacity] if fixed.

        tail [B, n] bool: which of the tokens after the prompt are no padding; None: all.
        """
        if self.fixed:
            return self.mask & (torch.arange(self.mask.shape[1], device=self.mask.device) < past + new)
        mask = self.mask[:, : int(past)]  # speculative decoding may take text back that it gave with the prompt
        if tail is None:
            return torch.nn.functional.pad(mask, (0, int(past) + new - mask.shape[1]), value=True)
        return torch.cat([mask, tail.to(mask.device)], dim=1)

    def positions(self, past: int | Tensor, new: int, tail: Tensor | None) -> Tensor:
        """The positions of the `new` tokens [B, new]; arguments as in `columns`."""
        positions = self.offset + past + torch.arange(new, device=self.offset.device)
        return positions if tail is None else positions - (~tail).cumsum(1)[:, -new:].to(positions.device)


def part(cache: Any, mask: Tensor, following: Tensor, flash: bool) -> Part:
    """mask [B, length] bool over the prompt, which starts the cache; following [B, 1]: the position after it."""
    length = mask.shape[1]
    # Flash attention takes lengths from the width of the mask, so there it has to grow.
    fixed = cache is not None and cache.is_compileable and not flash
    if fixed:
        capacity = max(layer.max_cache_len for layer in cache.layers)
        mask = torch.nn.functional.pad(mask, (0, capacity - length), value=True)
    return Part(mask, following - length, fixed)


@dataclass
class Prompt:
    """Stands on the cache. early, late: None for layers in which nothing was dropped; batch: its rows; tokens: its
    length as given, padding included; dropped: by how much the early layers' is shorter; least: how much of it these
    layers need to hold, for the rest is text."""

    early: Part | None
    late: Part | None
    batch: int
    tokens: int
    dropped: int
    least: int | Tensor


@dataclass
class Late:
    """What the layers from `llm_layer` on get in this forward instead of what the model gives them."""

    mask: Tensor  # [B, columns] bool
    past: int | Tensor
    rotary: tuple[Tensor, ...] | None  # None: as the earlier layers
    x: Tensor  # [B, L, D], for its shape, dtype and device
    built: dict[bool, Any] = field(default_factory=dict)  # the layers' masks, by whether they slide


@dataclass
class Run:
    """A forward of the language model. In a prefill: tokens, in [B * L]; valid [B, L] bool; whether padding is left.
    Later: tail [B, n] bool, which tokens after the prompt are no padding, None: all."""

    prompt: Prompt
    tokens: Tokens | None = None
    valid: Tensor | None = None
    left: bool = True
    tail: Tensor | None = None
    late: Late | None = None


@dataclass
class Trace:
    """What the last prefill kept: see `Kept`, which it becomes when somebody asks."""

    visuals: list[tuple[str, int, int]]  # modality, row, number of placeholders
    flat: Tensor  # [N]: these placeholders, one image or video after another, in [B * L]
    lengths: list[int]  # of the sequence, padding included: as given, and after each stage that dropped something
    here: list[Tensor] = field(default_factory=list)  # after each such stage: which placeholders are left, [N] bool
    origin: Tensor | None = None  # [B * L now]: where the tokens stood in [B * L]; None: there
    left: Tensor | None = None  # [B * L] bool

    def stage(self, shorter: Shorter, packing: Packing) -> None:
        """A stage dropped something."""
        away = shorter.gone.clone()  # [B * L now]
        away[shorter.slots] = True
        away[shorter.sources] = False
        away, origin = away.to(self.flat.device), packing.origin().flatten().to(self.flat.device)
        if self.origin is None:
            self.left, self.origin = ~away, origin
        else:
            self.left = self.left.index_fill(0, self.origin[away], False)
            self.origin = self.origin[origin]
        self.lengths.append(packing.index.shape[1])
        self.here.append(self.left[self.flat])
