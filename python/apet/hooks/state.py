"""The state of a call while it runs, and the state of a prompt that is stored on its cache."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from .calling import is_pixels
from .masks import More
from .sequence import Packing
from .units import Shorter, VisualTokens

NOT_COMPILED_REASON = "the length of a compressed prompt depends on its data; only decoding is compiled"


@dataclass
class Part:
    """The state of a prompt in some of the layers: those before `llm_layer`, or those from it on."""

    # [B, length] bool; if `fixed`, [B, capacity] and True after the prompt: with a cache of fixed size the masks have a
    # fixed size, too, so that a decode step is compiled only once.
    mask: Tensor
    offset: Tensor  # [B, 1]: position of a token after the prompt, less its column in the cache
    fixed: bool

    def columns(self, past: int | Tensor, new: int, tail: Tensor | None) -> Tensor:
        """Returns the mask over the cache and `new` more tokens: [B, past + new] bool, or [B, capacity] if fixed.

        tail [B, n] bool: which of the tokens after the prompt are no padding; None: all.
        """
        if self.fixed and new > 1 and not torch.compiler.is_compiling():
            # Layers that keep a state take the last columns for the new tokens; mask functions pad the rest.
            return self.mask[:, : int(past) + new]
        if self.fixed:
            columns = torch.arange(self.mask.shape[1], device=self.mask.device)
            return self.mask & (columns < on(past, self.mask.device) + new)
        mask = self.mask[:, : int(past)]  # speculative decoding may take back text that was part of the prompt
        if tail is None:
            return torch.nn.functional.pad(mask, (0, int(past) + new - mask.shape[1]), value=True)
        return torch.cat([mask, tail.to(mask.device)], dim=1)

    def positions(self, past: int | Tensor, new: int, tail: Tensor | None) -> Tensor:
        """Returns the positions of the `new` tokens [B, new]; arguments as in `columns`."""
        positions = self.offset + on(past, self.offset.device) + torch.arange(new, device=self.offset.device)
        return positions if tail is None else positions - (~tail).cumsum(1)[:, -new:].to(positions.device)

    def rows(self, index: Tensor) -> Part:
        """Returns the same state for these rows of the batch."""
        index = index.to(self.mask.device)
        return Part(self.mask[index], self.offset[index.to(self.offset.device)], self.fixed)


def part(cache: Cache | None, mask: Tensor, following: Tensor, flash: bool) -> Part:
    """Builds a `Part` from mask [B, length] bool over the prompt, which starts the cache, and the next position [B,
    1]."""
    length = mask.shape[1]
    # The mask must grow with flash attention, which takes lengths from its width, and if all layers slide, because
    # their caches are no longer than their windows.
    fixed = cache is not None and cache.is_compileable and not flash
    sizes = [getattr(layer, "max_cache_len", 0) for layer in cache.layers if not layer_slides(layer)] if fixed else []
    fixed = max(sizes, default=0) > 0
    if fixed:
        mask = torch.nn.functional.pad(mask, (0, max(sizes) - length), value=True)
    return Part(mask, following - length, fixed)


def on(length: int | Tensor, device: torch.device) -> int | Tensor:
    """Returns a length on this device. A cache of fixed size counts tokens in a tensor, on the device of its layer."""
    return length.to(device) if isinstance(length, Tensor) else length


def layer_slides(layer: Any) -> bool:
    """Returns whether a layer of a cache holds only the end of the sequence (a sliding window)."""
    return bool(getattr(layer, "is_sliding", False))


@dataclass
class Prompt:
    """The state of a prompt. It is stored on every cache that a patched model fills, even if no tokens were dropped."""

    batch: int  # rows
    length: int = 0  # its length as given, padding included; 0: it has no visual tokens
    early: Part | None = None  # layers before llm_layer; None: nothing was dropped there
    late: Part | None = None  # layers from llm_layer on; None: nothing was dropped there
    llm_layer: int | None = None  # the first of the late layers
    positions: str = ""  # "keep" or "renumber": what the tokens of the late layers did with theirs
    dropped: int = 0  # tokens that the early layers have less than were given
    least: int | Tensor = 0  # columns of the early layers up to the last visual token
    forward: Forward | None = None  # the running step

    @property
    def compressed(self) -> bool:
        return self.early is not None or self.late is not None


@dataclass
class Late:
    """What the layers from `llm_layer` on are given in this forward, in place of what the model gives them."""

    mask: Tensor  # [B, columns] bool
    past: int | Tensor
    positions: Tensor  # [B, L]
    x: Tensor  # [B, L, ...], for its shape, dtype and device
    packing: Packing | None = None  # in a prefill
    before: Tensor | None = None  # in a prefill: the counted positions [B, L] of the tokens in earlier layers
    more: More = field(default_factory=dict)  # in a prefill: the pairs seen beyond causal attention
    built: dict[str, Any] = field(default_factory=dict)  # masks, by the kind of layers
    rotary: dict[str, Any] = field(default_factory=dict)  # rotary embeddings, by the kind of layers, or "" for all
    given: dict[str, Any] = field(default_factory=dict)  # the rotary embeddings that the model gives, likewise

    def follow(self, x: Tensor) -> None:
        """Moves everything to the device of x, the hidden states of a layer: in a model on several devices, the layers
        from here on are on another one."""
        device = x.device
        if device == self.x.device:
            return
        self.x, self.mask, self.positions = x, self.mask.to(device), self.positions.to(device)
        self.past = on(self.past, device)
        self.packing = self.packing and self.packing.to(device)
        self.before = None if self.before is None else self.before.to(device)
        self.built, self.rotary, self.given = {}, {}, {}


@dataclass
class Forward:
    """A running forward of the language model."""

    language_model: nn.Module
    prompt: Prompt
    visual: VisualTokens | None = None  # in a prefill: the visual tokens, as positions in [B * L]
    valid: Tensor | None = None  # in a prefill: [B, L] bool, which tokens are no padding
    prefix: Tensor | None = None  # in a prefill: [B, past] bool, the same for the tokens that the cache held before
    more: More = field(default_factory=dict)  # in a prefill: the pairs seen beyond causal attention
    pad_left: bool = True
    tail: Tensor | None = None  # in later steps: [B, n] bool, which tokens after the prompt are no padding; None: all
    late: Late | None = None
    # In a prefill whose tokens keep positions along one axis [B, L]: these, and counted ones for the layers.
    positions: tuple[Tensor, Tensor] | None = None
    rotary_checked: bool = False  # whether a layer was seen to get the rotary embedding of these
    cache: Cache | None = None  # the cache that its layers write to
    trace: Trace | None = None
    labels: Tensor | None = None  # the labels given to the model, which are shortened with the sequence
    attributes: Mapping[int, Tensor] = field(default_factory=dict)  # as of the call


@dataclass
class RunningCall:
    """A running call of a patched model."""

    engine: weakref.ref[Any]
    of: str  # its kind: "generate"; "model" and "core", with images or videos
    inputs: Mapping[str, Any]  # the arguments, by name
    rows: int = 0  # of "generate": the rows of the batch that it was called with
    compressed: bool = False  # of "generate": whether its prefill has dropped tokens
    core: nn.Module | None = None
    labels: Tensor | None = None
    by_place: bool = False  # of "model": whether the core model's result is put back at the places as given
    last: int = 0  # of "model": of how many places, the last ones, it computes logits; 0: of all, or of others
    scored: Tensor | None = None  # of "core": [B, L] bool, the tokens with labels
    asked: int | None = None  # of "core": the tokens of a prompt that generate() was called with
    attributes: Mapping[int, Tensor] = field(default_factory=dict)  # of the core model's parts when the call began
    forward: Forward | None = None  # of "core": the running prefill of the language model that has the images
    trace: Trace | None = None  # of "core": what that prefill has kept
    columns: int = 0  # of "core": the columns of the prompt that calls of the language model have had so far
    held: int = 0  # of "core": the tokens in the cache after the last of these calls


# The calls that run in this thread, the innermost last. Each thread has its own list.
_CALLS: ContextVar[tuple[RunningCall, ...]] = ContextVar("apet_calls", default=())


@contextmanager
def running(call: RunningCall) -> Iterator[RunningCall]:
    """Makes `current` find this call for the length of a with block."""
    token = _CALLS.set((*_CALLS.get(), call))
    try:
        yield call
    finally:
        _CALLS.reset(token)


def begin(call: RunningCall) -> None:
    """Makes `current` find this call until `end`."""
    _CALLS.set((*_CALLS.get(), call))


def end(engine: Any, of: str) -> None:
    """Ends an engine's innermost call of this kind, if there is one, and all calls that began within it."""
    calls = _CALLS.get()
    for i in reversed(range(len(calls))):
        if calls[i].engine() is engine and calls[i].of == of:
            _CALLS.set(calls[:i])
            return


