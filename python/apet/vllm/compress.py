"""The model's side: the units of a batch of items, compressed together."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig

import apet_kernels

from ..hooks.config import Options
from . import options


class Model(nn.Module):
    """Mixed into vLLM's models. `at_start`: the options that the engine was started with."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # Checked here too: if a processor raises an error, vLLM takes the model for a text model.
        at_start = options.of(vllm_config.model_config.multimodal_config.mm_processor_kwargs or {})
        if at_start:
            self.check(vllm_config, at_start)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.at_start = at_start

    def check(self, vllm_config: VllmConfig, at_start: Options) -> None:
        """Raises ValueError for an engine whose configuration does not support compression."""


@dataclass(frozen=True)
class Item:
    """An image or a video: its options (None: all of it stays) and the tokens of each of its units."""

    options: Options | None
    lengths: Sequence[int]

    @property
    def kept(self) -> list[int]:
        """Tokens that remain of each unit."""
        return options.kept(self.options, self.lengths)

    @property
    def gone(self) -> int:
        """Tokens that are dropped."""
        return sum(self.lengths) - sum(self.kept)

    @property
    def kernel(self) -> dict[str, Any]:
        """The arguments of `apet_kernels.compress_packed`; any where nothing is dropped."""
        return (self.options or Options()).kernel


def compress(x: Tensor, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
    """x [T, D], unit after unit and item after item -> tokens [R, D] and their rows in x [R] int64, in the same order.

    One call of the kernel for items in a row that ask for the same options (but for how many to keep).
    """
    tokens, indices, start = [], [], 0
    for kernel, group in itertools.groupby(items, key=lambda item: item.kernel):
        batch = list(group)
        lengths = [n for item in batch for n in item.lengths]
        end = start + sum(lengths)
        rows, where = apet_kernels.compress_packed(
            x[start:end], lengths, [k for item in batch for k in item.kept], **kernel
        )
        tokens.append(rows)
        indices.append(where + start)
        start = end
    return torch.cat(tokens), torch.cat(indices)
