"""A vLLM plugin for benchmarks/serving.py alone, loaded by the servers that it starts.

- Random rows: a request with as many basis tokens as RANDOM gets as many rows of each unit as it would keep, drawn at
  random and not merged. Everything else is the product's path, so the difference is the cost of choosing and merging.
- vLLM's EVS on the CPU: the CPU runner of vLLM 0.32 does not set whether embeddings carry positions, without which EVS
  fails there. The GPU runner takes the value from the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

RANDOM = 64


def register() -> None:
    """Called by vLLM in each of its processes."""
    from vllm.platforms import current_platform

    draw_at_random()
    if current_platform.is_cpu():
        tell_cpu_runner()


def draw_at_random() -> None:
    """Makes the plugin draw rows for requests with RANDOM basis tokens."""
    from apet.engines import batch

    choose = batch.compress
    if hasattr(choose, "__wrapped__"):
        return

    def choose_or_draw(x: Tensor, plans: Sequence[Any]) -> tuple[Tensor, Tensor]:
        if all(plan.kernel["basis"] != RANDOM for plan in plans):
            return choose(x, plans)
        rows, start = [], 0
        for length, kept in ((n, k) for plan in plans for n, k in zip(plan.lengths, plan.kept, strict=True)):
            rows.append(torch.randperm(length)[:kept].sort().values + start)
            start += length
        indices = torch.cat(rows).to(x.device)
        return x[indices], indices

    choose_or_draw.__wrapped__ = choose  # type: ignore[attr-defined]
    batch.compress = choose_or_draw


def tell_cpu_runner() -> None:
    """Makes vLLM's CPU runner take from the model whether embeddings carry positions."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asks(runner: Any) -> bool:
        return getattr(runner.model, "is_multimodal_pruning_enabled", False)

    CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda runner, value: None)
