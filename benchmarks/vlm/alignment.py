"""What tower and projector are trained to say about patches, before the decoder is trained.

A projected token should say which character and which colour its patch shows, which letter of its word the character
is, how bright the patch is, and whether the middle of a thing is in it, so that a linear layer can read it. Without
this the decoder answers at random for thousands of steps: it cannot learn where to look before it reads what is there,
nor the other way round.

What tokens say must not be said in the embeddings of words: attention would find the word "red" of the question before
any red patch, since nothing resembles a word as much as it does itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.vlm import questions, scenes, sources
from benchmarks.vlm.features import Picture


class Reader(nn.Module):
    """Reads projected tokens [B, N, D], N = GRID * GRID, by linear layers, which serve the training alone."""

    number: Tensor  # [128]: 1 + the index into CHARACTERS of a character's code, 0 for none

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = {
            "characters": 1 + len(questions.CHARACTERS),
            "letters": 1 + sources.LONGEST,
            "colours": 1 + len(scenes.COLOURS),
            "middles": 2,
            "rows": scenes.GRID,
            "columns": scenes.GRID,
        }
        self.read = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.brightness = nn.Linear(width, 1)
        number = torch.zeros(128, dtype=torch.long)
        number[[ord(character) for character in questions.CHARACTERS]] = torch.arange(1, sizes["characters"])
        self.register_buffer("number", number)

    def losses(self, projected: Tensor, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        """Returns the cross entropies of characters, numbers of letters, colours, middles and places, and the mean
        squared error of the brightness, from -1 to 1."""
        rows = F.rms_norm(projected.flatten(0, 1), projected.shape[-1:])  # [B * N, D]
        at = torch.arange(scenes.GRID**2).repeat(len(pictures))
        right = {
            "characters": self.number[torch.tensor([picture.patches for picture in pictures])].flatten(),
            "letters": torch.tensor([picture.letters for picture in pictures]).flatten(),
            "colours": torch.tensor([picture.colours for picture in pictures]).flatten(),
            "middles": (torch.tensor([picture.middles for picture in pictures]).flatten() > 0).long(),
            "rows": at // scenes.GRID,
            "columns": at % scenes.GRID,
        }
        losses = {name: F.cross_entropy(self.read[name](rows), labels) for name, labels in right.items()}
        brightness = torch.tensor([picture.brightness for picture in pictures]).flatten() / 127.5 - 1
        losses["brightness"] = F.mse_loss(self.brightness(rows).squeeze(-1), brightness)
        losses["places"] = losses.pop("rows") + losses.pop("columns")
        return losses


@torch.no_grad()
def as_large_as_words(model: Any, x: Tensor) -> None:
    """Scales the projector's last layer so that its rows for tokens like x [..., C] have the embeddings' mean
    square."""
    projector, table = model.model.multi_modal_projector, model.get_input_embeddings().weight
    factor = (table.square().mean() / projector(x).square().mean()).sqrt()
    projector.linear_2.weight.mul_(factor)
    projector.linear_2.bias.mul_(factor)
