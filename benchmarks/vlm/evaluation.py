"""Answers of the model to the test questions, from full and from compressed sets of tokens, and accuracies from them.

An arm compresses the stored visual tokens with the same op as `apet.patch` does before the projector. Positions are
counted anew over the remaining tokens, or kept, as in the hooks; tests/test_vlm_model.py compares the two. All answers
are greedy.
"""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apet_kernels import Compressed
from benchmarks.lib.machine import describe
from benchmarks.quality.counting import RESAMPLES, Interval
from benchmarks.vlm import arms, features, guard, llava, packing
from benchmarks.vlm.arms import ARMS, BUDGETS, BY_QUESTION, FULL, HALVES, IN_PLACE, MORE, STAGED, WHOLE, Arm, Batch
from benchmarks.vlm.features import Picture, Split
from benchmarks.vlm.questions import KINDS, Question

AT_ONCE = 16  # pictures
EACH = 8  # questions about a picture at most
QUESTIONS = "questions.jsonl.gz"
SIGNALS = "signals.jsonl.gz"
NEEDED = "needed.jsonl.gz"
MADE = "made.json"  # with which weights, and at which commit the first answers were made


def chosen(asked: Sequence[Question], count: int = EACH) -> list[Question]:
    """Returns up to `count` questions, of every kind in turn."""
    by_kind = [[one for one in asked if one.kind == kind] for kind in KINDS]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*by_kind))
    return [one for one in turns if one is not None][:count]


@dataclass
class Seen:
    """What the model's tower makes of the pictures of a split: tokens [n, 256, C], and the class token's attention to
    them, [n, 256]."""

    tokens: Tensor
    attention: Tensor
    pictures: list[Picture]


@torch.inference_mode()
def look(model: Any, split: Split) -> Seen:
    """Runs the trained layers of the tower. Tokens are float32."""
    model.eval()
    parts = [features.to_torch(split.states[i : i + AT_ONCE]) for i in range(0, len(split.pictures), AT_ONCE)]
    tokens, attention = (torch.cat([of(model, some) for some in parts]) for of in (llava.see, llava.attention))
    return Seen(tokens, attention, split.pictures)


def answers(model: Any, packer: packing.Packer, seen: Seen, name: str, keep: int) -> list[list[str]]:
    """Returns the model's answers to the chosen questions about every picture, with the tokens of an arm."""
    model.eval()
    arm = (WHOLE | ARMS | STAGED | IN_PLACE | MORE)[name]
    given = []
    for first in range(0, len(seen.pictures), AT_ONCE):
        part = slice(first, first + AT_ONCE)
        asked = [chosen(picture.questions) for picture in seen.pictures[part]]
        batch = Batch(seen.tokens[part], first, seen.attention[part])
        if name in BY_QUESTION:
            batch = one_by_one(model, packer, batch, asked)
            single = [[one] for some in asked for one in some]
            said = itertools.chain.from_iterable(packing.answer(model, packer, _only(arm, batch, keep).tokens, single))
            given += [list(itertools.islice(said, len(some))) for some in asked]
        elif name in STAGED:
            given += in_two_stages(model, packer, arm, batch, keep, asked)
        else:
            found = arm(batch, keep)
            if isinstance(found, Compressed):
                kept = found.indices if name in IN_PLACE else None
                given += packing.answer(model, packer, found.tokens, asked, kept=kept)
            else:  # as many tokens of each picture as it needs
                for own, some in zip(found, asked, strict=True):
                    given += packing.answer(model, packer, own.tokens[None], [some])
    return given


