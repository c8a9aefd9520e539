"""Trains projector and decoder on full sets of visual tokens; the trunk stays as it is.

A step takes some pictures with some of their questions. Besides the answers, the model learns to name at each visual
token the character that covers most of its patch, or nothing (`<pad>`): this teaches it to read with far fewer
pictures, and the model is used without it. The data of a step depend only on the seed and its number, so a run that was
stopped continues as if it had not been.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.lib.machine import describe
from benchmarks.vlm import evaluation, features, llava, packing, questions, words
from benchmarks.vlm.features import Split

DECAY, CLIP, BETAS = 0.05, 1.0, (0.9, 0.98)
PATCHES = 0.3  # weight of naming characters
MEASURED = 400  # pictures whose tokens the projector is initialised by
MINUTES, VALIDATED = 4.0, 3  # minutes between checkpoints; every third one is validated


@dataclass
class Plan:
    """rate: of AdamW, reached after `warm` steps; it falls to 0 in the last `cool` of `steps`.

    pictures: how many of the training pictures are used; at_once, questions: of a step, and of each of its pictures.
    """

    seed: int = 0
    steps: int = 24000
    cool: int = 4000
    warm: int = 100
    rate: float = 1e-3
    pictures: int = 12000
    at_once: int = 4
    questions: int = 16

    def rate_at(self, step: int) -> float:
        """Returns the learning rate of step 0, 1, ..."""
        cooling = 1.0 if self.cool == 0 else min((self.steps - step) / self.cool, 1.0)
        return self.rate * min((step + 1) / self.warm, 1.0) * cooling

    def numbers(self, step: int) -> list[int]:
        """Returns the pictures of a step; an epoch takes each of them once."""
        each = self.pictures // self.at_once
        epoch, turn = divmod(step, each)
        order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.pictures)
        return order[turn * self.at_once : (turn + 1) * self.at_once].tolist()


class Run:
    """A model in training, with its optimiser and the number of the next step."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.step = plan, 0
        self.model = llava.create(plan.seed)
        self.model.model.vision_tower.requires_grad_(False)
        self.packer = packing.Packer(words.tokenizer(), self.model.config.image_token_index)
        self.characters = torch.full((128,), self.packer.pad)  # the token of each character's code; 0 is nothing
        for character in questions.CHARACTERS:
            self.characters[ord(character)] = self.packer.encode(character)[0]
        trained = [p for p in self.model.parameters() if p.requires_grad]
        matrices, rest = [p for p in trained if p.dim() > 1], [p for p in trained if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": rest, "weight_decay": 0.0}]
        self.optimiser = torch.optim.AdamW(groups, plan.rate, BETAS)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint."""
        stored = torch.load(path, weights_only=True)
        self.step = stored["step"]
        self.model.load_state_dict(stored["weights"], strict=False)
        self.optimiser.load_state_dict(stored["optimiser"])

    def checkpoint(self, path: Path) -> None:
        """Writes everything that `resume` needs; a file of that name is complete."""
        weights = {name: w for name, w in self.model.state_dict().items() if not name.startswith(llava.TOWER)}
        part = path.with_suffix(".part")
        torch.save({"step": self.step, "weights": weights, "optimiser": self.optimiser.state_dict()}, part)
        part.rename(path)

    def train(self, split: Split) -> dict[str, float]:
        """Makes one step. Returns: losses."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        answers, named = self.losses(split, self.plan.numbers(self.step))
        self.optimiser.zero_grad()
        (answers + PATCHES * named).backward()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        self.optimiser.step()
        self.step += 1
        return {"loss": answers.item(), "patches": named.item()}

    def losses(self, split: Split, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the cross entropy of the answers to drawn questions about these pictures, and of the characters of
        patches."""
        draw = np.random.default_rng((self.plan.seed, 1, self.step))
        asked = [drawn(split.pictures[n].questions, self.plan.questions, draw) for n in numbers]
        packed = self.packer.pack(asked, features.TOKENS, answers=True)
        states = packing.hidden(self.model, packed, features.to_torch(split.tokens[numbers]))
        at = packed.target != packing.NOTHING
        answers = F.cross_entropy(self.model.lm_head(states[at]), packed.target[at])
        codes = torch.tensor([split.pictures[n].patches for n in numbers])  # [B, 256]
        named = self.model.lm_head(states[:, 1 : 1 + features.TOKENS])  # [B, 256, V]
        return answers, F.cross_entropy(named.flatten(0, 1), self.characters[codes].flatten())


def drawn(asked: list[Any], count: int, draw: np.random.Generator) -> list[Any]:
    """Returns `count` random questions, or all."""
    return [asked[i] for i in draw.permutation(len(asked))[:count]]


def spent(begin: float) -> dict[str, int]:
    """Returns the seconds since `begin` on the clock, and of the processor's time since the process started."""
    return {"seconds": round(time.monotonic() - begin), "processor": round(time.process_time())}


def train(cache: Path, out: Path, plan: Plan, resume: bool) -> None:
    """Trains, and writes into `out`: checkpoint.pt, log.jsonl, and in the end the folder `model`.

    The log has a line for every 20 steps, and one with accuracies on validation for every third checkpoint.
    """
    split, val = features.read(cache, "train").first(plan.pictures), features.read(cache, "val")
    run = Run(plan)
    out.mkdir(parents=True, exist_ok=True)
    saved = out / "checkpoint.pt"
    if resume:
        run.resume(saved)
    else:
        llava.standardise(run.model, features.to_torch(split.tokens[:MEASURED]))
    with open(out / "log.jsonl", "a" if resume else "w", encoding="utf-8") as log:

        def note(**line: Any) -> None:
            log.write(json.dumps({"step": run.step, **line}) + "\n")
            log.flush()

        note(plan=asdict(plan), machine=describe())
        recent: list[dict[str, float]] = []
        begin = last = time.monotonic()
        saves = 0
        while run.step < plan.steps:
            recent.append(run.train(split))
            if run.step % 20 == 0:
                means = {name: round(float(np.mean([r[name] for r in recent])), 4) for name in recent[0]}
                note(**means, rate=plan.rate_at(run.step - 1), **spent(begin))
                recent.clear()
            if time.monotonic() - last > 60 * MINUTES or run.step == plan.steps:
                last = time.monotonic()
                run.checkpoint(saved)
                saves += 1
                if saves % VALIDATED == 0 or run.step == plan.steps:
                    note(accuracy=evaluation.accuracy(run.model, run.packer, val))
    llava.save(run.model, out / "model")
    shutil.copy(out / "log.jsonl", out / "model" / "log.jsonl")
