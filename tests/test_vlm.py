"""The data of the vision-language model: its sources, its pictures, its questions and answers."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.quality import scenes as study
from benchmarks.vlm import features, llava, questions, scenes, sources, words
from tests.test_quality import printed_digits

pytestmark = pytest.mark.rest  # a study, and no part of the package


def made_of(split: str, photographs: list[study.Source] | None = None) -> sources.Sources:
    """Returns sources from the test environment: one photograph, printed digits, and matplotlib's typefaces."""
    if photographs is None:
        photographs = [study.source(sources.packaged(f"{study.SKIMAGE}/coffee.png"))]
    faces = tuple(name for some in sources.TYPEFACES.values() for name in some if name.startswith(sources.MATPLOTLIB))
    return sources.Sources(split, photographs, printed_digits(split), faces, sources.words(split))


@pytest.fixture(scope="module")
def coffee() -> sources.Sources:
    return made_of("test")


# ---- pictures and questions


def test_nothing_is_in_two_splits() -> None:
    def families(split: str) -> set[str]:
        names = (Path(name) for name in sources.TYPEFACES[split])
        return {
            re.sub(r"(Sans|Serif|Mono|-|Bol$|10$).*", "", n.stem) if "mpl" in str(n) else n.parent.name for n in names
        }

    for one, other in itertools.combinations(sources.PHOTOGRAPHS, 2):
        assert not set(sources.PHOTOGRAPHS[one]) & set(sources.PHOTOGRAPHS[other])
        assert not set(sources.words(one)) & set(sources.words(other))
        assert not families(one) & families(other)
    assert sum(len(sources.words(split)) for split in sources.PHOTOGRAPHS) == len(sources._all_words())
    assert {len(word) for word in sources._all_words()} <= set(range(3, sources.LONGEST + 1))
    draw = np.random.default_rng(0)
    assert not {sources.invented(draw) for _ in range(300)} & set(sources._all_words())


@pytest.mark.parametrize("size", [(600, 400), (300, 451), (1411, 1411), (224, 210)])
def test_regions_of_a_photograph_are_disjoint(size: tuple[int, int]) -> None:
    """Every pixel of a picture of different colours is in at most one region; hardly any is in none."""
    width, height = size
    at = np.arange(width * height).reshape(height, width)
    colours = np.stack([at & 255, at >> 8 & 255, at >> 16], -1).astype(np.uint8)
    whole = study.Source("whole", [Image.fromarray(colours)])
    small = sources._enlarged
    try:
        sources._enlarged = lambda frame: frame  # type: ignore[assignment]
        parts = [np.asarray(part.frames[0], np.int64) for part in sources.regions(whole)]
    finally:
        sources._enlarged = small
    seen = np.concatenate([(part @ np.array([1, 256, 65536])).ravel() for part in parts])
    assert len(set(seen.tolist())) == len(seen)
    assert len(seen) > 0.98 * at.size


def test_a_seed_decides_a_scene(coffee: sources.Sources) -> None:
    for number in range(12):
        first, again = (features.make(coffee, 3, number) for _ in range(2))
        assert np.array_equal(first[0].pixels, again[0].pixels)
        assert first[1] == again[1]
    assert not np.array_equal(features.make(coffee, 4, 0)[0].pixels, features.make(coffee, 3, 0)[0].pixels)


def test_what_is_pasted_is_where_the_description_says() -> None:
    """On a black photograph and on pages: nothing is drawn outside of the boxes, and every box has its colour."""
    black = made_of("train", [study.Source("black", [Image.new("RGB", (300, 300))])])
    kinds = set()
    for number in range(40):
        scene, _ = features.make(black, 5, number)
        kinds.add((bool(scene.columns), len(scene.things)))
        inside = np.zeros((scenes.SIDE, scenes.SIDE), bool)
        drawn = scene.pixels.max(-1) < 220 if scene.columns else scene.pixels.max(-1) > 0
        for thing in scene.things:
            x, y, wide, tall = thing.box
            assert drawn[y : y + tall, x : x + wide].any()
            assert not inside[y : y + tall, x : x + wide].any()  # no two overlap
            inside[y : y + tall, x : x + wide] = True
            if not scene.columns:
                window = scene.pixels[y : y + tall, x : x + wide].reshape(-1, 3).astype(float)
                brightest = window[window.sum(-1).argmax()]
                named = min(study.PALETTE, key=lambda c: np.abs(brightest - study.PALETTE[c]).sum())
                assert named == thing.colour or tall < 12  # thin strokes are darker than their colour
        assert not (drawn & ~inside).any()
    assert {page for page, _ in kinds} == {True, False}


