"""Questions in words about a scene, each with its one right answer, made from the scene's description alone.

They have no question mark: the answer is predicted at their last word, which is mostly what they ask about.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.vlm import sources
from benchmarks.vlm.scenes import COLOURS, LUMINANCE, SIDE, Scene, Thing, word
from benchmarks.vlm.sources import Sources

# exists is answered by yes or no, equally often; relation by one of two sides; read: a word; beside: the word next to
# another one.
KINDS = ("digit", "colour", "place", "count", "brightest", "exists", "relation", "read", "beside")
CELLS = 4  # "place" divides the picture into 4 x 4 cells
APART = 12  # pixels between the middles of two things of which one is left of, or above, the other
QUARTERS = ("top left", "top right", "bottom left", "bottom right")
CHARACTERS = (*(str(i) for i in range(10)), *sources.LETTERS)  # that can be seen in pictures
AXES = ((("left", "right"), "left or right of"), (("above", "below"), "above or below"))
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}  # rows, columns


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its answer."""

    kind: str  # one of `KINDS`
    text: str
    answer: str
    height: int = 0  # of the words that have to be read, in pixels; 0: there are none
    about: tuple[int, ...] = ()  # the things that must be looked at for the answer; (): the whole picture


def ask(scene: Scene, made_of: Sources, seed: tuple[int, ...]) -> list[Question]:
    """Returns all questions about a scene, in an order that the seed decides; no text occurs twice."""
    draw = np.random.default_rng(seed)
    asked = [*about_page(scene, made_of, draw)] if scene.columns else [*about_photograph(scene, made_of, draw)]
    once = {question.text: question for question in asked}
    return [list(once.values())[i] for i in draw.permutation(len(once))]


def about_photograph(scene: Scene, made_of: Sources, draw: np.random.Generator) -> list[Question]:
    """Returns questions about digits, words, and the photograph."""
    digits = [thing for thing in scene.things if thing.is_digit]
    words = [thing for thing in scene.things if not thing.is_digit]
    number = scene.things.index
    asked = [Question("brightest", "which quarter is brightest", QUARTERS[brightest(scene.pixels)])]
    asked.append(Question("count", "how many digits are there", str(len(digits))))
    for thing in digits:
        asked.append(Question("digit", f"which digit is {thing.colour}", thing.what, 0, (number(thing),)))
    for thing in words:
        asked.append(Question("read", f"which word is {thing.colour}", thing.what, thing.box[3], (number(thing),)))
    for thing in scene.things:
        height, about = 0 if thing.is_digit else thing.box[3], (number(thing),)
        asked.append(Question("colour", f"what colour is {named(thing)}", thing.colour, height, about))
        asked.append(Question("place", f"where is the {thing.colour} {sort(thing)}", cell(thing), 0, about))
        asked.append(Question("place", f"where is {named(thing)}", cell(thing), height, about))
    asked += [existence(scene, made_of, draw) for _ in range(4)]
    if len(scene.things) > 1:
        asked += [question for _ in range(4) if (question := relation(scene, draw)) is not None]
    return asked


def about_page(scene: Scene, made_of: Sources, draw: np.random.Generator) -> list[Question]:
    """Returns questions about the words of a page: by place, by their neighbours, and whether one is there."""
    asked, columns = [], scene.columns
    rows = len(scene.things) // columns
    for i, thing in enumerate(scene.things):
        row, column = divmod(i, columns)
        place = f"row {row + 1} of {rows} column {column + 1} of {columns}"
        asked.append(Question("read", f"which word is in {place}", thing.what, thing.box[3], (i,)))
        asked.append(Question("place", f"where is {named(thing)}", cell(thing), thing.box[3], (i,)))
        for side, (down, along) in SIDES.items():
            other = i + down * columns + along
            if 0 <= column + along < columns and 0 <= other < len(scene.things):
                answer = scene.things[other]
                height = min(thing.box[3], answer.box[3])
                asked.append(Question("beside", f"which word is {side} {thing.what}", answer.what, height, (other,)))
    asked += [existence(scene, made_of, draw) for _ in range(3)]
    asked.append(Question("count", "how many words are there", str(len(scene.things))))
    return asked


def existence(scene: Scene, made_of: Sources, draw: np.random.Generator) -> Question:
    """Asks whether something is there; half of the answers are no."""
    yes = bool(draw.integers(2))
    answer = "yes" if yes else "no"
    words = [thing for thing in scene.things if not thing.is_digit]
    digits = [thing for thing in scene.things if thing.is_digit]
    if scene.columns or (words and draw.random() < 0.4):
        one = words[int(draw.integers(len(words)))]
        present = {thing.what for thing in words}
        absent = one.what
        while absent in present:
            absent = word(made_of, draw)
        about = (scene.things.index(one),) if yes else ()
        return Question("exists", f"is there the word {one.what if yes else absent}", answer, one.box[3], about)
    if digits and (len(digits) == len(COLOURS) or draw.random() < 0.5):
        there = [int(thing.what) for thing in digits]
        value = draw.choice(there if yes else [v for v in range(10) if v not in there])
        about = tuple(i for i, thing in enumerate(scene.things) if thing.what == str(value))
        return Question("exists", f"is there a {value}", answer, 0, about)
    of = digits or words
    there_colours = [thing.colour for thing in of]
    colour = draw.choice(there_colours if yes else [c for c in COLOURS if c not in there_colours])
    about = tuple(i for i, thing in enumerate(scene.things) if thing in of and thing.colour == colour)
    return Question("exists", f"is there a {colour} {sort(of[0])}", answer, 0, about)


def relation(scene: Scene, draw: np.random.Generator) -> Question | None:
    """Asks on which side of one thing another one is; None if they are level."""
    two = draw.permutation(len(scene.things))[:2].tolist()
    one, other = (scene.things[i] for i in two)
    axis = int(draw.integers(2))  # 0: x
    first, second = one.middle[axis], other.middle[axis]
    if abs(first - second) < APART:
        return None
    names = [(f"the {t.colour} {sort(t)}" if draw.random() < 0.5 else named(t)) for t in (one, other)]
    (before, after), sides = AXES[axis]
    spelled = [t.box[3] for t, name in zip((one, other), names, strict=True) if t.what in name and not t.is_digit]
    right = before if first < second else after
    return Question("relation", f"is {names[0]} {sides} {names[1]}", right, min(spelled, default=0), tuple(two))


def brightest(pixels: np.ndarray) -> int:
    """Returns which quarter of [SIDE, SIDE, 3] has the largest mean luminance: an index into `QUARTERS`."""
    half = SIDE // 2
    quarters = pixels.reshape(2, half, 2, half, 3).mean((1, 3)) @ LUMINANCE  # [2, 2]
    return int(quarters.argmax())


def cell(thing: Thing) -> str:
    """Returns the cell that holds the middle of a thing."""
    x, y = thing.middle
    return f"row {int(y * CELLS / SIDE) + 1} column {int(x * CELLS / SIDE) + 1}"


def named(thing: Thing) -> str:
    """Returns the name of a thing in a question: its digit or word."""
    return f"the {thing.what}" if thing.is_digit else f"the word {thing.what}"


def sort(thing: Thing) -> str:
    """Returns the kind of a thing: "digit" or "word"."""
    return "digit" if thing.is_digit else "word"


def vocabulary() -> list[str]:
    """Returns every word of questions and answers except those that are spelled, in a fixed order."""
    plain = "which digit is what colour where the word how many digits words are there quarter brightest in row column"
    more = "a left right top bottom of or above below yes no"
    return [*plain.split(), *more.split(), *COLOURS, *CHARACTERS]
