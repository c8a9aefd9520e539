"""What the page of `apet explore` shows and does, without a browser, and the HTML report of `apet compress`."""

from __future__ import annotations

import base64
import functools
import html.parser
import io
import json
import re
import struct
import sys
import threading
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl, unquote

import numpy as np
import pytest
import torch
from apet import encoders, outcome
from apet.explore import files, methods, report, view
from apet.explore.explorer import EMPTY, Explorer
from apet.explore.files import Files
from apet.explore.settings import METHODS, Link, Settings, read_link
from PIL import Image

import apet_kernels
from tests.command import failed, said

SMALL = Settings(keep=12, basis=4)


class Tiles:
    """An encoder of 6 x 8 patches (of a 4:3 photo) whose tokens are the pixels, shuffled by a matrix."""

    name, layer = "tiles", 1

    def __init__(self) -> None:
        self.mix = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
        self.calls: list[int] = []

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return (6, 8) if width > height else (8, 6)

    def view(self, photo: Image.Image, pixels: int = 4) -> Image.Image:
        rows, cols = self.grid(*photo.size)
        return photo.resize((cols * pixels, rows * pixels))

    def encode(self, views: list[Image.Image]) -> torch.Tensor:
        self.calls.append(len(views))
        x = torch.from_numpy(np.stack([np.asarray(v, np.float32) for v in views])) / 255  # [B, H, W, 3]
        b, h, w, _ = x.shape
        patches = x.view(b, h // 4, 4, w // 4, 4, 3).transpose(2, 3).reshape(b, -1, 48)
        return patches @ self.mix  # [B, N, 24]


def scene(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.BICUBIC)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a <photo> & more.png"
    scene().save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(12):
            file.mux(stream.encode(av.VideoFrame.from_image(scene(i))))
        file.mux(stream.encode(None))
    return path


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(Files(Tiles(), 3))


def shown(explorer: Explorer, path: Path, *settings: Settings) -> list[view.Shown]:
    return explorer.shown(path, Link(*settings))


# --- settings and addresses ---


@pytest.mark.parametrize(
    "link",
    [
        Link(),
        Link(SMALL, None, 3),
        Link(Settings("random", 7), Settings("apet", 64, 64, "append", "qr"), 2),
        Link(Settings(), Settings()),
    ],
)
def test_an_address_holds_the_settings(link: Link) -> None:
    assert read_link(dict(parse_qsl(link.query()))) == (link, [])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"keep": "0"}, "keep='0' in the address is no number from 1"),
        ({"keep": "-5"}, "keep='-5'"),
        ({"keep": "1e3"}, "keep='1e3'"),
        ({"keep": "9" * 30}, "keep='999"),
        ({"keep": "٣"}, "keep='٣'"),
        ({"basis": "65"}, "basis='65' in the address is no number in 0..64"),
        ({"b_layout": "<b>"}, "b_layout='<b>' in the address is none of inplace, overwrite, append"),
        ({"select": ""}, "select='' in the address is none of fps, qr"),
        ({"method": "magic"}, "method='magic' in the address is none of apet, uniform"),
        ({"frame": "x"}, "frame='x' in the address"),
    ],
)
def test_what_an_address_holds_is_checked(query: dict[str, str], message: str) -> None:
    link, messages = read_link(query)
    assert len(messages) == 1
    assert messages[0].startswith(message)
    assert link == Link(second=Settings() if "b_layout" in query else None)


def test_other_names_in_an_address_are_left_alone() -> None:
    assert read_link({"__theme": "dark", "keep": "9"}) == (Link(Settings(keep=9)), [])


# --- methods ---


