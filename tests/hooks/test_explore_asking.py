"""The answers of `apet explore --model`: with all tokens and with the kept ones, independent of other users."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import apet
import pytest
from apet import ApetError, encoders
from apet.explore.asking import Asker
from apet.explore.explorer import Explorer
from apet.explore.files import Files
from apet.explore.settings import Link, Settings
from PIL import Image
from processors import answer
from test_picture import scene

from tests import browser

NEW = 4
PROMPT = "<image>\nw3 w4"


@pytest.fixture(scope="module")
def asker(llava: Path) -> Asker:
    return Asker(str(llava), 3, NEW, "auto", "cpu")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(scene(80, 60)).save(path)
    return path


def test_answers_are_those_of_the_model(asker: Asker, llava: Path, photo: Path) -> None:
    settings = [Settings(keep=12), Settings("random", 12), Settings(keep=14, layout="overwrite", select="qr", basis=4)]
    found = list(asker.ask(photo, "w3 w4", settings))
    assert found[0].title == "All tokens"
    assert found[0].text == answer(llava, [photo], PROMPT, NEW)
    assert found[1].text == answer(llava, [photo], PROMPT, NEW, keep=12)
    assert found[1].title == f"{settings[0]}: 36 → 12 visual tokens"
    assert "with ApET, not with 'Random, merged'" in found[2].text
    assert found[3].text == answer(llava, [photo], PROMPT, NEW, keep=14, layout="overwrite", select="qr", basis=4)
    assert apet.options(asker._model) is None


def test_ten_users_ask_at_once(asker: Asker, photo: Path) -> None:
    wanted = [[Settings(keep=keep)] for keep in range(11, 21)]
    alone = [list(asker.ask(photo, "w5 w6", settings)) for settings in wanted]
    with ThreadPoolExecutor(10) as pool:
        found = list(pool.map(lambda settings: list(asker.ask(photo, "w5 w6", settings)), wanted))
    assert found == alone
    assert apet.options(asker._model) is None


def test_what_is_wrong_is_one_message(asker: Asker, photo: Path, tmp_path: Path) -> None:
    explorer = Explorer(None, asker)
    *_, last = explorer.answers(str(photo), Link(Settings(keep=5, basis=10, layout="overwrite")), "w3")
    assert last.count('role="alert"') == 1
    assert "layout=&#x27;overwrite&#x27; needs keep &gt; basis" in last
    assert "All tokens" in last  # that answer stays
    assert "the question is empty" in list(explorer.answers(str(photo), Link(), " "))[-1]
    assert "no photo or clip" in list(explorer.answers(None, Link(), "w3"))[-1]
    (tmp_path / "text.png").write_text("no picture")
    assert "neither a photo nor a video" in list(explorer.answers(str(tmp_path / "text.png"), Link(), "w3"))[-1]
    assert apet.options(asker._model) is None


def test_a_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ApetError, match="cannot load model"):
        Asker(str(tmp_path), 3, NEW, "auto", "cpu")


@pytest.mark.slow
@pytest.mark.skipif(browser.missing() is not None, reason=str(browser.missing()))
def test_asking_on_the_page(asker: Asker, llava: Path, photo: Path) -> None:
    explorer = Explorer(Files(encoders.load(), 3), asker)
    with browser.served(explorer, photo) as address, browser.browser() as chromium:
        tab = chromium.new_page()
        tab.set_default_timeout(180_000)
        tab.goto(f"{address}?keep=12")
        tab.wait_for_selector("section[data-view]")
        tab.get_by_label(f"Ask {asker.name}").fill("w3 w4")
        tab.get_by_role("button", name="Ask with all tokens").click()
        tab.locator("dd").nth(1).wait_for()
        found = [text.strip() for text in tab.locator("dd").all_inner_texts()]
    assert found == [answer(llava, [photo], PROMPT, NEW), answer(llava, [photo], PROMPT, NEW, keep=12)]