def in_two_stages(
    model: Any, packer: packing.Packer, arm: Arm, batch: Batch, keep: int, asked: Sequence[Sequence[Question]]
) -> list[list[str]]:
    """Returns the answers with more tokens in the first half of the decoder's layers, and fewer in the second."""

    def compress(x: Tensor, part: float) -> Tensor:
        return _only(arm, Batch(x, batch.first), round(part * keep)).tokens

    second = packing.Second(llava.DECODER["num_hidden_layers"] // 2, lambda states: compress(states, HALVES[1]))
    return packing.answer(model, packer, compress(batch.x, HALVES[0]), asked, second)


def _only(arm: Arm, batch: Batch, keep: int) -> Compressed:
    """Runs an arm that keeps as many tokens of every picture."""
    found = arm(batch, keep)
    assert isinstance(found, Compressed)
    return found


def one_by_one(model: Any, packer: packing.Packer, batch: Batch, asked: Sequence[Sequence[Question]]) -> Batch:
    """Returns every picture once for each of its questions, with the relevance of its tokens to that question."""
    times = torch.tensor([len(some) for some in asked])
    x = batch.x.repeat_interleave(times, 0)
    # No method has both attention and a question.
    return Batch(x, batch.first, relevance=packing.relevance(model, packer, x, list(itertools.chain(*asked))))


def accuracy(model: Any, packer: packing.Packer, split: Split) -> dict[str, float]:
    """Returns percent right with all tokens, by kind of question, and "all", the mean of the kinds."""
    asked = [one for picture in split.pictures for one in chosen(picture.questions)]
    given = itertools.chain.from_iterable(answers(model, packer, look(model, split), FULL, features.TOKENS))
    right = np.array([one.answer == said for one, said in zip(asked, given, strict=True)])
    return by_kind(asked, right)


def by_kind(asked: Sequence[Question], right: np.ndarray) -> dict[str, float]:
    """Returns percent right of each kind that occurs, from right [q], and "all", their mean."""
    kinds = np.array([one.kind for one in asked])
    found = {kind: 100 * float(right[kinds == kind].mean()) for kind in KINDS if (kinds == kind).any()}
    return {kind: round(value, 1) for kind, value in {**found, "all": float(np.mean(list(found.values())))}.items()}


def evaluate(
    model: Any, packer: packing.Packer, split: Split, names: Sequence[str], budgets: Sequence[int], out: Path
) -> None:
    """Writes into `out` what is not there yet: questions, signals of pictures, answers of every arm at every budget.

    Raises: ValueError, if `out` has answers of other weights, or to other questions.
    """
    out.mkdir(parents=True, exist_ok=True)
    asked = [
        {"picture": i, "photograph": picture.photograph, "region": picture.region, **asdict(one)}
        for i, picture in enumerate(split.pictures)
        for one in chosen(picture.questions)
    ]
    made = {"weights": llava.digest(model), "commit": describe()["commit"]}
    if (out / QUESTIONS).exists():
        before = json.loads((out / MADE).read_text()) if (out / MADE).exists() else {}
        if before.get("weights") != made["weights"]:
            raise ValueError(f"{out} has answers of other weights: give another --results, or empty it")
        if _read(out / QUESTIONS) != json.loads(json.dumps(asked)):
            raise ValueError(f"{out} has answers to other questions: give another --results, or empty it")
    else:
        (out / MADE).write_text(json.dumps(made, indent=2) + "\n")
        _write(out / QUESTIONS, asked)
    seen = look(model, split)
    if not (out / SIGNALS).exists():
        found = guard.signals(seen.tokens, BUDGETS)
        _write(
            out / SIGNALS,
            [{name: values[i].tolist() for name, values in found.items()} for i in range(len(seen.pictures))],
        )
    if not (out / NEEDED).exists():
        counts = [arms.needed(seen.tokens, keep) for keep in BUDGETS]
        _write(out / NEEDED, list(zip(*counts, strict=True)))
    work = [(name, features.TOKENS) for name in WHOLE]
    work += [(name, keep) for keep in budgets for name in names]
    for name, keep in work:
        path = path_of(out, name, keep)
        if not path.exists():
            begin = time.perf_counter()
            given = answers(model, packer, seen, name, keep)
            _write(path, list(itertools.chain.from_iterable(given)))
            print(f"{name}, {keep} tokens: {time.perf_counter() - begin:.0f} s", flush=True)


class Answers:
    """The answers that `evaluate` wrote, and figures from them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        lines = _read(folder / QUESTIONS)
        self.asked = [Question(**{k: line[k] for k in ("kind", "text", "answer", "height")}) for line in lines]
        self.picture = np.array([line["picture"] for line in lines])  # [q]
        names = [line["photograph"] or f"page {line['picture']}" for line in lines]
        self.sources, self.source = np.unique(names, return_inverse=True)  # source [q]: an index
        draw = np.random.default_rng(0)
        count = len(self.sources)
        self.weights = draw.multinomial(count, np.full(count, 1 / count), RESAMPLES)  # [resamples, sources]

    def right(self, name: str, keep: int) -> np.ndarray:
        """Returns whether each answer is right, [q] bool."""
        given = _read(path_of(self.folder, name, keep))
        return np.array([one.answer == said for one, said in zip(self.asked, given, strict=True)])

    def stored(self, names: Iterable[str] = (*ARMS, *STAGED)) -> list[tuple[str, int]]:
        """Returns names and budgets of the arms among `names` with stored answers, larger budgets first."""
        every = itertools.product(names, sorted({*BUDGETS}, reverse=True))
        return [(name, keep) for name, keep in every if path_of(self.folder, name, keep).exists()]

    def where(self, kind: str | None = None, heights: range | None = None) -> np.ndarray:
        """Returns [q] bool: the questions of a kind, about words of these heights."""
        return np.array([kind in (None, one.kind) and (heights is None or one.height in heights) for one in self.asked])

    def interval(self, right: np.ndarray, among: np.ndarray | None = None) -> Interval:
        """Returns the mean of right [q], or of a difference of two, over the questions `among` [q] bool. Photographs
        are resampled with all questions about their regions; a page is a source by itself."""
        use = np.ones(len(right), bool) if among is None else among
        count = len(self.sources)
        sums = np.bincount(self.source[use], right[use].astype(float), count)  # [sources]
        sizes = np.bincount(self.source[use], minlength=count)
        drawn = 100 * (self.weights @ sums) / np.maximum(self.weights @ sizes, 1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Interval(100 * float(sums.sum() / sizes.sum()), float(low), float(high))

    def signals(self, keep: int) -> dict[str, np.ndarray]:
        """Returns the signals of guard.py for a budget, [pictures] each."""
        lines = _read(self.folder / SIGNALS)
        return {name: np.array([line[name][BUDGETS.index(keep)] for line in lines]) for name in lines[0]}

    def needed(self, keep: int) -> np.ndarray:
        """Returns how many tokens each picture keeps with guard="keep", [pictures]."""
        return np.array([line[BUDGETS.index(keep)] for line in _read(self.folder / NEEDED)])

    def foretold(self, signal: np.ndarray, right: np.ndarray, among: np.ndarray) -> Interval:
        """Returns how well a signal [pictures] foretells that an answer `among` [q] is not right, as percent of the
        area under the ROC curve, with the interval of `interval`."""

        def counts(which: np.ndarray) -> np.ndarray:  # [resamples + 1, pictures]: of all, and of each resample
            weights = np.vstack([np.ones(len(self.sources)), self.weights])[:, self.source[which]]
            return np.stack([np.bincount(self.picture[which], row, len(signal)) for row in weights])

        area = 100 * guard.area(signal, counts(among & ~right), counts(among & right))
        return Interval(float(area[0]), *map(float, np.nanquantile(area[1:], (0.025, 0.975))))


def path_of(folder: Path, name: str, keep: int) -> Path:
    """Returns the path of the answers of an arm."""
    return folder / f"{name.replace(' ', '-')}.{keep}.jsonl.gz"


def _write(path: Path, lines: Sequence[Any]) -> None:
    text = "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _read(path: Path) -> list[Any]:
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
