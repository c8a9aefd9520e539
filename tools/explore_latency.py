"""Measures the time from a key press on a slider of `apet explore` to the new picture, in a headless browser.

python -m tools.explore_latency        with a photo and the default encoder; needs Chromium
"""

from __future__ import annotations

import statistics
from typing import Any

from apet import encoders
from apet.explore.explorer import Explorer
from apet.explore.files import Files

from tests import browser
from tests.explore.test_browser import MEGABYTES, Page
from tests.photos import ASTRONAUT

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
        for name, query in (("one setting", ""), ("two settings side by side", "?b_keep=64&b_method=uniform")):
            times = presses(Page(chromium, address, query=query).tab)
            print(
                f"{name}, {len(times)} presses: median {statistics.median(times):.0f} ms, at most {max(times):.0f} ms"
            )


def presses(tab: Any) -> list[float]:
    """Returns the milliseconds of each press."""
    slider = tab.get_by_label("range slider for Tokens kept").first
    slider.focus()
    times = []
    for tokens in range(FIRST, LAST + 1):
        tab.evaluate(WATCH, tokens)
        slider.press("ArrowRight")
        times.append(tab.evaluate("() => window.watched"))
    return times[WARM:]


if __name__ == "__main__":
    main()
