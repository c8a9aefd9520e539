"""Visual tokens of the pictures of a split, computed once: the raw output of layer 6 of DINOv2-S/14, 256 of a picture.

A split is two files in a folder outside of the repository, both of which only grow, so that a stopped call continues
and more pictures can be added: SPLIT.f16, the tokens [n, 256, 384] float16, and SPLIT.jsonl, a picture in each line.
The splits that are not for training have a third one, SPLIT.attention.f32: what the class token attends to in that
layer, [n, 256] float32.
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

from benchmarks.quality.features import Eye
from benchmarks.vlm import questions, scenes, sources
from benchmarks.vlm.questions import Question

LAYER = 6
TOKENS, WIDTH = scenes.GRID**2, 384
SPLITS = ("train", "val", "test")
ATTENDED = ("val", "test")
BATCH = 16


@dataclass
class Picture:
    """The description of a picture. patches, colours: [256], of characters and colours; the other fields are those of
    `scenes.Scene`."""

    photograph: str
    region: int
    patches: list[int]
    colours: list[int]
    questions: list[Question]


@dataclass
class Split:
    """tokens [n, 256, 384] float16, in a file, the descriptions of the n pictures, and the class token's attention [n,
    256] float32, None if it is not there for all of them."""

    tokens: np.ndarray
    pictures: list[Picture]
    attention: np.ndarray | None = None

    def first(self, count: int) -> Split:
        """Returns the first `count` pictures. Raises: ValueError if there are fewer."""
        if count > len(self.pictures):
            raise ValueError(f"pictures={count}, but features of {len(self.pictures)} were computed")
        attention = None if self.attention is None else self.attention[:count]
        return Split(self.tokens[:count], self.pictures[:count], attention)


def make(made_of: sources.Sources, seed: int, number: int) -> tuple[scenes.Scene, list[Question]]:
    """Makes picture `number` of a split, and its questions."""
    at = (seed, SPLITS.index(made_of.split), number)
    scene = scenes.scene(made_of, (*at, 0))
    return scene, questions.ask(scene, made_of, (*at, 1))


def extract(folder: Path, split: str, count: int, seed: int, photos: Path | None = None) -> None:
    """Makes and encodes pictures until there are `count`; photos: a folder to take photographs from instead."""
    folder.mkdir(parents=True, exist_ok=True)
    done = _settle(folder, split)
    made_of = sources.load(split, photos)
    encoder = encoders.load(layer=LAYER, size=scenes.SIDE)
    begin = time.perf_counter()
    with open(folder / f"{split}.f16", "ab") as tokens, open(folder / f"{split}.jsonl", "a", encoding="utf-8") as lines:
        for numbers in _batches(range(done, count), BATCH):
            made = [make(made_of, seed, number) for number in numbers]
            seen = encoder.encode([Image.fromarray(scene.pixels) for scene, _ in made])  # [B, 256, 384]
            tokens.write(seen.half().numpy().tobytes())
            tokens.flush()
            for scene, asked in made:
                picture = Picture(scene.photograph, scene.region, scene.patches.tolist(), scene.colours.tolist(), asked)
                lines.write(json.dumps(asdict(picture), separators=(",", ":")) + "\n")
            lines.flush()
            if numbers[0] // BATCH % 16 == 0 or numbers[-1] == count - 1:
                print(f"{split}: {numbers[-1] + 1}/{count}, {time.perf_counter() - begin:.0f} s", flush=True)


def attend(folder: Path, split: str, seed: int, photos: Path | None = None) -> None:
    """Encodes the pictures that `extract` encoded once more, for the attention of the class token.

    Raises: ValueError if a picture's tokens are not those that are stored, as with another seed or other photographs.
    """
    stored = read(folder, split)
    path, row, count = _attention(folder, split), TOKENS * 4, len(stored.pictures)
    done = path.stat().st_size // row if path.exists() else 0
    made_of, eye, begin = sources.load(split, photos), Eye((LAYER,)), time.perf_counter()
    with open(path, "ab") as file:
        file.truncate(done * row)
        for numbers in _batches(range(done, count), BATCH):
            seen, attention = eye.look(np.stack([make(made_of, seed, number)[0].pixels for number in numbers]))
            if not np.allclose(seen[:, 0], stored.tokens[numbers], rtol=0.01, atol=0.01):
                raise ValueError(f"seed={seed}: pictures from {numbers[0]} on are not those of split {split!r}")
            file.write(attention[:, 0].contiguous().numpy().tobytes())
            if numbers[0] // BATCH % 16 == 0 or numbers[-1] == count - 1:
                spent = time.perf_counter() - begin
                print(f"{split}, attention: {numbers[-1] + 1}/{count}, {spent:.0f} s", flush=True)


def read(folder: Path, split: str) -> Split:
    """Reads what `extract` wrote so far. Raises: FileNotFoundError, with the command to run, if there is nothing."""
    lines = _whole(folder, split)
    if not lines:
        raise FileNotFoundError(f"no features of split {split!r} in {folder}: python -m benchmarks.vlm features")
    shape = (len(lines), TOKENS, WIDTH)
    tokens = np.memmap(folder / f"{split}.f16", np.float16, "r", shape=shape)
    attention, path = None, _attention(folder, split)
    if path.exists() and path.stat().st_size >= len(lines) * TOKENS * 4:
        attention = np.fromfile(path, np.float32, len(lines) * TOKENS).reshape(-1, TOKENS)
    return Split(tokens, [_picture(json.loads(line)) for line in lines], attention)


def to_torch(tokens: np.ndarray) -> torch.Tensor:
    """Copies tokens or attention, and converts them to float32."""
    return torch.from_numpy(np.array(tokens, np.float32))


def _attention(folder: Path, split: str) -> Path:
    return folder / f"{split}.attention.f32"


def _whole(folder: Path, split: str) -> list[str]:
    """Returns the lines of the pictures that both files hold; the files may still grow."""
    tokens, lines = folder / f"{split}.f16", folder / f"{split}.jsonl"
    if not lines.exists():
        return []
    written = lines.read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in written if line.endswith("\n")][: tokens.stat().st_size // (TOKENS * WIDTH * 2)]


def _settle(folder: Path, split: str) -> int:
    """Cuts both files to the pictures that both hold; returns their number."""
    whole = _whole(folder, split)
    if (folder / f"{split}.jsonl").exists():
        (folder / f"{split}.jsonl").write_text("".join(whole), encoding="utf-8")
        with open(folder / f"{split}.f16", "r+b") as file:
            file.truncate(len(whole) * TOKENS * WIDTH * 2)
    return len(whole)


def _batches(numbers: range, size: int) -> Iterator[list[int]]:
    left = iter(numbers)
    while some := list(itertools.islice(left, size)):
        yield some


def _picture(line: dict[str, Any]) -> Picture:
    return Picture(**{**line, "questions": [Question(**question) for question in line["questions"]]})
