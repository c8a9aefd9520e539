"""The functions behind the page, independent of Gradio: each takes a file and the settings of an address."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from html import escape
from pathlib import Path

from apet import ApetError
from apet.explore import methods, view
from apet.explore.asking import Asker
from apet.explore.files import Encoded, Files
from apet.explore.settings import Link, Settings
from apet.explore.svg import Shown
from apet.hub import first_line

EMPTY = "Drop a photo or a short clip to see which of its tokens are kept. It does not leave this machine."


class Explorer:
    """Draws files with settings. Threads may share it: it stores files that were read and encoded, but no state of a
    user."""

    def __init__(self, files: Files, asker: Asker | None = None) -> None:
        self.files = files
        self.asker = asker

    def shown(self, path: Path, link: Link) -> list[Shown]:
        """Computes one or two settings of a photo, or of a frame of a clip.

        Raises: ApetError, if the file cannot be read or a setting is not possible.
        """
        found = self.files.get(path)
        if not 1 <= link.frame <= len(found.photos):
            raise ApetError(f"frame={link.frame} is outside 1..{len(found.photos)}, the frames taken from {found.name}")
        return [_shown(found, link.frame - 1, settings) for settings in _settings(link)]

    def page(self, path: str | None, link: Link) -> str:
        """Returns the HTML of the pictures, or of an error message."""
        if path is None:
            return view.message(EMPTY, error=False)
        try:
            return view.page(self.shown(Path(path), link), link.query())
        except ApetError as error:
            return view.message(_without_folder(error, path))

    def picture(self, path: str, link: Link) -> dict[str, str]:
        """Returns a file for the browser to save: the pictures as SVG, which page.js converts to PNG."""
        shown = self.shown(Path(path), link)
        return {"name": f"{Path(shown[0].name).stem}.apet.png", "text": view.poster(shown)}

    def numbers(self, path: str, link: Link) -> dict[str, str]:
        """Returns a file for the browser to save: all numbers, as JSON."""
        shown = self.shown(Path(path), link)
        name = f"{Path(shown[0].name).stem}.apet.json"
        return {"name": name, "text": json.dumps([view.numbers(one) for one in shown], indent=1)}

    def answers(self, path: str | None, link: Link, prompt: str) -> Iterator[str]:
        """Yields the HTML of all answers so far, once after each answer."""
        if self.asker is None or path is None:
            yield view.message("there is no photo or clip to ask about")
            return
        done = ""
        try:
            for answer in self.asker.ask(Path(path), prompt, _settings(link)):
                text = escape(answer.text) or "<em>(an empty answer)</em>"
                done += f"<dt>{escape(answer.title)}</dt><dd>{text}</dd>"
                yield f'<dl class="apet answers">{done}</dl>'
        except ApetError as error:
            yield f'<dl class="apet answers">{done}</dl>' * bool(done) + view.message(_without_folder(error, path))


@functools.lru_cache(maxsize=16)
def _shown(found: Encoded, n: int, settings: Settings) -> Shown:
    """Compresses frame n. The result is cached, since one of two settings usually stays the same while the other is
    changed."""
    try:
        frame, measure = methods.compress(found.tokens[n : n + 1], found.grid, settings)
    except (ValueError, RuntimeError) as error:  # the op's own message
        raise ApetError(f"{settings}: {first_line(error)}") from error
    time = found.times[n] if found.times else None
    return Shown("photo", found.name, found.photos[n], found.views[n], found.grid, settings, frame, measure, time)


def _without_folder(error: ApetError, path: str) -> str:
    """Returns the message with the bare name of an uploaded file: the folder on the server means nothing to the
    user."""
    return str(error).replace(path, Path(path).name)


def _settings(link: Link) -> list[Settings]:
    return [link.first] if link.second is None else [link.first, link.second]
