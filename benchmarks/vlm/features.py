"""States of the pictures of a split after the layers of the trunk that are not trained, computed once.

They are the raw output of layer 6 of DINOv2-S/14: of a picture its class token and 256 patches. A split is in a folder
outside of the repository: SPLIT.f16, the states [n, 257, 384] float16, and SPLIT.jsonl, a picture in each line, which
only grow, so that a stopped call continues and more pictures can be added; and SPLIT.json, what they were made with.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from apet import encoders
from PIL import Image

from benchmarks.vlm import questions, scenes, sources
from benchmarks.vlm.questions import Question

LAYER = 6
TOKENS, WIDTH = scenes.GRID**2, 384
STATES = 1 + TOKENS  # the class token, then patches
SPLITS = ("train", "val", "test")
BATCH = 16


@dataclass
class Picture:
    """The description of a picture. All but `questions` are what `scenes.Scene` calls so."""

    photograph: str
    region: int
    patches: list[int]  # [256]
    letters: list[int]  # [256]
    owners: list[int]  # [256]
    colours: list[int]  # [256]
    middles: list[int]  # [256]
    brightness: list[int]  # [256]
    questions: list[Question]

    @property
    def has_words(self) -> bool:
        """Whether a letter covers most of some patch."""
        return any(chr(code) in sources.LETTERS for code in self.patches)

    @classmethod
    def of(cls, scene: scenes.Scene, asked: list[Question]) -> Picture:
        """Returns the description of a scene with these questions."""
        labels = (scene.patches, scene.letters, scene.owners, scene.colours, scene.middles, scene.brightness())
        return cls(scene.photograph, scene.region, *(grid.tolist() for grid in labels), asked)


@dataclass
class Split:
    """The n pictures of a split, as the frozen layers of the tower see them."""

    states: np.ndarray  # [n, 257, 384] float16, in a file
    pictures: list[Picture]  # their descriptions

    def first(self, count: int) -> Split:
        """Returns the first `count` pictures. Raises: ValueError if there are fewer."""
        if count > len(self.pictures):
            raise ValueError(f"pictures={count}, but features of {len(self.pictures)} were computed")
        return Split(self.states[:count], self.pictures[:count])


def make(made_of: sources.Sources, seed: int, number: int) -> tuple[scenes.Scene, list[Question]]:
    """Makes picture `number` of a split, and its questions."""
    at = (seed, SPLITS.index(made_of.split), number)
    scene = scenes.scene(made_of, (*at, 0))
    return scene, questions.ask(scene, made_of, (*at, 1))


def extract(folder: Path, split: str, count: int, seed: int, photos: Path | None = None) -> None:
    """Makes and encodes pictures until there are `count`; photos: a folder to take photographs from instead.

    Raises: ValueError, if the pictures that are there were made with another seed or from other photographs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    made_with = {"seed": seed, "photos": None if photos is None else str(photos.resolve())}
    record = folder / f"{split}.json"
    if record.exists() and (before := json.loads(record.read_text())) != made_with:
        raise ValueError(f"{folder} has pictures of {split} with {before}, not {made_with}: give another --cache")
    record.write_text(json.dumps(made_with))
    done = _settle(folder, split)
    made_of = sources.load(split, photos)
    # With one layer more than is read, since some releases of transformers apply the final norm to the last one.
    encoder = encoders.load(layer=LAYER + 1, size=scenes.SIDE)
    encoder.layer = LAYER
    begin = time.perf_counter()
    with open(folder / f"{split}.f16", "ab") as states, open(folder / f"{split}.jsonl", "a", encoding="utf-8") as lines:
        for numbers in _batches(range(done, count), BATCH):
            made = [make(made_of, seed, number) for number in numbers]
            seen = encoder.states([Image.fromarray(scene.pixels) for scene, _ in made])  # [B, 257, 384]
            states.write(seen.half().numpy().tobytes())
            states.flush()
            for scene, asked in made:
                lines.write(json.dumps(asdict(Picture.of(scene, asked)), separators=(",", ":")) + "\n")
            lines.flush()
            if numbers[0] // BATCH % 16 == 0 or numbers[-1] == count - 1:
                print(f"{split}: {numbers[-1] + 1}/{count}, {time.perf_counter() - begin:.0f} s", flush=True)


def read(folder: Path, split: str) -> Split:
    """Reads what `extract` wrote so far. Raises: FileNotFoundError, with the command to run, if there is nothing."""
    lines = _whole(folder, split)
    if not lines:
        raise FileNotFoundError(f"no features of split {split!r} in {folder}: python -m benchmarks.vlm features")
    shape = (len(lines), STATES, WIDTH)
    states = np.memmap(folder / f"{split}.f16", np.float16, "r", shape=shape)
    return Split(states, [_picture(json.loads(line)) for line in lines])


def to_torch(states: np.ndarray) -> torch.Tensor:
    """Copies states, and converts them to float32."""
    return torch.from_numpy(np.array(states, np.float32))


def _whole(folder: Path, split: str) -> list[str]:
    """Returns the lines of the pictures that both files hold; the files may still grow."""
    states, lines = folder / f"{split}.f16", folder / f"{split}.jsonl"
    if not lines.exists():
        return []
    written = lines.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in written if line.endswith("\n")][: states.stat().st_size // (STATES * WIDTH * 2)]


def _settle(folder: Path, split: str) -> int:
    """Cuts both files to the pictures that both hold; returns their number."""
    whole = _whole(folder, split)
    if (folder / f"{split}.jsonl").exists():
        (folder / f"{split}.jsonl").write_text("".join(whole), encoding="utf-8")
        with open(folder / f"{split}.f16", "r+b") as file:
            file.truncate(len(whole) * STATES * WIDTH * 2)
    return len(whole)


def _batches(numbers: range, size: int) -> Iterator[list[int]]:
    left = iter(numbers)
    while some := list(itertools.islice(left, size)):
        yield some


def _picture(line: dict[str, Any]) -> Picture:
    asked = [Question(**{**one, "about": tuple(one["about"])}) for one in line["questions"]]
    return Picture(**{**line, "questions": asked})
