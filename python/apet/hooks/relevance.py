"""How much visual tokens resemble the text of their prompt: the mean cosine with its embedded tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .locate import by_row, contiguous_lengths, placeholders
from .state import RunningCall
from .target import Target


def of_prompt(x: Tensor, text: Tensor) -> Tensor:
    """Returns the relevance [B, L] of the rows of the decoder's input x [B, L, D]. text: [B, L] bool, which of them are
    tokens of text; it is 0 where a prompt has none."""
    return _cosines(x, _mean(x, text)[:, None])


def question(call: RunningCall, like: Tensor, past: int) -> Tensor:
    """Returns which tokens of a call belong to the prompt, [B, L] bool on the device of `like` [B, L]: not those that
    have labels, nor those beyond the prompt that generate() was called with (guesses, or tokens that it has generated
    without a cache). Otherwise the answer would choose the tokens that it is computed from.

    past: the tokens in the cache before the call.
    """
    found = torch.ones_like(like, dtype=torch.bool)
    if call.scored is not None:
        found &= ~call.scored.to(like.device)
    if call.asked is not None:
        found[:, max(call.asked - past, 0) :] = False
    return found


def of_images(target: Target, core: nn.Module, call: RunningCall, y: Tensor, sizes: list[int]) -> Tensor:
    """Returns the relevance [T] of projected rows y [T, D] of the images of a call, image after image, `sizes` rows
    each, for the prompts in its arguments."""
    inputs = call.inputs
    given, ids = inputs.get("inputs_embeds"), inputs.get("input_ids")
    if given is None and ids is None:
        raise ValueError("relevance needs the prompt: call the model with input_ids or inputs_embeds")
    embeds = core.get_input_embeddings()(ids) if given is None else given  # [B, L, D]
    where = placeholders(target.adapter, core, inputs)["image"].to(embeds.device)  # [B, L]
    mask = inputs.get("attention_mask")
    past = 0 if mask is None else mask.shape[1] - where.shape[1]
    text = ~where & question(call, where, past)
    text = text if mask is None else text & mask[:, past:].bool().to(where.device)
    known = target.adapter.units(core, inputs, {"image": int(where.sum())}).get("image")
    if known is None:
        runs = contiguous_lengths(where.flatten().nonzero().view(-1).cpu())
        counts = target.adapter.split_runs(inputs, "image", runs)
    else:
        counts = [len(units) for units in known]
    rows = [row for row, _ in by_row(counts, where.sum(1).tolist(), 1, "image")]
    mean = _mean(embeds, text)[torch.tensor(rows)]  # [images, D]
    of_row = mean.repeat_interleave(torch.tensor(sizes, device=mean.device), 0)  # [T, D]
    return _cosines(y, of_row.to(y.device))


def _mean(x: Tensor, text: Tensor) -> Tensor:
    """Returns the mean [B, D] float32 of the directions of the tokens of text."""
    unit = F.normalize(x.float(), dim=-1) * text[..., None]
    return unit.sum(1) / text.sum(1, keepdim=True).clamp(min=1)


def _cosines(x: Tensor, mean: Tensor) -> Tensor:
    return (F.normalize(x.float(), dim=-1) * mean).sum(-1)
