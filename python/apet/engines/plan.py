"""The plan of an image or a video: made where the prompt is, and passed to the model with the pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from apet_kernels.options import LAYOUTS, SELECTS

from .options import Wanted

FIELD = "apet"  # the name of the packed plan among the data of an item that gets shorter
HEADER = 7


@dataclass(frozen=True)
class Plan:
    """The options of the kernel, and how many rows each unit keeps. N: the rows that the item has for the language
    model.

    units [N] int64: the number of each row's unit, or -1 for a row that stays as it is. sources [N] int64: if
    compression is before the projector, the row of the projector's input, of `features` rows, that each row comes from.
    """

    kernel: Mapping[str, Any]
    kept: list[int]
    units: Tensor
    sources: Tensor | None = None
    features: int = 0

    @cached_property
    def lengths(self) -> list[int]:
        """The number of rows of each unit."""
        return self.units[self.units >= 0].bincount(minlength=len(self.kept)).tolist()

    @property
    def encoded(self) -> int:
        """The number of rows that the encoder makes: all but those that stay as they are."""
        return sum(self.lengths)

    @cached_property
    def order(self) -> Tensor:
        """The rows that belong to units, unit after unit, ascending within one."""
        return self.units.argsort(stable=True)[len(self.units) - self.encoded :]

    @property
    def gone(self) -> int:
        """The number of rows that are dropped."""
        return self.encoded - sum(self.kept)

    @property
    def rows(self) -> int:
        """The number of rows that the language model gets."""
        return len(self.units) - self.gone

    @property
    def removed(self) -> Tensor:
        """[N] bool: the placeholders that are removed, the last ones of each unit. (The encoder's output decides which
        rows go.)"""
        ends = [torch.arange(n) >= k for n, k in zip(self.lengths, self.kept, strict=True)]
        removed = torch.zeros(len(self.units), dtype=torch.bool)
        removed[self.order] = torch.cat(ends) if ends else removed[:0]
        return removed

    def pack(self) -> Tensor:
        """Packs the plan into one int64 tensor. It has integers only, because vLLM casts floats to the model's
        dtype."""
        kernel = self.kernel
        blend = torch.tensor(kernel["blend"], dtype=torch.float64).view(torch.int64).item()
        named = [LAYOUTS.index(kernel["layout"]), SELECTS.index(kernel["select"])]
        numbers = [kernel["basis"] or 0, *named, blend, kernel["refine"]]
        head = torch.tensor([*numbers, len(self.kept), self.features, *self.kept])
        return torch.cat([head, self.units, *([] if self.sources is None else [self.sources])])


def unpack(packed: Tensor) -> Plan:
    """Unpacks a plan that `pack` made."""
    basis, layout, select, blend, refine, units, features = packed[:HEADER].tolist()
    kernel = {
        "basis": basis or None,
        "layout": LAYOUTS[layout],
        "select": SELECTS[select],
        "blend": torch.tensor(blend).view(torch.float64).item(),
        "refine": refine,
    }
    kept, rows = packed[HEADER : HEADER + units].tolist(), packed[HEADER + units :]
    return Plan(kernel, kept, *(rows.chunk(2) if features else (rows, None)), features)


def of(data: Mapping[str, Any] | None) -> Plan | None:
    """Returns the plan among an item's processed data; None if all of it stays."""
    return None if data is None or FIELD not in data else unpack(data[FIELD].data)


def make(wanted: Wanted, units: Tensor, sources: Tensor | None = None, features: int = 0) -> Plan:
    """Makes the plan of an item with these units. Raises ValueError if `apet_max_tokens` is less than it needs."""
    lengths = units[units >= 0].bincount().tolist()
    return Plan(wanted.kernel, wanted.kept(lengths, int((units < 0).sum())), units, sources, features)
