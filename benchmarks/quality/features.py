"""Tokens of pictures: three layers of a real DINOv2-S/14, and the attention of their class token to each patch.

Tokens are the raw hidden states, before any norm, as LLaVA takes them. They are stored as float16, and every method
starts from the stored values.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from apet import encoders
from torch import Tensor

from benchmarks.quality import scenes

LAYERS = (6, 8, 10)
SIZES = {"train": 1600, "val": 200, "test": 1000}
BATCH = 8


class Eye:
    """The encoder, which gives tokens and class attention of several layers at once."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        # One layer more than is read, since a final norm may change the last hidden state.
        self.encoder = encoders.load(layer=max(layers) + 1, size=scenes.SIDE)
        self.encoder.model.set_attn_implementation("eager")  # the only one that returns attention weights
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.encoder.mean, self.encoder.std))

    def look(self, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Returns tokens [B, layers, N, D] and attention [B, layers, N] (mean over heads) of pixels [B, H, W, 3] in
        0..255."""
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        with torch.inference_mode():
            seen = self.encoder.model(pixel_values=x, output_hidden_states=True, output_attentions=True)
        tokens = torch.stack([seen.hidden_states[i][:, 1:] for i in self.layers], 1)
        attention = torch.stack([seen.attentions[i - 1][:, :, 0, 1:].mean(1) for i in self.layers], 1)
        return tokens, attention


@dataclass
class Split:
    """The features and questions of the n scenes of a split."""

    tokens: np.ndarray  # [n, layers, N, D] float16, on disk
    attention: np.ndarray  # [n, layers, N] float16, on disk
    questions: np.ndarray  # [q, 4]: scene, kind, argument, answer
    source: np.ndarray  # [n]: an index into `names`
    names: list[str]  # of the photographs and clips

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        """Returns tokens [n, N, D] and attention [n, N] of one layer, float16 and float32."""
        at = LAYERS.index(layer)
        return torch.from_numpy(self.tokens[:, at].copy()), torch.from_numpy(self.attention[:, at].astype(np.float32))


def extract(folder: Path, sizes: dict[str, int], seed: int, photos: Path | None = None) -> None:
    """Writes the features of every split into `folder`; continues an earlier call that was stopped.

    photos: a folder whose files replace the test photographs. Raises: ValueError, if features of another seed or other
    photographs are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    eye = Eye(LAYERS)
    for number, (split, count) in enumerate(sizes.items()):
        pictures = scenes.sources(split, photos if split == "test" else None)
        record, known = folder / f"{split}.json", {"names": [p.name for p in pictures], "seed": seed}
        if record.exists() and json.loads(record.read_text()) != known:
            raise ValueError(f"{folder} has features of {split} of another seed or other photographs: empty it first")
        record.write_text(json.dumps(known))
        ink = scenes.digits(split)
        write(folder, split, (scenes.scene(pictures, ink, (seed, number, i)) for i in range(count)), count, eye)


def write(folder: Path, split: str, made: Iterator[scenes.Scene], count: int, eye: Eye) -> None:
    """Encodes `count` scenes; prints the progress every 200."""
    side = (scenes.SIDE // 14) ** 2
    tokens = _open(folder / f"{split}-tokens.npy", (count, len(LAYERS), side, 384))
    attention = _open(folder / f"{split}-attention.npy", (count, len(LAYERS), side))
    questions, source, begin = [], [], time.perf_counter()
    for first in range(0, count, BATCH):
        some = [next(made) for _ in range(min(BATCH, count - first))]
        part = slice(first, first + len(some))
        if not attention[part].any():  # class attention is never all 0
            seen = eye.look(np.stack([s.pixels for s in some]))
            tokens[part], attention[part] = seen[0].half().numpy(), seen[1].half().numpy()
        questions += [np.insert(s.questions, 0, first + i, axis=1) for i, s in enumerate(some)]
        source += [s.source for s in some]
        if first % 200 == 0 or first + BATCH >= count:
            print(f"{split}: {first + len(some)}/{count}, {time.perf_counter() - begin:.0f} s", flush=True)
    tokens.flush(), attention.flush()
    np.savez(folder / f"{split}.npz", questions=np.concatenate(questions), source=np.array(source))


def read(folder: Path, split: str) -> Split:
    """Reads what `extract` wrote. Raises: FileNotFoundError, with the command to run, if there is nothing."""
    if not (folder / f"{split}.npz").exists():  # written last
        raise FileNotFoundError(f"no features of split {split!r} in {folder}: python -m benchmarks.quality features")
    with np.load(folder / f"{split}.npz") as stored:
        questions, source = stored["questions"], stored["source"]
    tokens, attention = (np.load(folder / f"{split}-{n}.npy", mmap_mode="r") for n in ("tokens", "attention"))
    return Split(tokens, attention, questions, source, json.loads((folder / f"{split}.json").read_text())["names"])


def _open(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """Opens the file of an earlier call if it has this shape, else makes a new one of zeros."""
    if path.exists() and np.load(path, mmap_mode="r").shape == shape:
        return np.load(path, mmap_mode="r+")
    return np.lib.format.open_memmap(path, "w+", np.float16, shape)
