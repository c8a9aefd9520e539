"""The numbers that `apet compress` shows of a photo or clip: kept tokens, merge targets, what is lost, and time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import torch
from torch.utils.benchmark import Timer

import apet_kernels
from apet_kernels import reference
from apet_kernels.options import MAX_BASIS, PAPER, Options

TIMING_SECONDS = 0.25  # for each of four calls


@dataclass
class OpArguments:
    """The arguments of `apet_kernels.compress` that the command passes on."""

    basis: int | Literal["keep"] = "keep"  # "keep": as many as are kept
    layout: str = Options.layout
    select: str = Options.select
    start: int = Options.start
    blend: float = Options.blend
    backend: str | None = None
    refine: int = Options.refine


class Described(Protocol):
    """The arguments of the op that `describe` reads, in any class."""

    @property
    def basis(self) -> int | str: ...
    @property
    def layout(self) -> str: ...
    @property
    def select(self) -> str: ...
    @property
    def refine(self) -> int: ...


def describe(o: Described) -> str:
    """Describes the arguments for titles: 'layout inplace, select fps, 10 basis tokens'."""
    basis = "as many basis tokens as are kept" if o.basis == "keep" else f"{o.basis} basis tokens"
    return f"layout {o.layout}, select {o.select}, {basis}" + (f", {o.refine} medoid steps" if o.refine else "")


@dataclass
class Frame:
    """One image after compression; positions are row by row in its grid of patches."""

    kept: np.ndarray  # [K] ascending
    basis: np.ndarray  # [m] in picking order; empty if all kept tokens are basis tokens, or medoids
    overwritten: np.ndarray  # [m] kept positions whose rows hold basis tokens instead (layout overwrite), else [0]
    retained: np.ndarray  # [N] bool: the token's own features are in the result, in whichever row
    target_position: np.ndarray  # [N] position that each token was merged into; its own if kept, -1 if none
    residual: np.ndarray  # [N] e^2


@dataclass
class Measure:
    """The numbers of one photo or clip."""

    tokens_in: int  # per image
    tokens_out: int
    residual_kept: float  # share of the sum of e^2 that the kept tokens carry
    explained: float  # 1 - (distance^2 of every token to the row it was merged into) / (distance^2 to the mean token)
    milliseconds: dict[str, float] = field(default_factory=dict)  # by `times`


def check(tokens: int, keep: int, arguments: OpArguments) -> None:
    """Raises: ValueError or RuntimeError, if the op rejects these arguments for an image of so many tokens."""
    no_data = torch.empty(1, tokens, 1, device="meta")
    _compress(no_data, keep, replace(arguments, backend=None))  # backends take no meta tensors


def compress(x: torch.Tensor, keep: int, arguments: OpArguments) -> tuple[list[Frame], Measure]:
    """Compresses images [B, N, D] and measures what is left of them.

    Raises: ValueError or RuntimeError, if the op rejects its arguments.
    """
    tokens, indices = _compress(x, keep, arguments)  # [B, R, D], [B, R]
    residual, basis = score(x, arguments)  # [B, N], [B, M]
    frames = [
        frame(x[b], indices[b, :keep], residual[b], basis[b][basis[b] >= 0], arguments.layout) for b in range(len(x))
    ]
    return frames, measure(x, tokens, frames)


def measure(x: torch.Tensor, tokens: torch.Tensor, frames: list[Frame]) -> Measure:
    """Measures images x [B, N, D] against their result tokens [B, R, D]; the first K rows are the kept ones of
    `frames`."""
    total = sum(float(f.residual.sum()) for f in frames)
    kept = sum(float(f.residual[f.retained].sum()) for f in frames)
    return Measure(
        tokens_in=x.shape[1],
        tokens_out=tokens.shape[1],
        residual_kept=kept / total if total else 1.0,
        explained=_explained(x, tokens[:, : len(frames[0].kept)], frames),
    )


def merge_targets(x: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Returns the target of largest cosine for every token, ties to the lower position, in float64.

    The op does not return this, so it is computed again for pictures; near a tie, rounding may give another target. x:
    [N, D]; targets: [T] positions, ascending. Returns: [N] positions, -1 if no target has a finite norm or the token's
    own norm is not finite.
    """
    x = x.double()
    finite = x.square().sum(-1) <= torch.finfo(torch.float32).max  # [N]
    targets = targets[finite[targets]]
    if len(targets) == 0:
        return torch.full((len(x),), -1)
    t = x[targets]  # [T, D]
    norm = t.norm(dim=-1)  # [T]
    cosine = (x @ t.T) / torch.where(norm > 0, norm, 1.0)  # [N, T], times ||x||, which changes no arg-max
    first = torch.from_numpy(cosine.numpy().argmax(-1))  # numpy promises the first of equals
    return torch.where(finite, targets[first], -1)


