"""Guides attention in training: where an answer is about some things, two heads should attend to their patches.

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
from benchmarks.vlm.packing import NOTHING, Blocks, Packed, attend
from benchmarks.vlm.questions import QUARTERS, Question
from benchmarks.vlm.scenes import GRID

LAYER, HEADS = 2, 2  # the layer of the decoder, and how many of its heads
BEFORE = 1  # the layer that should attend to a word whose neighbour is asked for
SPELLED = ("read", "beside")  # answered by a word, letter after letter
PLACED = ("place", "relation")  # answered from where things are


class Guide:
    """An attention function of transformers that also computes the loss of guided layers.

    looks: for each guided layer [B, L, HEADS, N] bool, which of the N visual tokens, from position 1 on, each head
    should attend to at each position; without any it is free. loss: for each layer, minus the log of their share of the
    attention, the mean over heads and positions; the sum of the layers.
    """

    NAME = "guided"

    def __init__(self) -> None:
        self.looks: dict[int, Tensor] = {}
        self.losses: list[Tensor] = []
        self.blocks: Blocks | None = None

    @property
    def loss(self) -> Tensor | None:
        """The loss of the last forward; None if no head had anything to attend to."""
        return torch.stack(self.losses).sum() if self.losses else None

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        """Computes attention within the blocks of the sequences; query, key, value [B, heads, L, d]."""
        looks = self.looks.get(module.layer_idx)
        if looks is not None and looks.any() and attention_mask is not None:
            missed = []
            for b, wanted in enumerate(looks):
                at = wanted.flatten(1).any(-1).nonzero().flatten()  # [P]
                shown = wanted[at].transpose(0, 1)  # [HEADS, P, N]
                scores = (query[b, :HEADS, at] @ key[b, :HEADS].mT).float() * options["scaling"]  # [HEADS, P, L]
                all_seen = scores.masked_fill(~attention_mask[b, :, at], -torch.inf).logsumexp(-1)
                right = scores[..., 1 : 1 + shown.shape[-1]].masked_fill(~shown, -torch.inf).logsumexp(-1)
                missed.append((all_seen - right)[shown.any(-1)])
            self.losses.append(torch.cat(missed).mean())
        assert self.blocks is not None
        return attend(query, key, value, self.blocks, options["scaling"]).transpose(1, 2), None

    @contextlib.contextmanager
    def on(self, decoder: Any, packed: Packed, looks: dict[int, Tensor]) -> Iterator[None]:
        """Uses the guide in a forward of this decoder over these sequences; `loss` is that of this forward
        afterwards."""
        transformers.AttentionInterface.register(self.NAME, self)
        before, self.looks, self.losses = decoder.config._attn_implementation, looks, []
        self.blocks = Blocks.of(packed.part)
        decoder.config._attn_implementation = self.NAME
        try:
            yield
        finally:
            decoder.config._attn_implementation, self.looks = before, {}


def looks(packed: Packed, asked: Sequence[Sequence[Question]], pictures: Sequence[Picture]) -> dict[int, Tensor]:
    """Returns for each guided layer [B, L, HEADS, 256] bool: the patches that each head should attend to at a position
    whose next token belongs to an answer.

    A letter of a word is looked for where it is written, where a thing is in its middle, any other answer at the things
    that the question is about; where two things are compared, each head looks for one. For the word beside another one,
    the layer before looks for that one, and for the brightest quarter heads look there.
    """
    found, before = (torch.zeros(*packed.ids.shape, HEADS, TOKENS, dtype=torch.bool) for _ in range(2))
    for b, (some, picture) in enumerate(zip(asked, pictures, strict=True)):
        owners, letters, middles = (torch.tensor(v) for v in (picture.owners, picture.letters, picture.middles))
        for number, one in enumerate(some, start=1):
            of_things = middles if one.kind in PLACED else owners
            shown = torch.isin(of_things, torch.tensor([1 + i for i in one.about], dtype=torch.long)).repeat(HEADS, 1)
            if one.kind == "relation":
                shown = of_things == 1 + torch.tensor(one.about)[:, None]
            elif one.kind == "brightest":
                shown = quarter(QUARTERS.index(one.answer)).repeat(HEADS, 1)
            beside = owners == owner_of(picture, one.text.split()[-1]) if one.kind == "beside" else None
            answer = ((packed.part[b] == number) & (packed.target[b] != NOTHING)).nonzero().flatten().tolist()
            for letter, at in enumerate(answer[:-1], start=1):  # not where the answer ends
                found[b, at] = shown & (letters == letter) if one.kind in SPELLED else shown
                if beside is not None:
                    before[b, at] = beside
    return {BEFORE: before, LAYER: found}


def quarter(number: int) -> Tensor:
    """Returns the patches of a quarter of the picture, an index into `QUARTERS`, [256] bool."""
    rows, columns = (torch.arange(GRID) // (GRID // 2) == half for half in divmod(number, 2))
    return (rows[:, None] & columns).flatten()


def owner_of(picture: Picture, word: str) -> int:
    """Returns which thing of the picture, from 1 on, is this word as far as patches show its letters; -1 if none is."""
    spelled: dict[int, bool] = {}
    for owner, letter, code in zip(picture.owners, picture.letters, picture.patches, strict=True):
        if letter > 0:
            spelled[owner] = spelled.get(owner, True) and word[letter - 1 : letter] == chr(code)
    return next((owner for owner, fits in spelled.items() if fits), -1)
