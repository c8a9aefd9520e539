"""Computes accuracies and intervals from the stored bits of the task study."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.quality import features, methods, scenes, task

RESAMPLES = 4000
NUMBER_OF_KINDS = len(scenes.KINDS)
FULL = (methods.FULL, "full")


class Interval(NamedTuple):
    """A figure with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def beyond(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.low > 0 or self.high < 0


@dataclass
class Answers:
    """The correct answers for one layer and split. right: (budget, name) -> [n, 5], the share of readers that were
    right."""

    right: dict[tuple[int, str], np.ndarray]
    weights: np.ndarray  # [resamples, n]: how often a resample holds a picture
    blocks: np.ndarray  # the same, but photographs are drawn, each with all its pictures

    def retained(self, budget: int, name: str, kind: int | None = None) -> Interval:
        """Returns percent of the accuracy on full tokens: over all kinds of questions, or of one."""
        return self._interval(self._share(budget, name, kind), self.weights)

    def ahead(self, budget: int, name: str, of: str, by_photograph: bool = False) -> Interval:
        """Returns the percentage points of retained accuracy by which `name` is ahead of another. They are paired: both
        are counted on the same resampled pictures."""
        first, other = self._share(budget, name, None), self._share(budget, of, None)
        return self._interval((first[0] - other[0], first[1]), self.blocks if by_photograph else self.weights)

    def accuracy(self, kind: int | None = None) -> float:
        """Returns percent right on full tokens."""
        return 100 * float(self._mean(self.right[FULL], kind).mean())

    def _share(self, budget: int, name: str, kind: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Returns [n] right with compressed tokens, and [n] right with all."""
        return self._mean(self.right[budget, name], kind), self._mean(self.right[FULL], kind)

    @staticmethod
    def _mean(right: np.ndarray, kind: int | None) -> np.ndarray:
        return right.mean(1) if kind is None else right[:, kind]

    @staticmethod
    def _interval(share: tuple[np.ndarray, np.ndarray], weights: np.ndarray) -> Interval:
        """Returns the ratio of two sums over pictures, in percent, with its interval."""
        top, bottom = share
        drawn = 100 * (weights @ top) / (weights @ bottom)
        low, high = np.quantile(drawn, (0.025, 0.975))
        return Interval(100 * float(top.sum() / bottom.sum()), float(low), float(high))


@functools.cache
def answers(results: Path, layer: int, split: str) -> Answers:
    """Reads the results of `task.study`. Raises: FileNotFoundError if there are none."""
    with np.load(results / "task-pictures.npz") as pictures:
        source = pictures[f"{split}/source"]
    n, right = len(source), {}
    for budget in (methods.FULL, *methods.BUDGETS):
        with np.load(results / f"task-{layer}-{budget}.npz") as stored:
            for name in methods.ways(budget):
                bits = np.unpackbits(stored[f"{split}/{name}"])[: len(task.SEEDS) * n * NUMBER_OF_KINDS]
                right[budget, name] = bits.reshape(len(task.SEEDS), n, NUMBER_OF_KINDS).mean(0)
    draw = np.random.default_rng(0)
    weights = draw.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(np.float64)
    photographs = source.max() + 1
    drawn = draw.multinomial(photographs, np.full(photographs, 1 / photographs), RESAMPLES)
    return Answers(right, weights, drawn[:, source].astype(np.float64))


def best(results: Path, budget: int, names: list[str]) -> str:
    """Returns the name of highest accuracy on the validation split, over all layers."""
    return max(
        names,
        key=lambda name: sum(answers(results, layer, "val").retained(budget, name).value for layer in features.LAYERS),
    )