def test_patches_name_the_characters_that_cover_them(coffee: sources.Sources) -> None:
    for number in range(30):
        scene, _ = features.make(coffee, 6, number)
        grid = scene.patches.reshape(scenes.GRID, scenes.GRID)
        for row, column in np.argwhere(grid):
            patch = (column * scenes.PATCH, row * scenes.PATCH)
            near = [t for t in scene.things if all(
                t.box[a] < patch[a] + scenes.PATCH and patch[a] < t.box[a] + t.box[a + 2] + 1 for a in (0, 1)
            )]  # fmt: skip
            colour = scene.colours.reshape(scenes.GRID, scenes.GRID)[row, column]
            named = "" if colour == 0 else scenes.COLOURS[colour - 1]
            letter = scene.letters.reshape(scenes.GRID, scenes.GRID)[row, column]
            assert any(
                thing.what[letter - 1 :][:1] == chr(grid[row, column]) and named == thing.colour for thing in near
            )
        assert not scene.colours[scene.patches == 0].any()
        for grid in (scene.letters, scene.owners):
            assert np.array_equal(grid == 0, scene.patches == 0)
        for patch in np.flatnonzero(scene.owners):
            thing = scene.things[scene.owners[patch] - 1]
            assert thing.what[scene.letters[patch] - 1] == chr(scene.patches[patch])
        for thing in scene.things:
            if thing.box[3] >= 2 * scenes.PATCH:  # each letter of a large word covers a patch
                assert set(thing.what) <= {chr(code) for code in scene.patches}
        for number, thing in enumerate(scene.things, start=1):
            x, y, wide, tall = thing.box
            rows, columns = np.divmod(np.flatnonzero(scene.middles == number), scenes.GRID)
            corners = list(zip((columns * scenes.PATCH).tolist(), (rows * scenes.PATCH).tolist(), strict=True))
            assert len(corners) <= 1  # none where the middle of another one is in the same patch
            assert all(
                a <= x + wide / 2 < a + scenes.PATCH and b <= y + tall / 2 < b + scenes.PATCH for a, b in corners
            )
        assert 0.8 * len(scene.things) <= np.count_nonzero(scene.middles) <= len(scene.things)


def test_patches_name_their_brightness(coffee: sources.Sources) -> None:
    for number in range(6):
        scene, asked = features.make(coffee, 11, number)
        grey = np.asarray(Image.fromarray(scene.pixels).convert("L"), float)
        brightness = features.Picture.of(scene, asked).brightness
        for patch in range(scenes.GRID**2):
            row, column = (scenes.PATCH * at for at in divmod(patch, scenes.GRID))
            assert abs(grey[row : row + scenes.PATCH, column : column + scenes.PATCH].mean() - brightness[patch]) < 1.5


