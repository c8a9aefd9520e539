"""Draws the README's picture and the screenshots of docs/explore.md again:

python -m tools.explore_pictures
"""

from __future__ import annotations

import io
import tempfile
from pathlib import Path
from typing import Any

import skimage
from apet import encoders
from apet.explore import view
from apet.explore.explorer import Explorer
from apet.explore.files import Files
from apet.explore.settings import Link
from PIL import Image

from tests import browser

DOCS = Path(__file__).parents[1] / "docs"
ASTRONAUT = Path(skimage.__path__[0], "data", "astronaut.png")
THEMES = ("light", "dark")
WAIT = 180_000  # milliseconds, on a machine that is busy with other things


def readme(explorer: Explorer, chromium: Any) -> None:
    shown = explorer.shown(ASTRONAUT, Link())
    with tempfile.TemporaryDirectory() as folder:
        for theme in THEMES:
            path = Path(folder, f"{theme}.svg")
            path.write_text(view.poster(shown, view.README, dark=theme == "dark"), encoding="utf-8")
            tab = chromium.new_page(viewport={"width": 1280, "height": 600}, device_scale_factor=1.5)
            tab.set_default_timeout(WAIT)
            tab.goto(path.as_uri())
            picture = Image.open(io.BytesIO(tab.locator("svg.poster").screenshot())).convert("RGB")
            picture.save(DOCS / f"kept-{theme}.jpg", quality=88, optimize=True)
            tab.close()


def screenshots(explorer: Explorer, chromium: Any) -> None:
    with browser.served(explorer, ASTRONAUT) as address:
        for width, height in ((1280, 900), (390, 844)):
            for theme in THEMES:
                context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                tab = context.new_page()
                tab.set_default_timeout(WAIT)
                tab.goto(f"{address}?b_method=uniform" if (width, theme) == (1280, "dark") else address)
                tab.wait_for_selector("section[data-view]")
                picture = tab.locator("svg.merged").first
                picture.scroll_into_view_if_needed()
                box = picture.bounding_box()
                picture.click(position={"x": box["width"] * 0.3, "y": box["height"] * 0.86})  # her left sleeve
                if width == 390:
                    tab.locator("#save").scroll_into_view_if_needed()
                    tab.locator(".where").scroll_into_view_if_needed()
                else:
                    tab.evaluate("window.scrollTo(0, 0)")
                tab.wait_for_timeout(500)  # until the page's transitions have ended
                picture = Image.open(io.BytesIO(tab.screenshot())).convert("RGB").quantize(256)
                picture.save(DOCS / f"explore-{width}-{theme}.png", optimize=True)
                context.close()


def main() -> None:
    explorer = Explorer(Files(encoders.load(), 8))
    with browser.browser() as chromium:
        readme(explorer, chromium)
        screenshots(explorer, chromium)


if __name__ == "__main__":
    main()
