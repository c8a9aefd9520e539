"""How long `apet explore` takes from a key press on a slider to the new picture, in a headless browser.

python -m tests.tools.explore_latency        with a photo and the default encoder; needs Chromium
"""

from __future__ import annotations

import statistics

from apet import encoders
from apet.explore.explorer import Explorer
from apet.explore.files import Files

from tests import browser
from tests.test_cli import ASTRONAUT
from tests.test_explore_browser import MEGABYTES, Page

FIRST, LAST = 65, 94  # tokens kept, one more with every press
WARM = 3  # presses that are not counted

# Resolved with the milliseconds after which the heading has the new number.
WATCH = """(tokens) => {
  const begin = performance.now();
  window.watched = new Promise((done) => {
    const look = () =>
      document.querySelector("h2 b")?.textContent === `${tokens} tokens`
        ? done(performance.now() - begin)
        : requestAnimationFrame(look);
    look();
  });
}"""


def main() -> None:
    """Measures and prints."""
    explorer = Explorer(Files(encoders.load(), 4))
    with browser.served(explorer, ASTRONAUT, MEGABYTES) as address, browser.browser() as chromium:
        tab = Page(chromium, address).tab
        tab.wait_for_selector("section[data-view]")
        slider = tab.get_by_label("range slider for Tokens kept")
        slider.focus()
        times = []
        for tokens in range(FIRST, LAST + 1):
            tab.evaluate(WATCH, tokens)
            slider.press("ArrowRight")
            times.append(tab.evaluate("() => window.watched"))
        counted = times[WARM:]
        print(f"{len(counted)} presses: median {statistics.median(counted):.0f} ms, at most {max(counted):.0f} ms")


if __name__ == "__main__":
    main()
