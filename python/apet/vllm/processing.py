"""vLLM's input processing: options, placeholder counts and cache keys, before any image is encoded.

Mixins for a model's `ProcessingInfo` and `MultiModalProcessor`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptUpdate,
)

from ..hooks.config import Options
from . import options

FIELD = "apet_{}"  # of an image or a video: its options, packed


class Context(InputProcessingContext):
    """Removes `apet_*` from the arguments of the model's own processor, which does not know them."""

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **supported: Any) -> dict[str, Any]:
        return options.without(super().get_merged_mm_kwargs(kwargs, **supported))


class Info(BaseProcessingInfo):
    """Reads the options of the engine's start-up, and those of a request, which override them."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(Context(ctx.model_config, ctx.tokenizer))
        self.at_start = self.options({})

    def options(self, kwargs: Mapping[str, object]) -> Options | None:
        """The options of a request with these `mm_processor_kwargs`. Raises ValueError if they are invalid."""
        return options.of(self.ctx.get_mm_config().merge_mm_processor_kwargs(kwargs))


class Processor(BaseMultiModalProcessor):
    """Shortens the placeholders of every item to its kept tokens, and attaches its options."""

    info: Info

    def lengths(
        self, modality: str, item: int, items: MultiModalDataItems, made: MultiModalKwargsItems, tokens: int
    ) -> list[int]:
        """The tokens of each unit (what is compressed together) of an item that has so many tokens in all."""
        raise NotImplementedError

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        # The keys of the processor cache, the encoder cache and the prefix cache. vLLM makes them from what the request
        # says; with the options in force they also distinguish engines with different start-up options.
        told = options.without(inputs.hf_processor_mm_kwargs)
        if wanted := self.info.options(inputs.hf_processor_mm_kwargs):
            told["apet"] = repr(wanted)
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=told))

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> Any:
        made = super()._apply_hf_processor_main(mm_items, hf_kwargs)
        if wanted := self.info.options(hf_kwargs):
            for modality, items in mm_items.items():
                made[FIELD.format(modality)] = options.pack(wanted).repeat(len(items), 1)
        return made

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> dict[str, MultiModalFieldConfig]:
        fields = dict(super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs))
        for modality in self.info.supported_mm_limits:
            fields[FIELD.format(modality)] = MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
        return fields

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)
        wanted = self.info.options(hf_processor_mm_kwargs)
        if wanted is None:
            return updates

        def shortened(update: PromptUpdate, item: int) -> list[int]:
            placeholders = update.replacement(item)
            lengths = self.lengths(update.modality, item, mm_items, out_mm_kwargs, len(placeholders))
            gone = sum(lengths) - sum(options.kept(wanted, lengths))
            return placeholders[: len(placeholders) - gone]

        return [replace(update, replacement=functools.partial(shortened, update)) for update in updates]
