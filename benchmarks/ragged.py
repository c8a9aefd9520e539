"""Images of different sizes, packed: one call of compress_packed against one call for each image.

python -m benchmarks.ragged     (options: benchmarks/lib/suite.py)
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import apet_kernels
from apet_kernels.options import PAPER
from benchmarks.lib import alternatives, baselines, ceilings
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.check import check_other, judge
from benchmarks.lib.compare import Comparison, Row, on_each_isa, ring
from benchmarks.lib.device import Device
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite, ms, noise, number

BASELINES = ("one by one", "eager", "tuned")
OTHERS = ("divprune", "tome")
Compress = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Ragged:
    """Images packed one after another in x [T, D]."""

    name: str
    lengths: tuple[int, ...]
    keeps: tuple[int, ...]
    D: int
    dtype: torch.dtype

    def images(self) -> list[Case]:
        """The images, each as a separate case in the default layout."""
        return [Case(1, n, self.D, k, self.dtype, "inplace") for n, k in zip(self.lengths, self.keeps, strict=True)]

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds."""
        return {
            "name": self.name,
            "lengths": list(self.lengths),
            "keeps": list(self.keeps),
            "D": self.D,
            "dtype": self.dtype_name,
        }

    def __str__(self) -> str:
        return f"{self.name} {self.dtype_name}"


def cases(smoke: bool) -> list[Ragged]:
    """Returns LLaVA-NeXT's tiles, Qwen2.5-VL's images with 30 % of each kept, and many small images beside a large
    one."""
    if smoke:
        return [Ragged("two images", (40, 64), (12, 16), 32, torch.float32)]
    images = (256, 1024, 391, 2040, 1369, 640, 144, 900)
    small = (*(64,) * 8, 2304, *(64,) * 8)
    return [
        Ragged(name, lengths, keeps, D, dtype)
        for name, lengths, keeps, D in (
            ("LLaVA-NeXT, 13 tiles of 3 images", (576,) * 13, (192,) * 13, 1024),
            ("Qwen2.5-VL, 8 images of 144 to 2040", images, tuple(round(0.3 * n) for n in images), 3584),
            ("16 images of 64, one of 2304", small, tuple(n // 4 for n in small), 3584),
        )
        for dtype in (torch.float32, torch.bfloat16)
    ]


def compare(ragged: Ragged, device: Device) -> Comparison:
    """Checks, image by image, that the packed result equals the single one, and everything against float64."""
    images, lengths, keeps = ragged.images(), list(ragged.lengths), list(ragged.keeps)

    def alone(method: Callable[..., tuple[Tensor, Tensor]], x: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        parts = zip(x.split(lengths), images, itertools.accumulate(lengths, initial=0), strict=False)
        found = [(*method(part[None], **(more | _options(method, case))), at) for part, case, at in parts]
        return torch.cat([rows[0] for rows, _, _ in found]), torch.cat([where[0] + at for _, where, at in found])

    def packed(x: Tensor) -> tuple[Tensor, Tensor]:
        return apet_kernels.compress_packed(x, lengths, keeps, **PAPER)

    calls: dict[str, Compress] = {
        "one by one": functools.partial(alone, torch.ops.apet.compress, select=PAPER["select"]),
        "eager": functools.partial(alone, baselines.eager),
        "tuned": functools.partial(alone, baselines.tuned),
        **{name: functools.partial(alone, alternatives.METHODS[name]) for name in OTHERS},
        **on_each_isa("kernel", packed),
    }
    inputs = ring(lambda seed: torch.cat([tokens(case, seed + n)[0] for n, case in enumerate(images)]), device)
    shares = {name: _checked(ragged, name, call, inputs[0]) for name, call in calls.items()}
    with torch.inference_mode():
        for ours, theirs in zip(packed(inputs[0]), calls["one by one"](inputs[0]), strict=True):
            assert torch.equal(ours, theirs), f"{ragged}: packed images give other bits than alone"
    cost = {name: functools.partial(_each, ragged, name) for name in ("product", "sweeps")}
    return Comparison(device, ragged.fields(), {**cost, **calls}, inputs, shares)


def _options(method: Callable[..., tuple[Tensor, Tensor]], case: Case) -> dict[str, Any]:
    return {"keep": case.keep} if method in alternatives.METHODS.values() else case.arguments


def _each(ragged: Ragged, term: str, x: Tensor) -> None:
    """Runs a term of the reference cost for every image."""
    for part, case in zip(x.split(ragged.lengths), ragged.images(), strict=True):
        ceilings.reference_cost(case)[term](part[None])


def _checked(ragged: Ragged, name: str, call: Compress, x: Tensor) -> float:
    """Returns the share of rows compared with float64."""
    with torch.inference_mode():
        rows, indices = call(x)
    shares, start = [], 0
    parts = zip(x.split(ragged.lengths), rows.split(ragged.keeps), indices.split(ragged.keeps), strict=True)
    for case, (image, kept, where) in zip(ragged.images(), parts, strict=True):
        result = kept[None], where[None] - start
        if name in OTHERS:
            check_other(name, case, image[None], *result)
            shares.append(case.keep)
        else:
            shares.append(judge(case, name, image[None], result) * case.keep)
        start += case.N
    return sum(shares) / sum(ragged.keeps)


def sheets(results: Results) -> list[Sheet]:
    """Returns the table."""
    isa = list(dict.fromkeys(n for row in results.rows for n in row.ms if n.startswith("kernel ")))
    names = ("kernel", *isa, *BASELINES, *OTHERS, "reference cost")
    return [
        Sheet(
            "compress_packed",
            "Milliseconds, medians. kernel: one call of compress_packed; the others one call for each image. x: how "
            "many times faster the kernel is. reference cost: one torch.mm and M sweeps for each image, both from "
            f"memory. {ceilings.OF_FLOOR} noise: of kernel and reference cost. checked: share of rows compared with "
            "float64.",
            [
                *("images", "dtype", *names, *(f"x {name}" for name in (*BASELINES, *OTHERS))),
                *("of floor", "noise", "checked"),
            ],
            [
                [
                    *(row.case["name"], row.case["dtype"], *(ms(row, name) for name in names)),
                    *(number(row.faster[name]) for name in (*BASELINES, *OTHERS)),
                    ceilings.of_floor(_images(row), row.ms["kernel"], results.rates),
                    *(noise(row), f"{row.checked['kernel']:.0%}"),
                ]
                for row in results.rows
            ],
            words=("images", "dtype"),
        )
    ]


def _images(row: Row) -> list[Case]:
    case = row.case
    return Ragged(**{**case, "dtype": getattr(torch, case["dtype"])}).images()


SUITE = Suite(
    "ragged",
    "Images of different sizes, packed: one call of compress_packed against one call for each image.",
    cases,
    compare,
    sheets,
    rounds=7,
)

if __name__ == "__main__":
    SUITE.main()
