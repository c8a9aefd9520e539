"""Compression in vLLM's models."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, nn
from vllm.config import VllmConfig

from ..engines import options, plan
from ..engines.batch import Batch


def check_lora(lora_config: Any) -> None:
    """Raises ValueError for LoRA on the vision tower or the projector: vLLM applies it to as many rows as an item has
    embeddings, and these are fewer with compression."""
    if lora_config is not None and lora_config.enable_tower_connector_lora:
        raise ValueError(
            "apet_keep: LoRA on the vision tower or the projector (enable_tower_connector_lora) would miss rows"
        )


class Model(nn.Module):
    """A mixin for vLLM's models that compresses their embeddings. `at_start`: the options of the engine's start-up."""

    projector: ClassVar[str | None] = None  # compresses the input of this module instead
    _batch: Batch | None = None

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        # Options are checked here too: if a processor raises an error, vLLM treats the model as text-only.
        at_start = options.of(vllm_config.model_config.multimodal_config.mm_processor_kwargs or {})
        if at_start:
            check_lora(vllm_config.lora_config)
            self.check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.at_start = at_start
        if self.projector:
            projector = getattr(self, self.projector)
            projector.register_forward_pre_hook(self._before_projector)
            projector.register_forward_hook(self._after_projector)

    def check(self, vllm_config: VllmConfig) -> None:
        """Raises ValueError for an engine whose configuration does not support compression."""

    def width(self) -> int | None:
        """Returns how many channels of an embedding decide which tokens stay and are merged. None: all."""

    def finish(self, rows: list[Tensor], left: Tensor | None, inputs: dict[str, Any]) -> list[Tensor]:
        """Converts the rows of each item to the form that vLLM gets; `left` [R] are the rows that are left (None:
        all)."""
        return rows

    def embed_multimodal(self, **inputs: Any) -> Any:
        packed = inputs.pop(plan.FIELD, None)
        if packed is None:
            return self.finish(super().embed_multimodal(**inputs), None, inputs)
        batch = self._batch = Batch([plan.unpack(p) for p in packed])
        try:
            rows = super().embed_multimodal(**inputs)
        finally:
            self._batch = None
        return self.finish(batch.shorten(rows, self.width()), batch.left, inputs)

    def get_encoder_cudagraph_config(self) -> Any:
        # vLLM's CUDA graphs of the encoder do not call `embed_multimodal`.
        return dataclasses.replace(super().get_encoder_cudagraph_config(), modalities=[])

    def _before_projector(self, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        self._shape = args[0].shape[:-1]
        return (self._batch.project(args[0]),) if self._batch else None

    def _after_projector(self, _: nn.Module, args: tuple[Tensor], projected: Tensor) -> Tensor | None:
        return self._batch.unproject(projected).view(*self._shape, -1) if self._batch else None
