"""What is remembered of a prompt (on its cache, for decoding) and of the forward that is running."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sequence import Packing
from .units import Shorter, Tokens


@dataclass
class Part:
    """What a shortened prompt became in some layers: those before `llm_layer`, or those from it on.

    mask [B, length] bool, or [B, capacity] with True after the prompt: a cache of fixed size gets masks of fixed size,
    or a compiled decode step would be compiled again for each; next [B, 1]: the position of the token that follows.
    """

    mask: Tensor
    next: Tensor
    length: int

    def columns(self, past: int | Tensor, new: int) -> Tensor:
        """The mask over the cache and `new` tokens more, [B, past + new] or [B, capacity] bool."""
        if self.mask.shape[1] > self.length:
            return self.mask & (torch.arange(self.mask.shape[1], device=self.mask.device) < past + new)
        return torch.nn.functional.pad(self.mask, (0, int(past) + new - self.length), value=True)


def part(cache: Any, mask: Tensor, next_position: Tensor, flash: bool) -> Part:
    """mask [B, length] bool over the prompt, which starts the cache."""
    length = mask.shape[1]
    # Flash attention takes its lengths from the width of the mask, so there it has to grow.
    if cache is not None and cache.is_compileable and not flash:
        capacity = max(layer.max_cache_len for layer in cache.layers)
        mask = torch.nn.functional.pad(mask, (0, max(capacity, length + 1) - length), value=True)
    return Part(mask, next_position, length)


@dataclass
class Prompt:
    """Stands on the cache. early, late: None for layers in which nothing was dropped; batch, tokens: the shape of the
    prompt as given, padding included."""

    early: Part | None
    late: Part | None
    batch: int
    tokens: int


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
    """A forward of the language model. In a prefill: tokens, in [B * L]; valid [B, L] bool; whether padding is left."""

    prompt: Prompt
    tokens: Tokens | None = None
    valid: Tensor | None = None
    left: bool = True
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
        if self.origin is None:
            self.left, self.origin = ~away, packing.origin().flatten()
        else:
            self.left = self.left.index_fill(0, self.origin[away], False)
            self.origin = self.origin[packing.origin().flatten()]
        self.lengths.append(packing.index.shape[1])
        self.here.append(self.left[self.flat])