@pytest.mark.parametrize("grid", [(24, 24), (1, 9), (9, 1), (5, 7), (16, 36), (1, 1)])
def test_baselines_keep_what_they_say(grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    for keep in {min(keep, n) for keep in (1, 2, 3, n // 3 + 1, max(n - 1, 1), n)}:
        for kept in (methods.even(grid, keep), methods.drawn(n, keep)):
            assert kept.tolist() == sorted(set(kept.tolist()))
            assert len(kept) == keep
            assert 0 <= kept[0] <= kept[-1] < n
        goal, kept = methods.pooled(grid, keep)
        assert 1 <= len(kept) <= keep
        assert sorted(set(goal.tolist())) == kept.tolist()
        assert (goal[kept] == kept).all()


def test_an_even_grid_is_even() -> None:
    assert methods.even((4, 4), 4).tolist() == [5, 7, 13, 15]
    assert methods.pooled((24, 24), 64)[0].view(24, 24)[:3, :3].unique().tolist() == [25]  # a block's middle
    assert len(methods.pooled((24, 24), 64)[1]) == 64


def test_pooling_averages_its_blocks() -> None:
    x = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(0))
    frame, measure = methods.compress(x, (6, 6), Settings("pooling", 9, 3))
    blocks = x[0].view(3, 2, 3, 2, 8).mean((1, 3), keepdim=True).expand(3, 2, 3, 2, 8).reshape(36, 8).double()
    lost = (x[0].double() - blocks).square().sum() / (x[0].double() - x[0].double().mean(0)).square().sum()
    assert measure.tokens_out == len(frame.kept) == 9
    assert measure.explained == pytest.approx(1 - float(lost), rel=1e-5)


@pytest.mark.parametrize("method", ["uniform", "random"])
def test_baselines_merge_as_the_op_does(method: str) -> None:
    x = torch.randn(1, 36, 8, generator=torch.Generator().manual_seed(0))
    frame, measure = methods.compress(x, (6, 6), Settings(method, 9, 3))
    rows = apet_kernels.merge(x, torch.from_numpy(frame.kept)[None])[0]
    for row, position in zip(rows, frame.kept, strict=True):
        torch.testing.assert_close(row, x[0, torch.from_numpy(frame.goal == position)].mean(0))
    assert 0 < measure.residual_kept < 1
    assert np.allclose(frame.residual, apet_kernels.score(x, 3)[0][0])


# --- files ---


def test_a_file_is_read_once_by_ten_users(photo: Path, explorer: Explorer) -> None:
    """Each moves sliders of his own, and gets what he would get alone."""
    wanted = [Link(replace(SMALL, keep=keep)) for keep in range(8, 18)]
    start = threading.Barrier(len(wanted))

    def use(link: Link) -> list[str]:
        start.wait()
        return [explorer.page(str(photo), link) for _ in range(3)]

    with ThreadPoolExecutor(len(wanted)) as pool:
        found = list(pool.map(use, wanted))
    assert explorer.files.encoder.calls == [1]
    alone = Explorer(Files(Tiles(), 3))
    for link, pages in zip(wanted, found, strict=True):
        assert pages == [alone.page(str(photo), link)] * 3


def test_a_known_file_does_not_wait_for_another(photo: Path, tmp_path: Path) -> None:
    encoder = Tiles()
    explorer = Explorer(Files(encoder, 3))
    explorer.page(str(photo), Link(SMALL))
    slow = tmp_path / "slow.png"
    scene(1).save(slow)
    reached, go_on, plain = threading.Event(), threading.Event(), encoder.encode

    def encode(views: list[Image.Image]) -> torch.Tensor:
        reached.set()
        assert go_on.wait(60)
        return plain(views)

    encoder.encode = encode
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(explorer.page, str(slow), Link(SMALL))
        assert reached.wait(60)
        assert "data-view" in explorer.page(str(photo), Link(SMALL))
        assert not other.done()
        go_on.set()
        assert "data-view" in other.result(60)


def test_files_are_forgotten_and_read_again(photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "REMEMBERED", 1)
    explorer = Explorer(Files(Tiles(), 3))
    other = tmp_path / "other.png"
    scene(1).save(other)
    before = explorer.page(str(photo), Link(SMALL))
    explorer.page(str(other), Link(SMALL))
    assert explorer.page(str(photo), Link(SMALL)) == before
    assert len(explorer.files.encoder.calls) == 3


def test_a_changed_file_is_read_again(photo: Path, explorer: Explorer) -> None:
    before = explorer.page(str(photo), Link(SMALL))
    scene(3).resize((200, 150)).save(photo)
    assert explorer.page(str(photo), Link(SMALL)) != before


def huge(path: Path) -> None:
    """A PNG whose head says 100 megapixels, and little else."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


def test_what_is_wrong_is_one_message_on_the_page(tmp_path: Path, photo: Path, explorer: Explorer) -> None:
    broken, text, large = tmp_path / "half.png", tmp_path / "text <b>.png", tmp_path / "large.png"
    broken.write_bytes(photo.read_bytes()[:2000])
    text.write_text("no picture", encoding="utf-8")
    huge(large)
    for path, link, words in (
        (broken, Link(SMALL), "cannot read the photo"),
        (text, Link(SMALL), "neither a photo nor a video"),
        (tmp_path / "gone.png", Link(SMALL), "cannot read gone.png: No such file"),
        (large, Link(SMALL), "large.png has 100.0 megapixels, more than 80: scale it down first"),
        (photo, Link(Settings(keep=49)), "keep=49 is outside 1..48"),
        (photo, Link(Settings("random", 49)), "keep=49 is outside 1..48"),
        (photo, Link(Settings(keep=5, layout="overwrite")), "needs keep &gt; basis"),
        (photo, Link(SMALL, Settings(keep=48, basis=10), 2), "frame=2 is outside 1..1"),
    ):
        for _ in range(2):  # what failed once is no better remembered
            page = explorer.page(str(path), link)
            assert 'role="alert"' in page
            assert words in page, page
            assert page.count("<p") == 1
            assert "<b>" not in page
            assert str(tmp_path) not in page
    assert EMPTY in explorer.page(None, Link())


def test_more_tokens_than_can_be_drawn(photo: Path) -> None:
    encoder = Tiles()
    encoder.grid = lambda width, height: (65, 64)
    assert "would become 4160 tokens, more than 4096" in Explorer(Files(encoder, 3)).page(str(photo), Link(SMALL))


def test_frames_of_a_clip(clip: Path, explorer: Explorer) -> None:
    times = []
    for number in (1, 2, 3):
        (one,) = explorer.shown(clip, Link(SMALL, None, number))
        tokens = explorer.files.get(clip).tokens[number - 1 : number]
        assert one.frame.kept.tolist() == apet_kernels.compress(tokens, 12, 4)[1][0].tolist()
        times.append(one.time)
        assert f"Frame at {one.time:.2f} s." in view.page([one])
    assert times == sorted(set(times))
    assert "frame=4 is outside 1..3" in explorer.page(str(clip), Link(SMALL, None, 4))


# --- the drawing ---


class Tree(html.parser.HTMLParser):
    """Fails where tags do not match; collects elements with their attributes."""

    VOID = ("meta", "path", "rect", "image", "use", "circle", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("layout", ["inplace", "overwrite", "append"])
def test_the_page_holds_what_became_of_every_token(method: str, layout: str, photo: Path, explorer: Explorer) -> None:
    settings = replace(SMALL, method=method, layout=layout)
    one, second = shown(explorer, photo, settings, Settings(keep=20))
    tree = Tree(view.page([one, second], "keep=1&x=2"))
    (root,) = [a for a in tree.of("div") if a.get("class") == "apet"]
    assert (root["data-query"], root["data-count"]) == ("keep=1&x=2", "2")
    sections = tree.of("section")
    data = json.loads(sections[0]["data-view"])
    assert data["grid"] == [6, 8]
    for key, expected in (("goal", one.frame.goal), ("kept", one.frame.kept), ("basis", one.frame.basis)):
        assert data[key] == expected.tolist()
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
    groups[5:11] = 1  # a run that goes on in the next row
    covered = np.full((6, 8), 9)
    for group, path in view._areas(groups, (6, 8)).items():
        for col, row, wide, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", path):
            assert wide == back
            assert int(col) + int(wide) <= 8
            assert (covered[int(row), int(col) : int(col) + int(wide)] == 9).all()
            covered[int(row), int(col) : int(col) + int(wide)] = group
    assert (covered.ravel() == groups).all()


def embedded(svg: str) -> np.ndarray:
    """The picture in an SVG fragment."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)"', svg)[1]))).convert("RGB"))


def test_the_heat_map_is_the_residual(photo: Path, explorer: Explorer) -> None:
    (one,) = shown(explorer, photo, SMALL)
    residual = one.frame.residual.copy()
    residual[3] = np.nan
    one = replace(one, frame=replace(one.frame, residual=residual))
    top = view.heat_of([one])
    assert top == np.nanmax(residual)
    heat = embedded(view.panel(one, "residual", top))[:: view.HEAT_PIXELS, :: view.HEAT_PIXELS].astype(float)
    light = (heat @ [0.299, 0.587, 0.114]).ravel()  # the map of colours grows lighter
    order = np.argsort(np.nan_to_num(residual, nan=top), kind="stable")
    assert (np.diff(light[order]) >= -1.0).all()
    assert light[3] == light.max()


def test_rebuilt_is_the_mean_of_each_group(photo: Path, explorer: Explorer) -> None:
    (one,) = shown(explorer, photo, SMALL)
    flat = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5).convert("RGB")
    one = replace(one, picture=flat.resize((8 * files.PATCH, 6 * files.PATCH), Image.NEAREST))
    size = files.SEEN
    found = embedded(view.panel(one, "rebuilt", 1.0))[size // 2 :: size, size // 2 :: size, 0].ravel()  # [N]
    for target in np.unique(one.frame.goal):
        group = one.frame.goal == target
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
    assert first["merged_into"] == frame[0].goal.tolist()
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


# --- the command ---


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # importing it fails now
    assert failed("explore", photo) == 'apet: this needs gradio: pip install "apet-kernels[explore]"\n'


def test_the_command_rejects_before_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", functools)  # any module: it must not come so far
    monkeypatch.setattr(encoders, "load", lambda *_, **__: Tiles())
    assert "'missing.png' does not exist" in failed("explore", "missing.png")
    assert "--port" in failed("explore", "--port", "99999")
    assert "--max-size" in failed("explore", "--max-size", "0")
