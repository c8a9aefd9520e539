"""A setting of the page, and the query of an address that holds one or two settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal
from urllib.parse import urlencode

from apet_kernels.options import LAYOUTS, MAX_BASIS, MAX_REFINE, SELECTS, Options

METHODS = {
    "apet": "ApET",
    "uniform": "Even grid, merged",
    "random": "Random, merged",
    "pooling": "Average pooling",
}
CHOICES: dict[str, tuple[str, ...]] = {"method": tuple(METHODS), "layout": LAYOUTS, "select": SELECTS}
LEAST = {"keep": 1, "basis": 0, "refine": 0}
MOST = {"basis": MAX_BASIS, "refine": MAX_REFINE}
SECOND = "b_"  # the prefix of the second setting's names in an address


@dataclass(frozen=True)
class Settings:
    """How the tokens of an image are compressed. Only ApET uses the fields after keep, except that the residual that is
    shown uses basis with every method. basis=0 stands for as many as are kept."""

    method: str = "apet"
    keep: int = 64
    basis: int = 0
    layout: str = Options.layout
    select: str = Options.select
    refine: int = Options.refine

    @property
    def own_basis(self) -> int | Literal["keep"]:
        """`basis` in the form of `apet.patch`."""
        return self.basis or "keep"

    def __str__(self) -> str:
        words = f"{METHODS[self.method]}, keep {self.keep}"
        if self.method != "apet":
            return words
        refined = f", refine {self.refine}" if self.refine else ""
        return f"{words}, basis {self.own_basis}, {self.layout}, {self.select}{refined}"


DEFAULT = Settings()


@dataclass(frozen=True)
class Link:
    """The contents of an address. frame counts from 1."""

    first: Settings = DEFAULT
    second: Settings | None = None
    frame: int = 1

    def query(self) -> str:
        """Returns the query 'keep=32&b_method=uniform&...'. Defaults of the first setting are left out."""
        given = {name: value for name, value in asdict(self.first).items() if value != getattr(DEFAULT, name)}
        if self.second is not None:
            given |= {SECOND + name: value for name, value in asdict(self.second).items()}
        if self.frame != 1:
            given["frame"] = self.frame
        return urlencode(given)


def read_link(query: Mapping[str, str]) -> tuple[Link, list[str]]:
    """Reads the settings in the query of an address. Returns a message for every value that is not valid, which is
    replaced by its default. Unknown names are ignored: Gradio has its own, such as __theme."""
    messages: list[str] = []
    first, second = (_settings(query, prefix, messages) for prefix in ("", SECOND))
    has_second = any(SECOND + name in query for name in asdict(DEFAULT))
    frame = _count("frame", query["frame"], 1, None, messages) if "frame" in query else None
    return Link(first, second if has_second else None, frame or 1), messages


def _settings(query: Mapping[str, str], prefix: str, messages: list[str]) -> Settings:
    settings = DEFAULT
    for name in asdict(DEFAULT):
        text = query.get(prefix + name)
        if text is None:
            continue
        if name in CHOICES:
            if text in CHOICES[name]:
                settings = replace(settings, **{name: text})
            else:
                messages.append(f"{prefix}{name}={text!r} in the address is none of {', '.join(CHOICES[name])}")
        else:
            count = _count(prefix + name, text, LEAST[name], MOST.get(name), messages)
            settings = settings if count is None else replace(settings, **{name: count})
    return settings


def _count(name: str, text: str, least: int, most: int | None, messages: list[str]) -> int | None:
    if (
        text.isascii()
        and text.isdigit()
        and len(text) <= 9
        and int(text) >= least
        and (most is None or int(text) <= most)
    ):
        return int(text)
    messages.append(
        f"{name}={text!r} in the address is not a number {f'from {least}' if most is None else f'in {least}..{most}'}"
    )
    return None
