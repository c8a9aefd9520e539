"""A small network that answers questions about a picture from its tokens; it is trained on full token sets only.

It replaces the language model of a VLM, which also gets compressed tokens without having been trained on them. It reads
tokens only by cross-attention, in rounds, so it takes any number of tokens in any order. Each token has its position
(row and column of its patch).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.scenes import KINDS, NO_ARGUMENT

WIDTH, HEADS, ROUNDS = 96, 4, 2
EPOCHS, IMAGES, RATE, DECAY, DROPOUT = 15, 32, 2e-3, 0.05, 0.1
SIDE = 16  # patches to an edge
OFFSETS = torch.tensor([0, *KINDS.values()]).cumsum(0)  # [kinds + 1]: where the logits of each kind begin


@dataclass
class Asked:
    """Questions of n pictures, Q each, padded."""

    kind: Tensor  # [n, Q] int64
    argument: Tensor  # [n, Q] int64
    answer: Tensor  # [n, Q] int64; -1: padding

    def of(self, pictures: Tensor) -> Asked:
        """Returns the questions of some pictures [b]."""
        return Asked(self.kind[pictures], self.argument[pictures], self.answer[pictures])


class _Round(nn.Module):
    """A block: questions attend to the tokens, then an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_q, self.norm_m = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.kv, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(4 * WIDTH, WIDTH)
        )

    def forward(self, asked: Tensor, seen: Tensor) -> Tensor:
        """Updates asked [B, Q, W] from seen [B, K, W]."""
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # [B, heads, Q or K, W / heads]
            for part in (self.q(self.norm_q(asked)), *self.kv(seen).chunk(2, -1))
        )
        looked = F.scaled_dot_product_attention(q, k, v)
        asked = asked + self.out(looked.transpose(1, 2).flatten(2))
        return asked + self.mlp(self.norm_m(asked))


class Reader(nn.Module):
    """Computes logits from tokens, positions, kinds and arguments."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.enter = nn.LayerNorm(width), nn.Linear(width, WIDTH)
        self.row, self.column = nn.Embedding(SIDE, WIDTH), nn.Embedding(SIDE, WIDTH)
        self.seen = nn.LayerNorm(WIDTH)
        self.kind, self.argument = nn.Embedding(len(KINDS), WIDTH), nn.Embedding(NO_ARGUMENT + 1, WIDTH)
        self.rounds = nn.ModuleList(_Round() for _ in range(ROUNDS))
        self.answer = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, int(OFFSETS[-1])))

    def forward(self, tokens: Tensor, positions: Tensor, kind: Tensor, argument: Tensor) -> Tensor:
        """Returns logits [B, Q, all answers], -inf for answers to other kinds of questions.

        tokens [B, K, D], positions [B, K], kind and argument [B, Q].
        """
        place = self.row(positions // SIDE) + self.column(positions % SIDE)
        seen = self.seen(self.enter(self.norm(tokens)) + place)  # [B, K, W]
        asked = self.kind(kind) + self.argument(argument)  # [B, Q, W]
        for look in self.rounds:
            asked = look(asked, seen)
        at = torch.arange(int(OFFSETS[-1]))
        fits = (at >= OFFSETS[kind][..., None]) & (at < OFFSETS[kind + 1][..., None])
        return self.answer(asked).masked_fill(~fits, -math.inf)


def train(tokens: Tensor, asked: Asked, seed: int, epochs: int = EPOCHS) -> Reader:
    """Trains a reader on full token sets. tokens [n, N, D] of any float dtype; asked: questions of the same n
    pictures."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = Reader(tokens.shape[-1]).train()
        steps = epochs * math.ceil(len(tokens) / IMAGES)
        optimiser = torch.optim.AdamW(reader.parameters(), RATE, weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.15)
        for _ in range(epochs):
            for some in torch.randperm(len(tokens)).split(IMAGES):
                x, asks = tokens[some].float(), asked.of(some)
                with torch.autocast("cpu", torch.bfloat16):  # halves the time; used only in training
                    logits = reader(x, torch.arange(x.shape[1]).expand(len(x), -1), asks.kind, asks.argument)
                target = torch.where(asks.answer < 0, -100, asks.answer + OFFSETS[asks.kind])
                loss = F.cross_entropy(logits.float().flatten(0, 1), target.flatten())
                optimiser.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
                optimiser.step()
                schedule.step()
    return reader.eval().requires_grad_(False)


def correct(reader: Reader, tokens: Tensor, positions: Tensor, asked: Asked) -> Tensor:
    """Returns whether each answer is right: [n, Q] bool. tokens [n, K, D], positions [n, K]."""
    right = []
    with torch.inference_mode():
        for some in torch.arange(len(tokens)).split(100):
            asks = asked.of(some)
            logits = reader(tokens[some].float(), positions[some], asks.kind, asks.argument)
            right.append(logits.argmax(-1) == asks.answer + OFFSETS[asks.kind])
    return torch.cat(right)
