"""The pictures of the page of `apet explore`, without a browser, and the HTML report of `apet compress`."""

from __future__ import annotations

import base64
import io
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from apet import encoders, outcome
from apet.explore import files, methods, report, svg, view
from apet.explore.explorer import Explorer
from apet.explore.settings import METHODS, Link, Settings
from PIL import Image

from apet_kernels.options import LAYOUTS
from tests.command import failed, said
from tests.explore.tiles import SMALL, Tiles, Tree, scene, shown


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_page_holds_what_became_of_every_token(method: str, layout: str, photo: Path, explorer: Explorer) -> None:
    settings = replace(SMALL, method=method, layout=layout)
    one, second = shown(explorer, photo, settings, Settings(keep=20))
    tree = Tree(view.page([one, second], "keep=1&x=2"))
    (root,) = [a for a in tree.of("div") if a.get("class") == "apet"]
    assert (root["data-query"], root["data-count"]) == ("keep=1&x=2", "2")
    sections = tree.of("section")
    data = json.loads(sections[0]["data-view"])
    assert data["grid"] == [6, 8]
    for key, expected in (("target", "target_position"), ("kept", "kept"), ("basis", "basis")):
        assert data[key] == getattr(one.frame, expected).tolist()
    assert np.allclose(data["residual"], one.frame.residual, rtol=1e-3)
    pictures = [a for a in tree.of("svg") if a.get("role") in ("img", "application")]
    assert len(pictures) == 8
    assert all(a["aria-label"].startswith(photo.name) and a["viewbox"] == "0 0 8 6" for a in pictures)
    assert sum("tabindex" in a for a in pictures) == 2
    assert len([a for a in tree.of("image") if a.get("id") == "photo-photo"]) == 1  # the photo is there once
    (status,) = [a for a in tree.of("p") if a.get("role") == "status"]
    assert status["class"] == "where"


def test_a_path_covers_the_patches_of_its_group_and_no_other() -> None:
    groups = np.random.default_rng(0).integers(-1, 2, 48)
    groups[5:11] = 1  # a run that continues in the next row
    covered = np.full((6, 8), 9)
    for group, path in svg._areas(groups, (6, 8)).items():
        for col, row, wide, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
            assert wide == back
            assert int(col) + int(wide) <= 8
            assert (covered[int(row), int(col) : int(col) + int(wide)] == 9).all()
            covered[int(row), int(col) : int(col) + int(wide)] = group
    assert (covered.ravel() == groups).all()