def drop_stale(engine: Any) -> None:
    """Ends the calls of the model and the core model that an interrupt has left: torch runs no hooks after one. Called
    before a call of the model, which is in none of them."""
    calls = _CALLS.get()
    mine = [i for i, call in enumerate(calls) if call.engine() is engine]
    within = max((i for i in mine if calls[i].of == "generate"), default=-1)
    stale = [i for i in mine if i > within]
    if stale:
        _CALLS.set(calls[: stale[0]])


def current(engine: Any, *of: str) -> RunningCall | None:
    """Returns an engine's innermost running call of these kinds, or None."""
    return next((c for c in reversed(_CALLS.get()) if c.engine() is engine and c.of in of), None)


def has_pixels(inputs: Mapping[str, Any]) -> bool:
    """Returns whether the arguments hold images or videos as pixels, not encoded."""
    return any(is_pixels(name) and value is not None for name, value in inputs.items())


@dataclass
class Trace:
    """The record of what a prefill kept. `apet.kept` turns it into a `Kept`."""

    visuals: list[tuple[str, int, int]]  # modality, row, number of placeholders
    flat: Tensor  # [N]: these placeholders, one image or video after another, in [B * L]
    lengths: list[int]  # of the sequence, padding included: as given, and after each stage that dropped something
    stays: list[Tensor] = field(default_factory=list)  # after each such stage: which placeholders remain, [N] bool
    origin: Tensor | None = None  # [B, L now]: the positions of the tokens in [B * L]; None: nothing was dropped yet
    valid: Tensor | None = None  # [B, L now] bool: False where a row repeats a token as padding
    remaining: Tensor | None = None  # [B * L] bool

    def stage(self, shorter: Shorter, packing: Packing) -> None:
        """Records a stage that dropped tokens."""
        dropped = shorter.gone.clone()  # [B * L now]
        dropped[shorter.slots] = True
        dropped[shorter.sources] = False
        dropped, origin = dropped.to(self.flat.device), packing.origin().to(self.flat.device)
        if self.origin is None or self.remaining is None:
            self.remaining, self.origin = ~dropped, origin
        else:
            self.remaining = self.remaining.index_fill(0, self.origin.flatten()[dropped], False)
            self.origin = self.origin.flatten()[origin]
        self.valid = packing.valid.to(self.flat.device)
        self.lengths.append(packing.index.shape[1])
        self.stays.append(self.remaining[self.flat])

    def within(self, start: int, length: int, mask: Any) -> None:
        """Changes the record of a part of a prompt, from column `start` on, to one of the whole prompt [B, length].

        mask: the attention mask of the prompt, if it was given.
        """
        part, device = self.lengths[0], self.flat.device
        if part == length:
            return
        self.lengths = [length - part + n for n in self.lengths]
        self.flat = self.flat // part * length + self.flat % part + start
        if self.origin is None or self.remaining is None or self.valid is None:
            return
        columns = torch.arange(len(self.origin) * length, device=device).view(-1, length)  # [B, length]
        origin = self.origin // part * length + self.origin % part + start
        columns = torch.cat([columns[:, :start], origin, columns[:, start + part :]], 1)
        real = torch.ones(len(columns), length, dtype=torch.bool, device=device)
        if isinstance(mask, Tensor) and mask.dim() == 2:
            real = mask[:, -length:].to(device, torch.bool)
        self.valid = torch.cat([real[:, :start], self.valid, real[:, start + part :]], 1)
        remaining = torch.ones(len(columns), length, dtype=torch.bool, device=device)
        remaining[:, start : start + part] = self.remaining.view(-1, part)
        self.origin, self.remaining = columns, remaining.flatten()

    def shorten_labels(self, labels: Tensor) -> None:
        """Shortens labels [B, L] in place to [B, L2], the tokens that remain after all stages; -100 in padding."""
        if self.origin is None or self.remaining is None:
            return
        given, device = labels.flatten(), labels.device
        scored = (given != -100) & ~self.remaining.to(device)
        dropped = scored.nonzero().flatten().tolist()
        if dropped:
            row, column = divmod(dropped[0], labels.shape[1])
            raise ValueError(
                f"labels score the token in row {row}, column {column}, which was dropped: labels of visual tokens "
                "must be -100"
            )
        shorter = given[self.origin.to(device)].masked_fill(~self.valid.to(device), -100)
        labels.set_(shorter)
