"""The page of `apet explore` in a headless browser, with the default encoder."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests import browser
from tests.explore.tiles import huge
from tests.photos import ASTRONAUT, BIKES, CHELSEA

MISSING = browser.missing()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(MISSING is not None, reason=str(MISSING))]
WAIT = 60_000  # milliseconds, on a machine that is busy with other things
MEGABYTES = 4


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Serves a page with a photo and yields its address; the page must not reach any other host."""
    from apet import encoders
    from apet.explore.explorer import Explorer
    from apet.explore.files import Files

    with (
        browser.connections() as outside,
        browser.served(Explorer(Files(encoders.load(), 4)), ASTRONAUT, MEGABYTES) as url,
    ):
        yield url
    assert outside == []


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser.browser() as one:
        yield one


class Page:
    """A browser tab with the page. It fails if the page, or a script, contacts another host."""

    def __init__(self, chromium: Any, address: str, width: int = 1280, theme: str = "light", query: str = "") -> None:
        self.context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=theme)
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(WAIT)
        self.hosts: set[str] = set()
        self.errors: list[str] = []
        self.tab.on("request", lambda request: self.hosts.add(urlsplit(request.url).hostname or "127.0.0.1"))
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.goto(address + query)
        self.tab.wait_for_selector("section[data-view]")

    def __enter__(self) -> Page:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            assert self.hosts == {"127.0.0.1"}
            assert self.errors == []
        self.context.close()

    def view(self, section: int = 0) -> dict:
        return json.loads(self.tab.locator("section[data-view]").nth(section).get_attribute("data-view"))

    def until(self, condition: str, *given: object) -> None:
        """Waits until a JavaScript expression of `given` holds."""
        self.tab.wait_for_function(f"(given) => {condition}", arg=list(given))

    def keep(self, count: int, label: str = "Tokens kept") -> None:
        box = self.tab.get_by_label(f"number input for {label}")
        box.fill(str(count))
        box.press("Enter")

    def upload(self, *paths: Path) -> None:
        remove = self.tab.locator("#file").get_by_label(re.compile("Clear|Remove", re.I))
        if remove.count():
            remove.first.click()
        self.tab.locator("#file input[type=file]").set_input_files(paths)

    def where(self) -> str:
        return self.tab.locator(".where").inner_text()


@pytest.fixture
def page(chromium: Any, address: str) -> Iterator[Page]:
    with Page(chromium, address) as one:
        yield one


def test_moving_a_slider(page: Page) -> None:
    assert len(page.view()["kept"]) == 64
    page.keep(100)
    page.until("document.querySelector('h2 b')?.textContent === '100 tokens'")
    assert len(page.view()["kept"]) == 100
    assert "keep=100" in page.tab.url
    slider = page.tab.get_by_label("range slider for Tokens kept")
    slider.focus()
    slider.press("ArrowRight")
    page.until("document.querySelector('h2 b')?.textContent === '101 tokens'")
    page.tab.get_by_label("overwrite", exact=True).first.click()
    page.until("location.search.includes('layout=overwrite')")
    page.keep(5)
    page.tab.get_by_role("alert").get_by_text("needs keep > basis").wait_for()
    page.keep(64)
    page.tab.wait_for_selector("section[data-view]")


def test_pointing_at_a_patch(page: Page) -> None:
    view = page.view()
    at = next(i for i, target in enumerate(view["target"]) if target not in (-1, i))
    rows, cols = view["grid"]
    row, col = divmod(at, cols)
    picture = page.tab.locator("svg.residual")
    picture.scroll_into_view_if_needed()
    box = picture.bounding_box()
    place = {"x": (col + 0.5) * box["width"] / cols, "y": (row + 0.5) * box["height"] / rows}
    picture.hover(position=place)
    target_row, target_col = divmod(view["target"][at], cols)
    words = f"Row {row + 1}, column {col + 1}: merged into row {target_row + 1}, column {target_col + 1}"
    page.until("document.querySelector('.where')?.textContent.startsWith(given[0])", words)
    for kind in ("kept", "merged", "rebuilt", "residual"):
        assert page.tab.locator(f"svg.{kind} .cursor .here").get_attribute("x") == str(col)
        assert page.tab.locator(f"svg.{kind} .cursor .same").count() == view["target"].count(view["target"][at])
    picture.click(position=place)
    page.tab.mouse.move(5, 5)
    assert page.tab.locator("svg.kept .cursor .here").count() == 1  # the click keeps it there
    page.keep(128)
    page.until("document.querySelector('h2 b')?.textContent === '128 tokens'")
    assert page.where().startswith(f"Row {row + 1}, column {col + 1}: ")  # and by another setting


def test_arrow_keys(page: Page) -> None:
    picture = page.tab.locator("svg.kept")
    picture.focus()
    outline = picture.evaluate("node => getComputedStyle(node).outlineStyle")
    for key, words in (("ArrowRight", "Row 1, column 1:"), ("ArrowRight", "Row 1, column 2:"), ("ArrowDown", "Row 2,")):
        picture.press(key)
        assert page.where().startswith(words)
    assert outline != "none" or picture.evaluate("node => getComputedStyle(node).outlineStyle") != "none"
    picture.press("Escape")
    assert page.tab.locator(".cursor *").count() == 0


