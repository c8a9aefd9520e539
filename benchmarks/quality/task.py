"""The task study: readers trained on full tokens answer questions about held-out photographs from compressed ones.

The raw results have one bit for every answer, so each figure of the report can be computed again from them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import features, methods, reader, scenes

SEEDS = (0, 1, 2)
IMAGES = 100  # compressed at once


def ask(split: features.Split, one_of_each: bool) -> reader.Asked:
    """Returns the questions of a split: all of them, or one of each kind (in the order of `scenes.KINDS`) for every
    picture."""
    pictures = [split.questions[split.questions[:, 0] == i, 1:] for i in range(len(split.tokens))]
    if one_of_each:
        pictures = [scenes.one_of_each_kind(q, (i,)) for i, q in enumerate(pictures)]
    longest = max(len(q) for q in pictures)
    table = np.stack([np.pad(q, ((0, longest - len(q)), (0, 0)), constant_values=-1) for q in pictures])  # [n, Q, 3]
    kind, argument, answer = torch.from_numpy(table).unbind(-1)
    return reader.Asked(kind.clamp(min=0), argument.clamp(min=0), answer)


def readers(folder: Path, layer: int, epochs: int) -> list[reader.Reader]:
    """Returns one reader for each seed, trained on the split "train"; those that an earlier call stored in `folder` are
    loaded."""
    found = [folder / f"reader-{layer}-{seed}.pt" for seed in SEEDS]
    if not all(path.exists() for path in found):
        split = features.read(folder, "train")
        tokens, asked = split.layer(layer)[0], ask(split, one_of_each=False)
        for seed, path in zip(SEEDS, found, strict=True):
            if not path.exists():
                begin = time.perf_counter()
                torch.save(reader.train(tokens, asked, seed, epochs).state_dict(), path)
                print(f"layer {layer}: reader {seed}, {time.perf_counter() - begin:.0f} s", flush=True)
    return [_load(path) for path in found]


def study(
    folder: Path, results: Path, epochs: int, head: dict[str, Any], layers: Sequence[int], budgets: Sequence[int]
) -> None:
    """Writes task-LAYER-BUDGET.npz into `results` for each of these layers and budgets that is not there yet.

    Its arrays: "SPLIT/NAME" uint8, the packed bits of [seeds, n, 5] correct answers. It also writes task-pictures.npz.
    """
    results.mkdir(parents=True, exist_ok=True)
    splits = {name: features.read(folder, name) for name in ("val", "test")}
    questions = {name: ask(split, one_of_each=True) for name, split in splits.items()}
    for layer in layers:
        left = [budget for budget in budgets if not (results / f"task-{layer}-{budget}.npz").exists()]
        panel = readers(folder, layer, epochs) if left else []
        for budget in left:
            begin, bits = time.perf_counter(), {}
            for name, split in splits.items():
                tokens, attention = split.layer(layer)
                for way_name, way in methods.ways(budget).items():
                    rows, positions = compressed(way, tokens, attention, budget)
                    bits[f"{name}/{way_name}"] = np.packbits(_answers(panel, rows, positions, questions[name]).numpy())
            part = results / f"part-{layer}-{budget}.npz"  # renamed when it is complete
            np.savez_compressed(part, **bits, **{f"head/{k}": v for k, v in head.items()})
            part.rename(results / f"task-{layer}-{budget}.npz")
            print(f"layer {layer}, {budget} tokens: {time.perf_counter() - begin:.0f} s", flush=True)
    np.savez_compressed(
        results / "task-pictures.npz",
        **{f"{name}/source": split.source for name, split in splits.items()},
        **{f"{name}/names": np.array(split.names) for name, split in splits.items()},
        train=len(features.read(folder, "train").tokens),
        epochs=epochs,
    )


def compressed(way: methods.Way, tokens: Tensor, attention: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """Returns rows [n, keep, D] float32 and positions [n, keep] of tokens [n, N, D], some images at a time."""
    parts = [
        way(x.float(), keep, received)
        for x, received in zip(tokens.split(IMAGES), attention.split(IMAGES), strict=True)
    ]
    return torch.cat([rows for rows, _ in parts]), torch.cat([positions for _, positions in parts])


def _answers(panel: list[reader.Reader], rows: Tensor, positions: Tensor, asked: reader.Asked) -> Tensor:
    """Returns whether each answer is right, [seeds, n, 5] bool."""
    return torch.stack([reader.correct(one, rows, positions, asked) for one in panel])


def _load(path: Path) -> reader.Reader:
    weights = torch.load(path, weights_only=True)
    one = reader.Reader(weights["norm.weight"].shape[0])
    one.load_state_dict(weights)
    return one.eval().requires_grad_(False)
