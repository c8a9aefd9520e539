"""`kept`: what the last prefill of a patched model kept."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .state import Trace
from .target import plain

ENGINE = "_apet"  # the attribute of a patched model that holds its engine


@dataclass(frozen=True)
class Visual:
    """The tokens that remain of one image or video."""

    modality: str  # "image" or "video"
    row: int  # in the batch
    tokens: int  # its placeholders
    remaining: list[Tensor]  # after each stage that dropped tokens: which of them remain, int64, ascending


@dataclass(frozen=True)
class Kept:
    """The tokens that a prefill kept."""

    lengths: list[int]  # of the padded sequence as given, and after each stage that dropped something
    visuals: list[Visual]
    trace: Trace = field(repr=False, compare=False)

    def align(self, x: Tensor) -> Tensor:
        """Puts logits or hidden states of the shortened sequence back at the places of their tokens in the prompt as
        given.

        Args:
            x: [B, L2, ...] of a floating-point dtype, with the length after the last stage.

        Returns:
            [B, L, ...] in x's dtype, with the length as given. Dropped tokens get NaN, so that they cannot be mistaken
            for a result; padding gets 0. If nothing was dropped, x itself.

        Raises:
            ValueError: x does not have that length.

        Example:
            >>> logits = apet.kept(model).align(model(**inputs).logits)
            >>> answer = logits[:, prompt - 1 : -1]  # as for the model that is not patched
        """
        trace, (given, *_, last) = self.trace, [*self.lengths, self.lengths[-1]]
        if x.dim() < 2 or x.shape[1] != last:
            raise ValueError(f"x has shape {tuple(x.shape)}, but the last stage has left a sequence of {last} tokens")
        if trace.origin is None or trace.remaining is None or trace.valid is None:
            return x
        full = x.new_zeros((x.shape[0] * given, *x.shape[2:]))
        full[~trace.remaining.to(x.device)] = torch.nan
        valid = trace.valid.to(x.device)
        full[trace.origin.to(x.device)[valid]] = x[valid]
        aligned: Tensor = full.unflatten(0, (x.shape[0], given))
        return aligned


def aligned(output: Any, trace: Trace, last: int) -> Any:
    """Returns the output of a core model, a tuple or a ModelOutput, with its hidden states as `Kept.align` puts them
    back: the first tensor, and those of `hidden_states` that have as many rows.

    last: of how many places, the last ones, logits are computed. Some decoders leave out the other rows themselves.
    """
    found = Kept(list(trace.lengths), [], trace)
    if last and output[0].shape[1] == last != found.lengths[-1]:
        return output
    rows = _by_place(found, output[0])
    if isinstance(output, tuple):
        return rows, *output[1:]
    output[next(iter(output))] = rows
    if (states := output.get("hidden_states")) is not None:
        # None: of a layer whose states were not asked for.
        output["hidden_states"] = tuple(
            x if x is None or x.shape[1] != found.lengths[-1] else _by_place(found, x) for x in states
        )
    return output


def _by_place(found: Kept, x: Tensor) -> Tensor:
    """Returns x as `Kept.align` puts it back. Where a prompt ends in dropped tokens, the place of its last token gets
    the row of the last one that is left, after which generation goes on."""
    full, trace = found.align(x), found.trace
    if trace.origin is None or trace.remaining is None or trace.valid is None:
        return full
    batch, length = full.shape[:2]
    held = torch.zeros_like(trace.remaining)
    held[trace.origin[trace.valid]] = True
    held, gone = (mask.view(batch, length).to(x.device) for mask in (held, ~trace.remaining))
    columns = torch.arange(1, length + 1, device=x.device)
    last, left = ((mask * columns).argmax(1) for mask in (held | gone, held))
    rows = torch.arange(batch, device=x.device)
    full[rows, last] = full[rows, left]
    return full


def kept(model: nn.Module) -> Kept | None:
    """Returns what the last prefill with images or videos kept: the last one of this thread, or, if this thread has run
    none, of any thread.

    Args:
        model: a model that `apet.patch` has patched.

    Returns:
        The lengths and the remaining tokens; None if there was no such prefill since `patch`.

    Example:
        >>> apet.kept(model).visuals[0].remaining[-1]  # the placeholders of the first image that the last stage kept
    """
    engine = plain(model).__dict__.get(ENGINE)
    trace = engine and engine.trace
    if trace is None:
        return None
    visuals, start = [], 0
    for modality, row, tokens in trace.visuals:
        remaining = [stays[start : start + tokens].nonzero().view(-1).cpu() for stays in trace.stays]
        visuals.append(Visual(modality, row, tokens, remaining))
        start += tokens
    return Kept(list(trace.lengths), visuals, trace)