def test_two_settings_and_the_link_to_them(page: Page, chromium: Any, address: str) -> None:
    page.tab.get_by_label("Compare with a second setting").check()
    page.until("document.querySelectorAll('section[data-view]').length === 2")
    page.keep(30, "Tokens kept, B")
    page.until("document.querySelectorAll('h2 b')[1].textContent === '30 tokens'")
    left, right = (page.tab.locator("section").nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"]
    assert right["x"] >= left["x"] + left["width"]
    page.tab.locator("svg.kept").first.focus()
    page.tab.keyboard.press("ArrowRight")
    assert re.match(r"Row 1, column 1: A: .* · B: ", page.where())
    query = "?" + urlsplit(page.tab.url).query
    assert "b_method=uniform" in query
    with Page(chromium, address, query=query) as other:
        assert [other.view(i) for i in (0, 1)] == [page.view(i) for i in (0, 1)]


def test_a_link_with_values_that_are_none(chromium: Any, address: str) -> None:
    with Page(chromium, address, query="?keep=many&basis=7&frame=9") as page:
        page.tab.get_by_text("keep='many' in the address is not a number").wait_for()
        assert (len(page.view()["kept"]), len(page.view()["basis"])) == (64, 7)


def test_other_files(page: Page, tmp_path: Path) -> None:
    page.upload(CHELSEA)
    page.until("JSON.parse(document.querySelector('section')?.dataset.view ?? '{}').grid?.[1] > 24")
    page.upload(BIKES)
    page.tab.get_by_label("number input for Frame of the clip").wait_for()
    page.until("document.querySelector('.where')?.textContent.startsWith('Frame at ')")
    first = page.view()
    box = page.tab.get_by_label("number input for Frame of the clip")
    box.fill("3")
    box.press("Enter")
    page.until("location.search.includes('frame=3')")
    assert page.view() != first


@pytest.mark.parametrize("kind", ["broken", "huge", "text"])
def test_files_that_will_not_do(page: Page, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"{kind}.png"
    if kind == "huge":
        huge(path)
    else:
        path.write_bytes(ASTRONAUT.read_bytes()[:5000] if kind == "broken" else b"no picture")
    page.upload(path)
    alert = page.tab.locator("[role=alert]", has_text=f"{kind}.png")
    alert.wait_for()
    assert alert.count() == 1
    if kind == "huge":
        assert "100.0 megapixels" in alert.inner_text()
    page.upload(CHELSEA)  # the page continues with it
    page.tab.wait_for_selector("section[data-view]")


def test_files_over_the_limit(page: Page, tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(bytes((MEGABYTES + 1) * 1024 * 1024))
    page.upload(path)
    page.tab.get_by_text(re.compile("exceed|too large|size", re.I)).first.wait_for()


def test_downloads(page: Page) -> None:
    with page.tab.expect_download() as waiting:
        page.tab.get_by_role("button", name="Picture (PNG)").click()
    picture = Image.open(io.BytesIO(Path(waiting.value.path()).read_bytes()))
    assert waiting.value.suggested_filename == "astronaut.apet.png"
    assert picture.size[0] == 2560
    assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 10_000
    with page.tab.expect_download() as waiting:
        page.tab.get_by_role("button", name="Numbers (JSON)").click()
    (numbers,) = json.loads(Path(waiting.value.path()).read_text())
    assert numbers["merged_into"] == page.view()["target"]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_looks(chromium: Any, address: str, width: int, theme: str) -> None:
    with Page(chromium, address, width, theme, "?b_keep=32") as page:
        assert page.tab.evaluate("document.documentElement.scrollWidth") <= width
        paper, ink = page.tab.evaluate(
            "['--paper', '--ink'].map(n => getComputedStyle(document.querySelector('.apet')).getPropertyValue(n))"
        )
        assert (paper.strip() < ink.strip()) == (theme == "dark")
        for picture in page.tab.locator("svg.patches").all():
            box = picture.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width
            assert picture.get_attribute("aria-label")
        assert browser.inaccessible(page.tab) == []


def test_every_control_has_a_name(page: Page) -> None:
    unnamed = page.tab.evaluate(
        """() => [...document.querySelectorAll('input, select, textarea, button')]
            .filter(node => node.offsetParent && !node.labels?.length && !node.getAttribute('aria-label')
              && !node.getAttribute('aria-labelledby') && !node.textContent.trim() && !node.title)
            .map(node => node.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []


@pytest.mark.parametrize("count", [3, pytest.param(10, marks=pytest.mark.matrix)])
def test_tabs(chromium: Any, address: str, count: int) -> None:
    """Each tab has its own settings and moves its slider before the others have their result; each shows its own."""
    with contextlib.ExitStack() as tabs:
        pages = [tabs.enter_context(Page(chromium, address, query=f"?keep={20 + n}")) for n in range(count)]
        assert [len(page.view()["kept"]) for page in pages] == [20 + n for n in range(count)]
        for base in (40, 60):
            for n, page in enumerate(pages):
                page.keep(base + n)
            for n, page in enumerate(pages):
                page.until("document.querySelector('h2 b')?.textContent === given[0]", f"{base + n} tokens")
            assert [len(page.view()["kept"]) for page in pages] == [base + n for n in range(count)]
