"""Aligns tower and projector with the embeddings of words: before the decoder is trained, and then beside it.

A projected token should say what its patch shows, a character and a colour, in the embeddings of the words for them,
and which letter of its word the character is. The decoder then finds "the red digit" by the embedding of "red". Without
this it answers at random for thousands of steps: it cannot learn where to look before it reads what is there, nor the
other way round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.vlm import questions, scenes, sources
from benchmarks.vlm.features import Picture
from benchmarks.vlm.packing import Packer

SHARPNESS = 40.0  # logits by cosine


class Reader(nn.Module):
    """Reads projected tokens [B, N, D], N = GRID * GRID. Its own parameters serve the training alone.

    A character or a colour is read as the model would: by the cosine with the embeddings of the words, and of `<pad>`
    for none. The number of a letter, rows and columns of the grid have no words; linear layers read them.
    """

    characters: Tensor  # [V'] ids of <pad> and of all characters
    colours: Tensor
    number: Tensor  # [128]: the index into `characters` of a character's code, 0 for none

    def __init__(self, packer: Packer, width: int) -> None:
        super().__init__()
        self.place = nn.Linear(width, 2 * scenes.GRID)
        self.letter = nn.Linear(width, 1 + sources.LONGEST)
        for name, of in (("characters", questions.CHARACTERS), ("colours", scenes.COLOURS)):
            self.register_buffer(name, torch.tensor([packer.pad, *(packer.encode(word)[0] for word in of)]))
        number = torch.zeros(128, dtype=torch.long)
        number[[ord(character) for character in questions.CHARACTERS]] = torch.arange(1, len(self.characters))
        self.register_buffer("number", number)

    def losses(self, projected: Tensor, table: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Returns the cross entropies of characters, numbers of letters, colours and places. table [V, D]: the
        embeddings, which are not changed by them."""
        rows = F.rms_norm(projected.flatten(0, 1), projected.shape[-1:])  # [B * N, D]
        sharp = SHARPNESS * projected.shape[-1] ** -0.5  # rows have the norm sqrt(D)

        def read(words: Tensor) -> Tensor:
            return sharp * rows @ F.normalize(table[words].detach(), dim=-1).T

        there = self.number[torch.tensor([picture.patches for picture in pictures])]
        letters = torch.tensor([picture.letters for picture in pictures])
        coloured = torch.tensor([picture.colours for picture in pictures])
        at = torch.arange(scenes.GRID**2).repeat(len(pictures))
        row, column = self.place(rows).split(scenes.GRID, -1)
        return {
            "characters": F.cross_entropy(read(self.characters), there.flatten()),
            "letters": F.cross_entropy(self.letter(rows), letters.flatten()),
            "colours": F.cross_entropy(read(self.colours), coloured.flatten()),
            "places": F.cross_entropy(row, at // scenes.GRID) + F.cross_entropy(column, at % scenes.GRID),
        }


@torch.no_grad()
def as_large_as_words(model: Any, x: Tensor) -> None:
    """Scales the projector's last layer so that its rows for tokens like x [..., C] have the embeddings' mean
    square."""
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight
    factor = (table.square().mean() / projector(x).square().mean()).sqrt()
    projector.linear_2.weight.mul_(factor)
    projector.linear_2.bias.mul_(factor)
