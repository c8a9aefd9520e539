"""The plugin's options: read from `mm_processor_kwargs`, and passed to the model with each item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from apet_kernels.options import LAYOUTS, SELECTS

from ..hooks.config import Options, count, resolve

PREFIX = "apet_"
NAMES = ("keep", "basis", "layout", "select", "blend", "refine")


def of(kwargs: Mapping[str, object]) -> Options | None:
    """The options in `mm_processor_kwargs`; None if there are none, or `apet_keep` is null.

    Raises ValueError, which names the offending value.
    """
    for scope, values in kwargs.items():
        if isinstance(values, Mapping) and any(str(name).startswith(PREFIX) for name in values):
            raise ValueError(f"{PREFIX}* stands in mm_processor_kwargs itself, got {scope}={dict(values)}")
    given = {k.removeprefix(PREFIX): v for k, v in kwargs.items() if k.startswith(PREFIX)}
    if unknown := [name for name in given if name not in NAMES]:
        known = ", ".join(PREFIX + name for name in NAMES)
        raise ValueError(f"{PREFIX}{unknown[0]} is no option of ApET; these are: {known}")
    keep = given.get("keep")
    if keep is None:
        if alone := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{PREFIX}{alone[0]}={given[alone[0]]!r} needs {PREFIX}keep")
        return None
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        raise ValueError(f"{PREFIX}keep={keep} must be one count or ratio, for every image or video of the request")
    for name, kind in (("layout", str), ("select", str), ("blend", float)):
        value = given.get(name)
        if value is not None and not isinstance(value, (kind, int) if kind is float else kind):
            raise ValueError(f"{PREFIX}{name}={value!r} is not a {'number' if kind is float else 'name'}")
    if given.get("layout") == "append":
        raise ValueError(
            f"{PREFIX}layout='append' is of no model that the vLLM plugin serves; take inplace or overwrite"
        )
    try:
        return resolve({}, "vLLM", range(0), given)
    except ValueError as error:  # which begins with the option's name
        raise ValueError(f"{PREFIX}{error}") from None


def without(kwargs: Mapping[str, object]) -> dict[str, object]:
    """`mm_processor_kwargs` as the model's own processor may see them."""
    return {name: value for name, value in kwargs.items() if not name.startswith(PREFIX)}


def kept(options: Options | None, lengths: Sequence[int]) -> list[int]:
    """How many tokens stay of each unit: a function of its length alone. Without options all."""
    return [n if options is None else count(options.keep, 0, n, options) for n in lengths]


def pack(options: Options) -> Tensor:
    """[7] int64 that vLLM carries beside an item's pixels. Integers, because vLLM casts floats to the model's dtype."""
    keep = options.keep
    layout, select = LAYOUTS.index(options.layout), SELECTS.index(options.select)
    basis = 0 if options.basis == "keep" else options.basis
    values = [keep, isinstance(keep, float), basis, layout, select, options.blend, options.refine]
    return torch.tensor(values, dtype=torch.float64).view(torch.int64)


def unpack(packed: Tensor | None, items: int) -> list[Options | None]:
    """The options of every item of a batch, from packed [items, 7]."""
    if packed is None:
        return [None] * items
    return [_one(*row) for row in packed.view(torch.float64).tolist()]


def _one(keep: float, ratio: float, basis: float, layout: float, select: float, blend: float, refine: float) -> Options:
    return Options(
        keep if ratio else int(keep),
        int(basis) or "keep",
        LAYOUTS[int(layout)],
        SELECTS[int(select)],
        blend,
        refine=int(refine),
    )