def frame(x: torch.Tensor, kept: torch.Tensor, residual: torch.Tensor, basis: torch.Tensor, layout: str) -> Frame:
    """Returns the outcome for every token of one image, from x [N, D], kept [K], residual [N] and basis [m]."""
    _, overwritten = reference.s4_topk(residual, basis, len(kept), layout)  # [K] bool
    targets = kept[~overwritten]
    target_position = merge_targets(x, targets)
    target_position[kept] = kept
    retained = torch.zeros(len(x), dtype=torch.bool).index_fill_(0, targets, True)
    if layout != "inplace":  # the basis tokens are in rows of their own
        retained[basis] = True
    return Frame(
        kept.numpy(),
        basis.numpy(),
        kept[overwritten].numpy(),
        retained.numpy(),
        target_position.numpy(),
        residual.double().numpy(),
    )


def _explained(x: torch.Tensor, rows: torch.Tensor, frames: list[Frame]) -> float:
    """Returns 1 - (distance^2 of every token to the row it was merged into) / (distance^2 to its image's mean).
    x: [B, N, D]."""
    lost = spread = 0.0
    for image, merged, frame in zip(x.double(), rows.double(), frames, strict=True):
        row = np.searchsorted(frame.kept, np.maximum(frame.target_position, 0))  # [N] the row of each target
        dropped = torch.from_numpy(frame.target_position < 0)
        reconstructed = merged[torch.from_numpy(row)].masked_fill(dropped[:, None], 0.0)  # [N, D]
        lost += float((image - reconstructed).square().sum())
        spread += float((image - image.mean(0)).square().sum())
    return 1 - lost / spread if spread else 1.0


def _compress(x: torch.Tensor, keep: int, o: OpArguments) -> tuple[torch.Tensor, torch.Tensor]:
    return apet_kernels.compress(
        x,
        keep,
        None if o.basis == "keep" else o.basis,
        layout=o.layout,
        select=o.select,
        start=o.start,
        blend=o.blend,
        refine=o.refine,
        backend=o.backend,
    )


def score(x: torch.Tensor, o: OpArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the residual and the basis that pictures show.

    If all kept tokens are basis tokens, the residual of that basis says nothing about the choice. Then the residual of
    the paper's number of basis tokens is returned, and no basis.
    """
    shown = PAPER["basis"] if o.basis == "keep" or o.basis > MAX_BASIS or o.refine else o.basis
    residual, basis = apet_kernels.score(x, shown, select=o.select, start=o.start, backend=o.backend)
    return residual, basis if shown == o.basis and not o.refine else torch.full_like(basis, -1)


def times(x: torch.Tensor, keep: int, o: OpArguments, frames: list[Frame]) -> dict[str, float]:
    """Returns median milliseconds of the stages, called one by one, and of the one call that does all of them."""
    residual, _ = score(x, o)
    indices = torch.from_numpy(np.stack([f.kept for f in frames]))  # [B, K]
    targets = torch.from_numpy(np.stack([~np.isin(f.kept, f.overwritten) for f in frames]))  # [B, K]
    calls: dict[str, Callable[[], object]] = {
        "score": lambda: score(x, o),
        "select": lambda: residual.topk(keep).indices.sort(),
        "merge": lambda: apet_kernels.merge(x, indices, targets=targets, backend=o.backend),
        "compress": lambda: _compress(x, keep, o),
    }
    return {name: _median_ms(call) for name, call in calls.items()}


def _median_ms(call: Callable[[], object]) -> float:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=TIMING_SECONDS).median * 1e3
