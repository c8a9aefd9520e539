"""`Call`: the launches of one call of an op, with the tokens, tile sizes and workspace that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configs


@dataclass(frozen=True)
class Launch:
    """One kernel launch over a 1-D grid."""

    kernel: Any  # a triton.JITFunction
    programs: int
    args: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, int | bool]

    def run(self) -> None:
        self.kernel[(self.programs,)](**self.args, **self.constants, **self.options)


class Call:
    """The launches of one call of an op, and the tensors that they fill.

    Args:
        x: [B, N, D], or ragged [T, D].
        images: B, or the number of ragged images.
        max_tokens: N, or the largest N of a ragged image.
        results: what the op returns; the launches fill it.
        device_class: which entry of `configs.tiles` to use; None: that of x's device.
        weights: [B, N], or ragged [T], float32.
    """

    def __init__(
        self,
        x: Tensor,
        images: int,
        max_tokens: int,
        results: tuple[Tensor, ...],
        device_class: str | None,
        weights: Tensor | None = None,
    ) -> None:
        D, element = x.shape[-1], x.element_size()
        # Rows of whole 16-byte words are loaded by words, so they must start at a multiple of 16 bytes. Which form is
        # loaded follows from D and the dtype alone, because another form could add in another order.
        self.align = 16 if D * element % 16 == 0 else element
        strides = [n * element for n in x.stride()[:-1]]
        if x.stride(-1) != 1 or any(n % self.align for n in (*strides, 0 if x.is_meta else x.data_ptr())):
            x = x.clone(memory_format=torch.contiguous_format)
        self.x = x
        self.dim = D
        self.images = images
        self.max_tokens = max_tokens
        self.all_tokens = x.shape[:-1].numel()
        self.results = results
        self.weights = None if weights is None else weights.contiguous()
        self.device_class = device_class or configs.device_class(x.device)
        self.tiles = configs.tiles(self.device_class, D, element)
        self.launches: list[Launch] = []
        self.workspace_bytes = 0

    def new(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Allocates a tensor of the workspace."""
        tensor = torch.empty(shape, dtype=dtype, device=self.x.device)
        self.workspace_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def add(
        self,
        kernel: Any,
        programs: int,
        args: dict[str, Any],
        constants: dict[str, Any],
        warps: int,
        stages: int = 2,
        registers: int = 255,
    ) -> None:
        """Appends a launch. stages: tiles of input in flight; registers: the most per thread, on NVIDIA."""
        # The compiler must not fuse other products and sums into an fma: rounding is fixed by the source.
        options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
        if self.device_class.startswith("sm_"):
            options["maxnreg"] = registers  # without a limit ptxas spills a little to fit one more program
        self.launches.append(Launch(kernel, programs, args, constants, options))

    def run(self) -> tuple[Tensor, ...]:
        for launch in self.launches:
            launch.run()
        return self.results


class Rows(NamedTuple):
    """The rows of the result and the tokens that are merged into them, as s4 writes them."""

    kept: Tensor  # [all rows] int32: position in the image of every kept row
    row_basis: Tensor  # [all rows] int32: number of the basis token that overwrites the row, or TARGET or COPIED
    dropped: Tensor  # [all tokens] int32: positions of the tokens to merge, ascending; undefined past their count


def new_rows(call: Call, rows: int) -> Rows:
    """Allocates lists for that many rows of all images."""
    return Rows(call.new(torch.int32, rows), call.new(torch.int32, rows), call.new(torch.int32, call.all_tokens))
