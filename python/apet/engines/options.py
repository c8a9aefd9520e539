"""The options of a request, read from its `mm_processor_kwargs`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..hooks.config import Options, count, resolve

PREFIX = "apet_"
OF_KERNEL = ("basis", "layout", "select", "blend", "refine")
BOUNDS = ("least", "most", "max_tokens")
NAMES = ("keep", *BOUNDS, *OF_KERNEL)


@dataclass(frozen=True)
class Wanted(Options):
    """The options of a request.

    least, most: bounds of the number that a ratio `keep` gives for a unit; max_tokens: the limit for all visual tokens
    of a request or, once `share` has divided it, of an item.
    """

    least: int | None = None
    most: int | None = None
    max_tokens: int | None = None

    @property
    def all_tokens(self) -> bool:
        """Whether every unit keeps all of its tokens, however many these are."""
        ratio = isinstance(self.keep, float) and self.keep == 1  # 1 is one token
        return ratio and self.most is None and self.max_tokens is None

    def kept(self, lengths: Sequence[int], staying: int = 0) -> list[int]:
        """Returns how many tokens each unit of these lengths keeps; `staying` tokens of the item stay in any case."""
        kept = [min(n, max(self.least or 1, min(self.most or n, count(self.keep, 0, n, self)))) for n in lengths]
        if self.max_tokens is None or sum(kept) + staying <= self.max_tokens:
            return kept
        minimum = self.basis + 1 if self.layout == "overwrite" and self.basis != "keep" else 1
        needed = [min(k, minimum) for k in kept]
        spare = self.max_tokens - staying - sum(needed)
        if spare < 0:
            raise ValueError(
                f"{PREFIX}max_tokens leaves {self.max_tokens} tokens to an image or video that needs at least "
                f"{sum(needed) + staying}: {minimum} for each of {len(kept)} units, and {staying} that always stay"
            )
        above = [k - n for k, n in zip(kept, needed, strict=True)]
        ends = [spare * sum(above[: i + 1]) // sum(above) for i in range(len(above))]
        return [n + end - start for n, start, end in zip(needed, [0, *ends], ends, strict=False)]


def of(kwargs: Mapping[str, object]) -> Wanted | None:
    """Returns the options in `mm_processor_kwargs`; None if there are none, or if those that limit tokens are null.

    Raises ValueError, which names the offending value.
    """
    for scope, values in kwargs.items():
        if isinstance(values, Mapping) and any(str(name).startswith(PREFIX) for name in values):
            raise ValueError(f"put {PREFIX}* options directly into mm_processor_kwargs, got {scope}={dict(values)}")
    given = {k.removeprefix(PREFIX): v for k, v in kwargs.items() if k.startswith(PREFIX)}
    if unknown := [name for name in given if name not in NAMES]:
        known = ", ".join(PREFIX + name for name in NAMES)
        raise ValueError(f"{PREFIX}{unknown[0]} is not an option of ApET; these are: {known}")
    off = "keep" in given and given["keep"] is None  # also where the start-up has other options
    given = {name: value for name, value in given.items() if value is not None}
    if "max_tokens" in given:
        given.setdefault("keep", 1.0)
    if "keep" not in given:
        if given and not off:
            name, value = next(iter(given.items()))
            raise ValueError(f"{PREFIX}{name}={value!r} needs {PREFIX}keep")
        return None
    bounds = {name: given.pop(name) for name in BOUNDS if name in given}
    _check(given, bounds)
    try:
        options = resolve({}, "the engine", range(0), given)
    except ValueError as error:  # its message begins with the option's name
        raise ValueError(f"{PREFIX}{error}") from None
    return Wanted(**{field.name: getattr(options, field.name) for field in fields(options)}, **bounds)


def _check(given: Mapping[str, Any], bounds: Mapping[str, Any]) -> None:
    keep = given["keep"]
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        raise ValueError(f"{PREFIX}keep={keep} must be one count or ratio, for every image or video of the request")
    for name, kind in (("layout", str), ("select", str), ("blend", float)):
        value = given.get(name)
        if value is not None and not isinstance(value, (kind, int) if kind is float else kind):
            raise ValueError(f"{PREFIX}{name}={value!r} is not a {'number' if kind is float else 'name'}")
    if given.get("layout") == "append":
        raise ValueError(f"{PREFIX}layout='append' is not supported in inference engines; use inplace or overwrite")
    for name, value in bounds.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{PREFIX}{name}={value!r} is not a count (an int from 1)")
        if name != "max_tokens" and not isinstance(keep, float):
            raise ValueError(f"{PREFIX}{name}={value} bounds a ratio, but {PREFIX}keep={keep!r} is not a ratio")
    if bounds.get("least", 1) > bounds.get("most", math.inf):
        raise ValueError(f"{PREFIX}least={bounds['least']} exceeds {PREFIX}most={bounds['most']}")
    basis = given.get("basis", Options.basis)
    if given.get("layout") == "overwrite" and isinstance(basis, int) and bounds.get("most", basis + 1) <= basis:
        raise ValueError(f"{PREFIX}layout='overwrite' needs most > basis, got most={bounds['most']} and basis={basis}")


def share(wanted: Wanted | None, items: int) -> dict[str, int]:
    """Returns the `apet_max_tokens` of each item of a request: an equal share, so that the tokens that an item keeps do
    not depend on the other items, and caches can hold the item."""
    if wanted is None or wanted.max_tokens is None or not items:
        return {}
    if wanted.max_tokens < items:
        raise ValueError(
            f"{PREFIX}max_tokens={wanted.max_tokens} is less than one for each of {items} images or videos"
        )
    return {PREFIX + "max_tokens": wanted.max_tokens // items}


def only(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Returns the plugin's options among `mm_processor_kwargs`."""
    return {name: value for name, value in kwargs.items() if name.startswith(PREFIX)}


def without(kwargs: Mapping[str, object]) -> dict[str, object]:
    """Returns `mm_processor_kwargs` without the plugin's options, for the model's own processor."""
    return {name: value for name, value in kwargs.items() if not name.startswith(PREFIX)}
