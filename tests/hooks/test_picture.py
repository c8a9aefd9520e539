"""`apet.picture`: the marks are at the kept and merged tokens, and the photo is the input of the model."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from types import SimpleNamespace

import apet
import numpy as np
import pytest
import torch
from apet import calls, model_pictures
from conversations import SIZES, collate, sources
from families import FAMILIES, TILE, Family, shared
from PIL import Image
from processors import MEAN, STD, Processor
from running import BOTH, FIRST, STAGES, conversation, conversations
from transformers import PreTrainedModel

PROCESSOR = SimpleNamespace(image_mean=MEAN, image_std=STD)
DRAWN = ["llava", "llava_next", "qwen2_5_vl", "video_llava", "qwen2_vl", "qwen3_vl", "internvl"]


def inputs_of(family: Family) -> dict[str, torch.Tensor]:
    """Returns the inputs for two images of different sizes and, if the family has any, a video."""
    return collate(family, [conversation(family, 3, "image", 2, "image1", 4, *["video"] * family.video, 2)])


def places(model: PreTrainedModel, family: Family, kind: str, tokens: int, visual: int) -> list[tuple[int, int] | None]:
    """Returns, for each placeholder of an image or video, its tile or frame, and its place there; None if it is never
    compressed."""
    if family.name == "llava_next":
        tiles = (5, 3)[visual]
        return [divmod(s, TILE) if s >= 0 else None for s in sources(model, SIZES[visual], tiles).tolist()]
    if family.name == "video_llava" and kind == "video":
        return [(p // (TILE + 1), p % (TILE + 1) - 1) if p % (TILE + 1) else None for p in range(tokens)]
    per_tile = 16 if kind == "video" else TILE if family.name == "internvl" else tokens
    return [divmod(p, per_tile) for p in range(tokens)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", DRAWN)
def test_marks_are_what_the_hooks_kept(name: str, stage: str) -> None:
    family, model = FAMILIES[name], shared(name)
    inputs = inputs_of(family)
    with apet.patched(model, **STAGES[stage]):
        found = [model_pictures.panels(model, inputs, PROCESSOR, v) for v in range(2 + family.video)]
        visuals = apet.kept(model).visuals
    for number, (panels, visual) in enumerate(zip(found, visuals, strict=True)):
        where = places(model, family, visual.modality, visual.tokens, number)
        tiles = 1 + max(tile for tile, _ in filter(None, where))
        assert len(panels) == tiles * len(visual.remaining)
        there = set(range(visual.tokens))
        for i, left in enumerate(visual.remaining):
            some = panels[i * tiles : (i + 1) * tiles]
            kept = {(t, int(p)) for t, panel in enumerate(some) for p in panel.frame.kept}
            assert kept == {where[p] for p in left.tolist()} - {None}
            before = {where[p] for p in there} - {None}
            for t, panel in enumerate(some):
                goes = {(t, int(p)) for p in np.flatnonzero(panel.frame.target_position >= 0)}
                assert goes == {place for place in before if place[0] == t}  # layout inplace: nothing is lost
                target = panel.frame.target_position
                assert set(target[target >= 0]) <= set(panel.frame.kept)
                assert len(panel.frame.basis) == 4
                assert set(panel.frame.basis) <= set(panel.frame.kept)
                assert panel.frame.residual.max() > 0 or len(panel.frame.kept) <= 4
            there = set(left.tolist())


def test_merged_tokens_are_the_means_of_their_groups() -> None:
    """The picture shows the groups that the op has merged."""
    family, model = FAMILIES["llava"], shared("llava")
    with apet.patched(model, **FIRST), calls.Recorder() as recorder:
        (panel,) = model_pictures.panels(model, inputs_of(family), PROCESSOR, 1)
    call = recorder.calls[0]
    x, rows = call.x[TILE:], call.tokens[9:]  # the second image
    for row, position in zip(rows, panel.frame.kept, strict=True):
        mean = x[torch.from_numpy(panel.frame.target_position == position)].mean(0)
        torch.testing.assert_close(row, mean)


@pytest.mark.parametrize("layout", ["overwrite", "append"])
def test_layouts(layout: str) -> None:
    family, model = FAMILIES["video_llava"], shared("video_llava")
    inputs = inputs_of(family)
    with apet.patched(model, keep=9, basis=4, layout=layout):
        panels = model_pictures.panels(model, inputs, PROCESSOR, 2)
        left = apet.kept(model).visuals[2].remaining[0].tolist()
    assert len(panels) == 4
    for t, panel in enumerate(panels):
        assert len(panel.frame.kept) == 9
        assert {t * (TILE + 1) + 1 + p for p in panel.frame.kept} <= set(left)
        assert len(panel.frame.overwritten) == (4 if layout == "overwrite" else 0)


def test_rows_of_a_batch() -> None:
    """Images are numbered row after row, and each has its own marks."""
    family, model = FAMILIES["llava_next"], shared("llava_next")
    inputs = collate(family, conversations(family))
    with apet.patched(model, **FIRST):
        found = [model_pictures.panels(model, inputs, PROCESSOR, v) for v in range(3)]
        visuals = apet.kept(model).visuals
    assert [v.row for v in visuals] == [0, 1, 1]
    for panels, visual, which in zip(found, visuals, (0, 1, 2), strict=True):
        where = sources(model, SIZES[which], len(panels)).tolist()
        kept = {(t, int(p)) for t, panel in enumerate(panels) for p in panel.frame.kept}
        assert kept == {divmod(where[p], TILE) for p in visual.remaining[0].tolist() if where[p] >= 0}


def scene(width: int, height: int) -> np.ndarray:
    """Returns a picture without symmetries, so that turning, mirroring or shuffling is noticed: [height, width, 3]
    bytes."""
    rows, columns = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    bump = np.exp(-((rows - 0.2) ** 2 + (columns - 0.7) ** 2) * 20)
    return (255 * np.stack([rows, columns, bump], -1)).astype(np.uint8)


@pytest.mark.parametrize(
    ("name", "kind"), [("qwen2_5_vl", "images"), ("video_llava", "images"), ("video_llava", "videos")]
)
def test_photo_is_what_the_model_saw(name: str, kind: str) -> None:
    family, model = FAMILIES[name], shared(name)
    processor = Processor(family)
    given = [scene(96, 64), scene(48, 48)[:, ::-1]]
    token = f"<{kind[:-1]}>"
    if kind == "images":
        inputs = processor([f"w3 {token} w4 {token} w5"], images=given)
        seen = given
    else:
        seen = [scene(48, 48), scene(48, 48)[::-1]]
        inputs = processor([f"w3 {token} w4"], videos=[np.stack(seen)])
    with apet.patched(model, **FIRST):
        visuals = range(len(given)) if kind == "images" else [0]
        panels = [p for v in visuals for p in model_pictures.panels(model, dict(inputs), processor, v)]
    assert len(panels) == 2
    for panel, picture in zip(panels, seen, strict=True):
        height, width = panel.photo.shape[:2]
        assert (height, width) == tuple(28 * n for n in panel.grid)
        again = np.asarray(Image.fromarray(picture).resize((width, height)), np.float32) / 255
        assert np.abs(panel.photo - again).mean() < 0.03
        assert np.abs(panel.photo - again[:, ::-1]).mean() > 0.1


def test_tiles_of_an_image_are_its_own() -> None:
    """LLaVA-NeXT pads images with fewer tiles; the picture shows each tile's own pixels."""
    family, model = FAMILIES["llava_next"], shared("llava_next")
    inputs = inputs_of(family)
    with apet.patched(model, **BOTH):
        panels = model_pictures.panels(model, inputs, PROCESSOR, 1)
    assert [panel.label for panel in panels] == [
        f"tile {t}, {stage}" for stage in ("after the encoder", "after layer 2") for t in (1, 2, 3)
    ]
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    for _, same in groupby(sorted(panels, key=lambda p: p.label), key=lambda p: p.label[:6]):
        same = list(same)
        assert np.array_equal(same[0].photo, same[1].photo)
        pixels = inputs["pixel_values"][1, int(same[0].label[5]) - 1]
        tile = (pixels * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()
        small = np.asarray(Image.fromarray((255 * same[0].photo).astype(np.uint8)).resize((48, 48)), np.float32) / 255
        assert np.abs(small - tile).mean() < 0.1


def test_figure(tmp_path: Path) -> None:
    """The whole sheet, of several tiles and two stages and of a single image."""
    for name, least in (("llava_next", 1500), ("llava", 400)):
        model = shared(name)
        options = BOTH if name == "llava_next" else FIRST
        with apet.patched(model, **options):
            figure = apet.picture(model, inputs_of(FAMILIES[name]), PROCESSOR, 1)
            before = apet.kept(model).visuals[1].tokens
            left = [len(some) for some in apet.kept(model).visuals[1].remaining]
        words = [text.get_text() for text in figure.texts]
        assert words[0] == f"image 2: {before} → {' → '.join(map(str, left))} tokens"
        figure.savefig(tmp_path / f"{name}.png")
        picture = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert picture.shape[0] > least
        assert len(np.unique(picture @ np.array([1 << 16, 1 << 8, 1]))) > 5000


def test_title_counts_appended_rows() -> None:
    model = shared("llava")
    with apet.patched(model, keep=9, basis=4, layout="append"):
        figure = apet.picture(model, inputs_of(FAMILIES["llava"]), PROCESSOR)
    assert figure.texts[0].get_text() == "image 1: 36 → 9 + 4 basis tokens"


def test_wrong_arguments() -> None:
    model, inputs = shared("llava"), inputs_of(FAMILIES["llava"])
    with pytest.raises(ValueError, match=r"is not patched: call apet\.patch"):
        apet.picture(model, inputs, PROCESSOR)
    with apet.patched(model, keep=1.0), pytest.raises(ValueError, match="nothing was dropped, so there is nothing"):
        apet.picture(model, inputs, PROCESSOR)
    with apet.patched(model, keep=[9, 36], basis=4):
        assert len(model_pictures.panels(model, inputs, PROCESSOR, 0)) == 1
        with pytest.raises(ValueError, match="nothing was dropped of image or video 1"):
            apet.picture(model, inputs, PROCESSOR, 1)
        for visual in (2, -1):
            with pytest.raises(ValueError, match=f"visual={visual} is none of the 2 images and videos"):
                apet.picture(model, inputs, PROCESSOR, visual)


@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video"])
def test_places_that_are_not_known(name: str) -> None:
    model = shared(name)
    with apet.patched(model, **FIRST), pytest.raises(ValueError, match=f"a {name} model in its pixels are not known"):
        apet.picture(model, inputs_of(FAMILIES[name]), PROCESSOR)
