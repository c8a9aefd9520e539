"""Guides attention in training: where an answer is about some things, a layer should attend to their patches.

Without it, training stays at chance for thousands of steps: the decoder cannot learn what to do with the tokens that it
attends to before it attends to the right ones, nor the other way round. The trained model has no trace of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.vlm.features import TOKENS, Picture
from benchmarks.vlm.packing import NOTHING, Packed
from benchmarks.vlm.questions import Question

LAYER, HEADS = 2, 2  # the layer of the decoder, and how many of its heads
SPELLED = ("read", "beside")  # answered by a word, letter after letter


class Guide:
    """An attention function of transformers that also computes the loss of `LAYER`.

    looks [B, L, N] bool: which of the N visual tokens, from position 1 on, each position should attend to; positions
    without any are free. loss: minus the log of their share of the attention, the mean over heads and positions.
    """

    NAME = "guided"

    def __init__(self) -> None:
        self.looks: Tensor | None = None
        self.loss: Tensor | None = None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Computes attention as sdpa does; query, key, value [B, heads, L, d]."""
        if self.looks is not None and self.looks.any() and module.layer_idx == LAYER and attention_mask is not None:
            image, at = self.looks.any(-1).nonzero(as_tuple=True)  # [P]
            looks = self.looks[image, at]  # [P, N]
            scores = torch.einsum("phd,phkd->phk", query[image, :HEADS, at], key[image, :HEADS]).float()
            scores = scores * options["scaling"]  # [P, heads, L]
            seen = scores.masked_fill(~attention_mask[image, :, at], -torch.inf).logsumexp(-1)
            wanted = scores[..., 1 : 1 + looks.shape[-1]].masked_fill(~looks[:, None], -torch.inf).logsumexp(-1)
            self.loss = (seen - wanted).mean()
        return transformers.AttentionInterface()["sdpa"](module, query, key, value, attention_mask, **options)

    @contextlib.contextmanager
    def on(self, decoder: Any, looks: Tensor) -> Iterator[None]:
        """Uses the guide in a forward of this decoder; `loss` is there afterwards, if `looks` has any."""
        transformers.AttentionInterface.register(self.NAME, self)
        before, self.looks, self.loss = decoder.config._attn_implementation, looks, None
        decoder.config._attn_implementation = self.NAME
        try:
            yield
        finally:
            decoder.config._attn_implementation, self.looks = before, None


def looks(packed: Packed, asked: Sequence[Sequence[Question]], pictures: Sequence[Picture]) -> Tensor:
    """Returns [B, L, 256] bool: the patches that each position should attend to, whose next token belongs to an answer.

    A letter of a word is looked for where it is written, any other answer at the things that the question is about.
    """
    found = torch.zeros(*packed.ids.shape, TOKENS, dtype=torch.bool)
    for b, (some, picture) in enumerate(zip(asked, pictures, strict=True)):
        owners, letters = torch.tensor(picture.owners), torch.tensor(picture.letters)
        for number, one in enumerate(some, start=1):
            shown = torch.isin(owners, torch.tensor([1 + i for i in one.about], dtype=torch.long))
            answer = ((packed.part[b] == number) & (packed.target[b] != NOTHING)).nonzero().flatten().tolist()
            for letter, at in enumerate(answer[:-1], start=1):  # not where the answer ends
                found[b, at] = shown & (letters == letter) if one.kind in SPELLED else shown
    return found