@pytest.mark.parametrize("variation", [
    scenes.Variation(1.0, 0.0, 0.0, 0.0), scenes.Variation(1.3, 0.0, 0.0, 0.0), scenes.Variation(1.0, 0.3, 0.0, 0.0),
    scenes.Variation(1.0, 0.0, 0.2, 0.0), scenes.Variation(0.8, 0.25, 0.1, 0.04),
])  # fmt: skip
@pytest.mark.parametrize("face", ["DejaVuSans", "cmr10"])
def test_a_varied_word_is_as_high_and_its_letters_are_where_its_spans_say(
    face: str, variation: scenes.Variation
) -> None:
    name, high = f"{sources.MATPLOTLIB}/{face}.ttf", 36
    mask, spans = scenes.written("LIGHT", name, high, (scenes.SIDE, scenes.SIDE), variation)
    assert abs(mask.height - high * (1 + 2 * variation.stroke)) <= 3
    plain, _ = scenes.written("LIGHT", name, high, (scenes.SIDE, scenes.SIDE))
    wide = plain.width + high * (4 * variation.spacing + 8 * variation.stroke)
    if variation.slant == 0:
        assert abs(mask.width / (wide * variation.stretch) - 1) < 0.06
    else:
        assert mask.width > wide * variation.stretch
    ink = np.asarray(mask, float)
    assert len(spans) == 5
    assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(spans))
    # The foot of a slanted letter is to the left of its span, and its top to the right: look at half its height.
    middle = ink[mask.height // 2 - 1 : mask.height // 2 + 2].max(0) > 100
    for begin, end in spans:
        assert middle[max(begin, 0) : max(end, 0)].any()
    stem = np.flatnonzero(middle)[0]  # of the L
    assert spans[0][0] - 2 <= stem < spans[0][1]


def test_only_words_of_training_are_varied() -> None:
    def variations(split: str) -> list[scenes.Variation | None]:
        draw = np.random.default_rng(0)
        return [scenes.Variation.draw(made_of(split), draw) for _ in range(90)]

    assert set(variations("val")) == set(variations("test")) == {None}
    assert 45 <= sum(one is not None for one in variations("train")) <= 75


def answer_of(scene: scenes.Scene, text: str) -> str:
    """Returns the answer to a question, found by reading its text."""
    by_name = {f"the word {t.what}": t for t in scene.things if not t.is_digit}
    by_name |= {f"the {t.what}": t for t in scene.things if t.is_digit}
    by_name |= {f"the {t.colour} {'digit' if t.is_digit else 'word'}": t for t in scene.things if t.colour}

    def yes(so: bool) -> str:
        return "yes" if so else "no"

    if match := re.fullmatch(r"which (digit|word) is (\w+)", text):
        (found,) = [t for t in scene.things if t.colour == match[2] and t.what.isdigit() == (match[1] == "digit")]
        return found.what
    if match := re.fullmatch(r"what colour is (.+)", text):
        return by_name[match[1]].colour
    if match := re.fullmatch(r"where is (.+)", text):
        x, y, wide, tall = by_name[match[1]].box
        return f"row {int((y + tall / 2) // 56) + 1} column {int((x + wide / 2) // 56) + 1}"
    if match := re.fullmatch(r"how many (digit|word)s are there", text):
        return str(sum(t.what.isdigit() == (match[1] == "digit") for t in scene.things))
    if text == "which quarter is brightest":
        grey = np.asarray(Image.fromarray(scene.pixels).convert("L"), float)
        quarters = {f"{v} {h}": grey[r : r + 112, c : c + 112].mean()
                    for v, r in (("top", 0), ("bottom", 112)) for h, c in (("left", 0), ("right", 112))}  # fmt: skip
        return max(quarters, key=lambda name: quarters[name])
    if match := re.fullmatch(r"is there (?:the|a) (.+)", text):
        return yes(f"the {match[1]}" in by_name)
    if match := re.fullmatch(r"is (.+) (left or right of|above or below) (.+)", text):
        (x, y), (other_x, other_y) = (by_name[match[i]].middle for i in (1, 3))
        if match[2] == "above or below":
            return "above" if y < other_y else "below"
        return "left" if x < other_x else "right"
    place = {(i // scene.columns, i % scene.columns): t.what for i, t in enumerate(scene.things)}
    if match := re.fullmatch(r"which word is in row (\d) of (\d) column (\d) of (\d)", text):
        assert (int(match[2]), int(match[4])) == (max(row for row, _ in place) + 1, scene.columns)
        return place[int(match[1]) - 1, int(match[3]) - 1]
    (at,) = [at for at, what in place.items() if what in text.split()]
    match = re.fullmatch(r"which word is (left of|right of|above|below) \w+", text)
    assert match, text
    down, along = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}[match[1]]
    return place[at[0] + down, at[1] + along]


def test_answers_follow_from_the_description(coffee: sources.Sources) -> None:
    kinds, yes = set(), []
    for number in range(120):
        scene, asked = features.make(coffee, 7, number)
        assert len({one.text for one in asked}) == len(asked)
        for one in asked:
            assert one.answer == answer_of(scene, one.text), one.text
            kinds.add(one.kind)
            if one.answer in ("yes", "no"):
                yes.append(one.answer == "yes")
            assert one.height == 0 or one.height in {thing.box[3] for thing in scene.things}
    assert kinds == set(questions.KINDS)
    assert 0.42 < np.mean(yes) < 0.58


def test_page_rows_and_columns_are_where_they_are_said_to_be(coffee: sources.Sources) -> None:
    pages = [scene for number in range(40) if (scene := features.make(coffee, 8, number)[0]).columns]
    for page in pages:
        for i, thing in enumerate(page.things):
            rows = len(page.things) // page.columns
            x, y = thing.middle
            assert (int(y * rows / scenes.SIDE), int(x * page.columns / scenes.SIDE)) == divmod(i, page.columns)
    assert len(pages) > 5


def test_tokens_spell_every_question_and_answer(coffee: sources.Sources) -> None:
    tokenizer = words.tokenizer()
    for number in range(40):
        for one in features.make(coffee, 9, number)[1]:
            for text in (one.text, one.answer):
                ids = tokenizer(text, add_special_tokens=False).input_ids
                assert tokenizer.unk_token_id not in ids
                assert tokenizer.decode(ids) == text
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a 7"}]}]
    assert tokenizer.apply_chat_template(said, tokenize=False) == llava.prompt("is there a 7")