def embedded(svg: str) -> np.ndarray:
    """Returns the picture in an SVG fragment."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', svg)[1]))).convert("RGB"))


def test_the_heat_map_is_the_residual(photo: Path, explorer: Explorer) -> None:
    (one,) = shown(explorer, photo, SMALL)
    residual = one.frame.residual.copy()
    residual[3] = np.nan
    one = replace(one, frame=replace(one.frame, residual=residual))
    top = view.heat_of([one])
    assert top == np.nanmax(residual)
    heat = embedded(svg.panel(one, "residual", top))[:: svg.HEAT_PIXELS, :: svg.HEAT_PIXELS].astype(float)
    light = (heat @ [0.299, 0.587, 0.114]).ravel()  # the map of colours grows lighter
    order = np.argsort(np.nan_to_num(residual, nan=top), kind="stable")
    assert (np.diff(light[order]) >= -1.0).all()
    assert light[3] == light.max()


def test_rebuilt_is_the_mean_of_each_group(photo: Path, explorer: Explorer) -> None:
    (one,) = shown(explorer, photo, SMALL)
    flat = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5).convert("RGB")
    one = replace(one, picture=flat.resize((8 * files.PATCH, 6 * files.PATCH), Image.NEAREST))
    size = files.SEEN
    found = embedded(svg.panel(one, "rebuilt", 1.0))[size // 2 :: size, size // 2 :: size, 0].ravel()  # [N]
    for target in np.unique(one.frame.target_position):
        group = one.frame.target_position == target
        assert np.abs(found[group].astype(float) - 5 * np.flatnonzero(group).mean()).max() < 12  # JPEG


@pytest.mark.parametrize("kinds", [view.ALL, view.README])
@pytest.mark.parametrize("dark", [False, True])
def test_the_poster_is_one_well_formed_document(kinds: tuple, dark: bool, photo: Path, explorer: Explorer) -> None:
    text = view.poster(shown(explorer, photo, SMALL, Settings("random", 9)), kinds, dark)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "48 → 12 tokens" in root.get("aria-label")
    assert len(root.findall(".//*[@viewBox='0 0 8 6']")) == 2 * len(kinds)
    links = re.findall(r'href="([^"]{1,20})', text)
    assert all(link.startswith(("data:image/", "#photo-photo")) for link in links)
    assert "url(" not in text


def test_downloads(photo: Path, explorer: Explorer) -> None:
    link = Link(SMALL, Settings("uniform", 9))
    numbers = explorer.numbers(str(photo), link)
    assert numbers["name"] == "a <photo> & more.apet.json"
    first, second = json.loads(numbers["text"])
    frame, measure = outcome.compress(explorer.files.get(photo).tokens, 12, outcome.OpArguments(4))
    assert first["merged_into"] == frame[0].target_position.tolist()
    larger = frame[0].residual[:, None] < frame[0].residual
    assert first["rank"] == (1 + larger.sum(1)).tolist()
    assert (first["tokens_in"], first["tokens_out"], first["explained"]) == (48, 12, measure.explained)
    assert (second["method"], second["kept"]) == ("uniform", methods.even((6, 8), 9).tolist())
    picture = explorer.picture(str(photo), link)
    assert picture["name"].endswith(".png")
    ET.fromstring(picture["text"])


# --- the report of `apet compress` ---


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(outcome, "TIMING_SECONDS", 0.0)
    monkeypatch.setattr(encoders, "load", lambda *_, **__: Tiles())
    return


def test_a_report_of_many_files(tmp_path: Path, photo: Path, clip: Path, quick: None) -> None:
    odd = tmp_path / "100% of #1?.png"
    scene(1).save(odd)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "report.html"
    words = (photo, clip, odd, "--keep", 12, "--basis", 4, "--frames", 2, "--out", tmp_path / "pictures")
    found = json.loads(said("compress", *words, "--report", out, "--json"))
    text = out.read_text(encoding="utf-8")
    tree = Tree(text.removeprefix("<!doctype html>"))
    assert len(tree.of("article")) == 3
    links = [a["href"] for a in tree.of("a")]
    assert [link for link in links if link.startswith("#")] == ["#file-1", "#file-2", "#file-3"]
    targets = {(out.parent / unquote(link)).resolve() for link in links if not link.startswith("#")}
    assert targets == {p.resolve() for p in (photo, clip, odd, *(tmp_path / "pictures").iterdir())}
    assert "<photo>" not in text
    assert "a &lt;photo&gt; &amp; more.png" in text
    assert f"{found[1]['explained']:.1%}" in text
    assert "each of 2 frames" in text
    assert not re.search(r'(src|href)="(https?:)?//', text)
    assert len({a["id"] for a in tree.of("image") if "id" in a}) == 3


@pytest.mark.parametrize(
    ("report_name", "words"),
    [
        ("report.pdf", "cannot write a report as 'report.pdf': the name must end in .html"),
        ("nowhere/report.html", "no such folder"),
        (".", "is a directory"),
    ],
)
def test_reports_that_cannot_be_written(tmp_path: Path, photo: Path, quick: None, report_name: str, words: str) -> None:
    before = sorted(tmp_path.iterdir())
    message = failed(
        "compress", photo, "--keep", 9, "--report", tmp_path / report_name, "--out", tmp_path / "picture.png"
    )
    assert words in message
    assert sorted(tmp_path.iterdir()) == before


def test_a_report_is_small(photo: Path, explorer: Explorer) -> None:
    (one,) = shown(explorer, photo, SMALL)
    entry = report.Entry(one, photo, photo, {**vars(one.measure), "images": 1})
    sizes = [len(report.document([entry] * n, photo.parent, "")) for n in (1, 2)]
    assert sizes[1] - sizes[0] < 60_000
