"""The functions of the page of `apet explore`, without a browser."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest
import torch
from apet import encoders, explore
from apet.explore import files, methods, view
from apet.explore.explorer import EMPTY, Explorer
from apet.explore.files import Files
from apet.explore.settings import Link, Settings, read_link
from PIL import Image

import apet_kernels
from tests.command import failed
from tests.explore.tiles import SMALL, Tiles, huge, scene

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


def test_the_page_clears_every_name_of_a_setting_from_its_address() -> None:
    """Else one that went back to its default would stay there."""
    script = (Path(explore.__file__).parent / "page.js").read_text(encoding="utf-8")
    (listed,) = re.findall(r"const names = (\[.*?\]);", script)
    assert json.loads(listed) == [field.name for field in dataclasses.fields(Settings)]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"keep": "0"}, "keep='0' in the address is not a number from 1"),
        ({"keep": "-5"}, "keep='-5'"),
        ({"keep": "1e3"}, "keep='1e3'"),
        ({"keep": "9" * 30}, "keep='999"),
        ({"keep": "٣"}, "keep='٣'"),
        ({"basis": "65"}, "basis='65' in the address is not a number in 0..64"),
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
        target, kept = methods.pooled(grid, keep)
        assert 1 <= len(kept) <= keep
        assert sorted(set(target.tolist())) == kept.tolist()
        assert (target[kept] == kept).all()


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
        torch.testing.assert_close(row, x[0, torch.from_numpy(frame.target_position == position)].mean(0))
    assert 0 < measure.residual_kept < 1
    assert np.allclose(frame.residual, apet_kernels.score(x, 3, select="qr")[0][0])


# --- files ---


def test_a_file_is_read_once_by_ten_users(photo: Path, explorer: Explorer) -> None:
    """Each user moves other sliders, and gets the same result as alone."""
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
        (photo, Link(Settings(keep=5, basis=10, layout="overwrite")), "needs keep &gt; basis"),
        (photo, Link(SMALL, Settings(keep=48, basis=10), 2), "frame=2 is outside 1..1"),
    ):
        for _ in range(2):  # a failure is not cached
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


# --- the command ---


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, photo: Path) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)  # makes its import fail
    assert failed("explore", photo) == 'apet: this needs gradio: pip install "apet-kernels[explore]"\n'


def test_the_command_rejects_before_it_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", functools)  # any module: it must not be used
    monkeypatch.setattr(encoders, "load", lambda *_, **__: Tiles())
    assert "'missing.png' does not exist" in failed("explore", "missing.png")
    assert "--port" in failed("explore", "--port", "99999")
    assert "--max-size" in failed("explore", "--max-size", "0")
