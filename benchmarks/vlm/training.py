"""Trains the tower's last layers, projector and decoder on full sets of visual tokens; the trunk below stays as it is.

Tower and projector are trained first, to say what each patch shows (alignment.py), and stay as they are from then on:
with the decoder's loss, on a few pictures a step, they would forget a third of the letters. Then the decoder is
trained. A step takes some pictures with some of their questions. The data of a step depend only on the seed and its
number, so a run that was stopped after tower and projector continues as if it had not been.
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
from benchmarks.vlm import alignment, evaluation, features, guidance, llava, packing, words
from benchmarks.vlm.features import Split

DECAY, CLIP, BETAS = 0.05, 1.0, (0.9, 0.98)
LOOKS = 1.0  # weight of where attention goes
SAID = {"characters": 1.0, "letters": 1.0, "colours": 1.0, "middles": 1.0, "brightness": 0.3, "places": 0.3}  # weights
ALIGN_RATE, ALIGNED_AT_ONCE = 2e-3, 16  # pictures
TOWER_RATES = (0.15, 0.3)  # of the other rates, in both stages: the tower's layers were trained before
MEASURED = 400  # pictures whose tokens the projector is initialised by
MINUTES, VALIDATED = 4.0, 3  # minutes between checkpoints; every third one is validated


@dataclass
class Plan:
    """How the model is trained."""

    seed: int = 0
    align: int = 2400  # steps of tower and projector, before those of the decoder
    spell: int = 3000  # more of them, on pictures with words: to number letters takes longest
    steps: int = 8000
    cool: int = 2400  # the last steps, in which the rate falls to 0
    warm: int = 100  # the first steps, in which it rises
    rate: float = 1e-3  # of AdamW
    pictures: int = 16000  # how many of the training pictures are used
    at_once: int = 4  # pictures of a step
    questions: int = 32  # of each picture of a step
    # Of the products: float32, or bfloat16, which is faster where the processor multiplies it. Weights stay float32.
    dtype: str = "float32"

    def products(self) -> torch.autocast:
        """Returns the context in which products are computed in `dtype`.

        Raises: ValueError if it is neither float32 nor bfloat16.
        """
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: must be 'float32' or 'bfloat16'")
        return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bfloat16")

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
        self.model = llava.create(plan.seed).requires_grad_(False)
        # For these few tokens products are faster than flash attention, above all in bfloat16.
        self.model.model.vision_tower.set_attn_implementation("eager")
        self.decoder = self.model.model.language_model.requires_grad_(True)
        self.guide = guidance.Guide()
        self.packer = packing.Packer(words.tokenizer(), self.model.config.image_token_index)
        groups = [
            {
                "params": [p for p in self.decoder.parameters() if (p.dim() > 1) == decays],
                "weight_decay": DECAY * decays,
            }
            for decays in (True, False)
        ]
        self.optimiser = torch.optim.AdamW(groups, plan.rate, BETAS)

    @torch.no_grad()
    def standardise(self, split: Split) -> None:
        """Initialises the projector for the tokens of these pictures."""
        llava.standardise(self.model, llava.see(self.model, features.to_torch(split.states[:MEASURED])))

    def align(self, split: Split, numbers: list[int], steps: int, stage: int = 0) -> dict[str, float]:
        """Trains tower and projector on what patches of these pictures show, for some steps. Every stage, 0 or 1, draws
        other pictures. Returns the mean losses of the last steps."""
        with torch.random.fork_rng():
            torch.manual_seed(self.plan.seed)
            reader = alignment.Reader(self.model.config.text_config.hidden_size)
        projector = self.model.model.multi_modal_projector.requires_grad_(True)
        layers = llava.trained(self.model).requires_grad_(True)
        tower, heads = list(layers.parameters()), [*projector.parameters(), *reader.parameters()]
        rates = [ALIGN_RATE, ALIGN_RATE * TOWER_RATES[stage]]
        optimiser = torch.optim.AdamW([{"params": heads}, {"params": tower}], weight_decay=DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rates, total_steps=steps, pct_start=0.1)
        draw = np.random.default_rng((self.plan.seed, 2 + stage))
        recent: list[dict[str, float]] = []
        for _ in range(steps):
            some = [numbers[i] for i in draw.integers(len(numbers), size=ALIGNED_AT_ONCE)]
            with self.plan.products():
                projected = self.project(split, some)
            says = reader.losses(projected.float(), [split.pictures[n] for n in some])
            optimiser.zero_grad()
            said(says).backward()
            torch.nn.utils.clip_grad_norm_(tower, CLIP)
            optimiser.step()
            schedule.step()
            recent = [*recent[-99:], {name: loss.item() for name, loss in says.items()}]
        projector.requires_grad_(False)
        layers.requires_grad_(False)
        with torch.no_grad():
            tokens = llava.see(self.model, features.to_torch(split.states[:MEASURED]))
        alignment.as_large_as_words(self.model, tokens)
        return mean(recent)

    def project(self, split: Split, numbers: list[int]) -> Tensor:
        """Returns the projected tokens [B, 256, D] of pictures."""
        tokens = llava.see(self.model, features.to_torch(split.states[numbers]))
        return self.model.model.multi_modal_projector(tokens)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint."""
        stored = torch.load(path, weights_only=True)
        self.step = stored["step"]
        self.model.load_state_dict(stored["weights"])
        self.optimiser.load_state_dict(stored["optimiser"])

    def checkpoint(self, path: Path) -> None:
        """Writes everything that `resume` needs; a file of that name is complete."""
        part = path.with_suffix(".part")
        stored = {"step": self.step, "weights": self.model.state_dict(), "optimiser": self.optimiser.state_dict()}
        torch.save(stored, part)
        part.rename(path)

    def train(self, split: Split) -> dict[str, float]:
        """Makes one step. Returns: losses."""
        self.model.train()
        for group in self.optimiser.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        answers, looks = self.losses(split, self.plan.numbers(self.step))
        self.optimiser.zero_grad()
        (answers + LOOKS * looks).backward()
        torch.nn.utils.clip_grad_norm_(self.decoder.parameters(), CLIP)
        self.optimiser.step()
        self.step += 1
        return {"loss": answers.item(), "looks": looks.item()}

    def losses(self, split: Split, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """Returns the cross entropy of the answers to drawn questions about these pictures, and the loss of where
        attention goes."""
        draw, pictures = np.random.default_rng((self.plan.seed, 1, self.step)), [split.pictures[n] for n in numbers]
        asked = [drawn(picture.questions, self.plan.questions, draw) for picture in pictures]
        packed = self.packer.pack(asked, features.TOKENS, answers=True)
        at, looks = packed.target != packing.NOTHING, guidance.looks(packed, asked, pictures)
        with self.plan.products(), self.guide.on(self.decoder, packed, looks):
            states = packing.hidden(self.model, packed, self.project(split, numbers))
            logits = self.model.lm_head(states[at])
        answers = F.cross_entropy(logits.float(), packed.target[at])
        return answers, answers.new_zeros(()) if self.guide.loss is None else self.guide.loss


def said(losses: dict[str, Tensor]) -> Tensor:
    """Returns the loss of what projected tokens say."""
    return torch.stack([weight * losses[name] for name, weight in SAID.items()]).sum()


def mean(losses: list[dict[str, float]]) -> dict[str, float]:
    """Returns the mean of each."""
    return {name: round(float(np.mean([one[name] for one in losses])), 4) for name in losses[0]}


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
        run.standardise(split)
    with open(out / "log.jsonl", "a" if resume else "w", encoding="utf-8") as log:

        def note(**line: Any) -> None:
            log.write(json.dumps({"step": run.step, **line}) + "\n")
            log.flush()

        note(plan=asdict(plan), machine=describe())
        recent: list[dict[str, float]] = []
        begin = last = time.monotonic()
        if not resume:
            spelled = [n for n, picture in enumerate(split.pictures) if picture.has_words]
            for stage, (steps, numbers) in enumerate(((plan.align, range(plan.pictures)), (plan.spell, spelled))):
                if steps:
                    note(aligned=run.align(split, list(numbers), steps, stage), **spent(begin))
            run.checkpoint(saved)  # not between the stages: a run that continues has both
        saves = 0
        while run.step < plan.steps:
            recent.append(run.train(split))
            if run.step % 20 == 0:
                note(**mean(recent), rate=plan.rate_at(run.step - 1), **spent(begin))
                recent.clear()
            if time.monotonic() - last > 60 * MINUTES or run.step == plan.steps:
                last = time.monotonic()
                run.checkpoint(saved)
                saves += 1
                if saves % VALIDATED == 0 or run.step == plan.steps:
                    note(accuracy=evaluation.accuracy(run.model, run.packer, val))
    llava.save(run.model, out / "model")
    shutil.copy(out / "log.jsonl", out / "model" / "log.jsonl")
