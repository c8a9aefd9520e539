"""Pictures with a description of what is in them: photographs with digits and words, and white pages with words.

Everything pasted differs in colour and in what it says. Digits and words darken the photograph around them. The height
of a word is that of its capitals, and all its letters are capitals.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.quality import scenes as study
from benchmarks.vlm import sources
from benchmarks.vlm.sources import Sources

SIDE, PATCH = study.SIDE, 14
GRID = SIDE // PATCH  # patches to an edge
COLOURS = tuple(study.PALETTE)
SMALLEST, LARGEST = 6, 40  # pixels of a word's height
DIGIT = (28, 80)  # pixels of a digit's edge
MOST = {"digits": 6, "words": 3, "rows": 4, "columns": 2}
GAP = 3  # pixels around everything pasted
SHARES = {"digits": 0.4, "words": 0.3, "page": 0.3}  # of the pictures
LUMINANCE = np.array([0.299, 0.587, 0.114])
VARIED = 2 / 3  # of the training's words and pages: with a varied typeface
FINER = 4  # a varied word is drawn so many times as large, and then reduced


@dataclass
class Thing:
    """Something pasted."""

    what: str  # a digit or a word
    colour: str  # "" on pages
    box: tuple[int, int, int, int]  # x, y, width, height in pixels
    typeface: str = ""  # of a word

    @property
    def is_digit(self) -> bool:
        """Whether the thing is a digit, else it is a word."""
        return self.what.isdigit()

    @property
    def middle(self) -> tuple[float, float]:
        """The middle of its box, x and y."""
        x, y, width, height = self.box
        return x + width / 2, y + height / 2


@dataclass(frozen=True)
class Variation:
    """How a typeface is varied. The packages have few typefaces, and letters should be known in others."""

    stretch: float  # of widths
    slant: float  # by how many pixels a row is to the right of the next one
    spacing: float  # more room between letters, in heights of capitals
    stroke: float  # around letters, in heights of capitals

    @classmethod
    def draw(cls, made_of: Sources, draw: np.random.Generator) -> Variation | None:
        """Returns a random one, or None: the typeface as it is, always so outside of the training."""
        if made_of.split != "train" or draw.random() >= VARIED:
            return None
        stretch, slant = 1.3 ** draw.uniform(-1, 1), max(draw.uniform(-0.2, 0.3), 0.0)
        return cls(stretch, slant, draw.uniform(0, 0.2), max(draw.uniform(-0.04, 0.04), 0.0))


@dataclass
class Scene:
    """A picture and what is in it."""

    pixels: np.ndarray  # [SIDE, SIDE, 3] uint8
    photograph: str  # the name of what it was cut from; "": it is a page
    region: int  # an index into `Sources.photographs`, or -1
    things: list[Thing]  # of a page: row after row
    columns: int = 0  # things in a row of a page
    # [GRID * GRID] uint8, for each patch: the code of the character that covers most of it, or 0
    patches: np.ndarray = field(default_factory=lambda: np.zeros(GRID * GRID, np.uint8))
    # likewise: which letter of its word this character is, from 1 on, or 0
    letters: np.ndarray = field(default_factory=lambda: np.zeros(GRID * GRID, np.uint8))
    # likewise: 1 + the index of its thing in `things`, or 0
    owners: np.ndarray = field(default_factory=lambda: np.zeros(GRID * GRID, np.uint8))
    # likewise: 1 + the index of its colour in `COLOURS`, or 0
    colours: np.ndarray = field(default_factory=lambda: np.zeros(GRID * GRID, np.uint8))
    # [GRID * GRID] uint8: 1 + the index of the thing whose middle is in the patch, or 0
    middles: np.ndarray = field(default_factory=lambda: np.zeros(GRID * GRID, np.uint8))

    def brightness(self) -> np.ndarray:
        """Returns the mean luminance of each patch, [GRID * GRID] uint8."""
        patches = self.pixels.reshape(GRID, PATCH, GRID, PATCH, 3).mean((1, 3)) @ LUMINANCE
        return patches.round().astype(np.uint8).ravel()


def scene(made_of: Sources, seed: tuple[int, ...]) -> Scene:
    """Makes one scene; the seed decides everything."""
    draw = np.random.default_rng(seed)
    kind = draw.choice(list(SHARES), p=list(SHARES.values()))
    return page(made_of, draw) if kind == "page" else photograph(made_of, draw, words=kind == "words")


def photograph(made_of: Sources, draw: np.random.Generator, words: bool) -> Scene:
    """Makes a photograph with 1 to 6 digits, or with 1 to 3 words and up to two digits."""
    region = int(draw.integers(len(made_of.photographs)))
    picture = study.crop(made_of.photographs[region], draw)  # [SIDE, SIDE, 3] float32
    count = int(draw.integers(1, MOST["words"] + 1)) if words else 0
    digits = int(draw.integers(3)) if words else int(draw.integers(1, MOST["digits"] + 1))
    colours = [COLOURS[i] for i in draw.permutation(len(COLOURS))]
    drawn: list[tuple[str, str, Image.Image, list[tuple[int, int]]]] = []  # what, typeface, mask, spans of letters
    for what in _words(made_of, count, draw):
        face = str(draw.choice(made_of.typefaces))
        high, variation = _height(draw, LARGEST), Variation.draw(made_of, draw)
        drawn.append((what, face, *written(what, face, high, (SIDE - 2 * GAP,) * 2, variation)))
    largest = DIGIT[1] if digits + count <= 2 else 64 if digits + count <= 4 else 52
    for value in draw.permutation(10)[:digits]:
        size = int(draw.integers(DIGIT[0], largest + 1))
        drawn.append((str(value), "", _digit(made_of.digits, int(value), size, draw), [(0, size)]))
    made = Scene(np.empty(0), made_of.photographs[region].name, region, [])
    places = placed([(mask.width + 2 * GAP, mask.height + 2 * GAP) for _, _, mask, _ in drawn], draw)
    cover = np.zeros((GRID, GRID))
    for (what, face, mask, spans), colour, (x, y) in zip(drawn, colours, places, strict=False):
        window = picture[y : y + mask.height + 2 * GAP, x : x + mask.width + 2 * GAP]
        alpha = np.pad(np.asarray(mask, np.float32) / 255, GAP)[..., None]
        window[:] = window * 0.35 * (1 - alpha) + np.array(study.PALETTE[colour], np.float32) * alpha
        made.things.append(Thing(what, colour, (x + GAP, y + GAP, mask.width, mask.height), face))
        _label(made, cover, spans)
    made.pixels = picture.clip(0, 255).astype(np.uint8)
    return made


def page(made_of: Sources, draw: np.random.Generator) -> Scene:
    """Makes a page of up to four rows of one or two words, dark on white, one in each cell of a grid, in one typeface
    and size."""
    rows, columns = int(draw.integers(1, MOST["rows"] + 1)), int(draw.integers(1, MOST["columns"] + 1))
    face, variation = str(draw.choice(made_of.typefaces)), Variation.draw(made_of, draw)
    paper, ink = float(draw.integers(235, 256)), float(draw.integers(0, 90))
    high = _height(draw, min(LARGEST, SIDE // rows - 4 * GAP))
    grey = np.full((SIDE, SIDE), paper, np.float32)
    made = Scene(np.empty(0), "", -1, [], columns)
    cover = np.zeros((GRID, GRID))
    for i, what in enumerate(_words(made_of, rows * columns, draw)):
        wide, tall = SIDE // columns, SIDE // rows
        mask, spans = written(what, face, high, (wide - 2 * GAP, tall - 2 * GAP), variation)
        x = i % columns * wide + GAP + int(draw.integers(wide - 2 * GAP - mask.width + 1))
        y = i // columns * tall + GAP + int(draw.integers(tall - 2 * GAP - mask.height + 1))
        alpha = np.asarray(mask, np.float32) / 255
        window = grey[y : y + mask.height, x : x + mask.width]
        window[:] = window * (1 - alpha) + ink * alpha
        made.things.append(Thing(what, "", (x, y, mask.width, mask.height), face))
        _label(made, cover, spans)
    made.pixels = np.repeat(grey[..., None], 3, -1).astype(np.uint8)
    return made


def written(
    what: str, face: str, high: int, room: tuple[int, int], variation: Variation | None = None
) -> tuple[Image.Image, list[tuple[int, int]]]:
    """Returns a word as a mask "L" as tight as its capitals, and the first and last column of each letter.

    Its capitals are `high` pixels high, or as high as fits into `room`, width and height.
    """
    while True:
        mask, spans = _plain(what, face, high) if variation is None else _varied(what, face, high, variation)
        if mask.width <= room[0] and mask.height <= room[1]:
            return mask, spans
        high -= 1


def _plain(what: str, face: str, high: int) -> tuple[Image.Image, list[tuple[int, int]]]:
    font = sources.typeface(face, high)
    left, top, right, bottom = (int(v) for v in font.getbbox(what))
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), what, font=font, fill=255)
    ends = [round(font.getlength(what[:i])) - left for i in range(len(what) + 1)]
    return mask, list(itertools.pairwise(ends))


def _varied(what: str, face: str, high: int, variation: Variation) -> tuple[Image.Image, list[tuple[int, int]]]:
    font = sources.typeface(face, FINER * high)
    stroke = round(variation.stroke * FINER * high)
    gap = 2 * stroke + round(variation.spacing * FINER * high)
    ends = np.cumsum([0.0, *(font.getlength(letter) + gap for letter in what)])
    margin = FINER * high  # around the letters, since some are wider than their lengths, or below the line
    mask = Image.new("L", (round(ends[-1]) + 2 * margin, 3 * margin))
    for letter, begin in zip(what, ends, strict=False):
        ImageDraw.Draw(mask).text(
            (margin + begin, 2 * margin), letter, font=font, fill=255, anchor="ls", stroke_width=stroke
        )
    # Rows above the line are shifted to the right: the pixel at x comes from x + slant * (y - line).
    shift = (1, variation.slant, -variation.slant * 2 * margin, 0, 1, 0)
    mask = mask.transform(mask.size, Image.Transform.AFFINE, shift, Image.Resampling.BILINEAR)
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    size = (max(round((right - left) * variation.stretch / FINER), 1), max(round((bottom - top) / FINER), 1))
    mask = mask.crop((left, top, right, bottom)).resize(size, Image.Resampling.BOX)
    # Of slanted letters: the columns at half their height.
    at = (ends + margin + variation.slant * margin / 2 - left - gap / 2) * variation.stretch / FINER
    return mask, list(itertools.pairwise(round(float(end)) for end in at))


def placed(sizes: list[tuple[int, int]], draw: np.random.Generator) -> list[tuple[int, int]]:
    """Returns places (x, y) of rectangles of these widths and heights that do not overlap."""
    taken: list[tuple[int, int, int, int]] = []
    while len(taken) < len(sizes):
        w, h = sizes[len(taken)]
        x, y = int(draw.integers(SIDE - w + 1)), int(draw.integers(SIDE - h + 1))
        if all(x + w <= a or a + c <= x or y + h <= b or b + d <= y for a, b, c, d in taken):
            taken.append((x, y, w, h))
        elif draw.random() < 0.02:  # the first ones may leave no room: start again
            taken.clear()
    return [(x, y) for x, y, _, _ in taken]


def word(made_of: Sources, draw: np.random.Generator) -> str:
    """Returns a word; in training every other one is invented, so that words cannot be learned as wholes."""
    invented = made_of.split == "train" and draw.random() < 0.5
    return sources.invented(draw) if invented else made_of.words[int(draw.integers(len(made_of.words)))]


def _height(draw: np.random.Generator, largest: int) -> int:
    """Returns a random height. Every octave is equally frequent, so small ones are as frequent as large ones."""
    return int(SMALLEST * (largest / SMALLEST) ** draw.random() + 0.5)


def _words(made_of: Sources, count: int, draw: np.random.Generator) -> list[str]:
    """Returns different words."""
    found: list[str] = []
    while len(found) < count:
        if (one := word(made_of, draw)) not in found:
            found.append(one)
    return found


def _digit(ink: study.Digits, value: int, size: int, draw: np.random.Generator) -> Image.Image:
    stroke = ink.images[draw.choice(np.flatnonzero(ink.labels == value))]
    grown = Image.fromarray((stroke * 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return grown.point(lambda v: min(255, int(v * 1.6)))


def _label(made: Scene, cover: np.ndarray, spans: list[tuple[int, int]]) -> None:
    """Writes the characters of the last thing, whose columns are `spans`, their numbers, its own and its colour into
    the patches of which they cover most so far. cover [GRID, GRID]: how much."""
    thing = made.things[-1]
    x, y, _, height = thing.box
    colour = COLOURS.index(thing.colour) + 1 if thing.colour else 0
    column, row = (int(v) // PATCH for v in thing.middle)
    made.middles[row * GRID + column] = len(made.things)
    edges = np.arange(GRID) * PATCH
    tall = (np.minimum(edges + PATCH, y + height) - np.maximum(edges, y)).clip(0)  # [GRID]
    labels = [grid.reshape(GRID, GRID) for grid in (made.patches, made.letters, made.owners, made.colours)]
    for number, (character, (begin, end)) in enumerate(zip(thing.what, spans, strict=True), start=1):
        wide = (np.minimum(edges + PATCH, x + end) - np.maximum(edges, x + begin)).clip(0)
        area = tall[:, None] * wide / min(PATCH * PATCH, height * max(end - begin, 1))
        more = (area > cover) & (area > 0.2)
        for grid, label in zip(
            (*labels, cover), (ord(character), number, len(made.things), colour, area[more]), strict=True
        ):
            grid[more] = label
