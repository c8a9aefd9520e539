"""LLaVA-1.5 in vLLM (`LlavaForConditionalGeneration` with a CLIP or SigLIP tower).

Modifications:
- an image has as many placeholders as tokens are kept of it;
- the projector gets the kept rows of the tower's features, images of different budgets in one call;
- embeddings given instead of an image are not compressed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.parse import ImageEmbeddingItems, MultiModalDataItems
from vllm.multimodal.processing import BaseMultiModalProcessor, BaseProcessingInfo, InputProcessingContext

from . import options, processing
from .compress import Item, Model, compress


class LlavaInfo(processing.Info, llava.LlavaProcessingInfo):
    """Reserves space for all tokens of an image."""

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        # vLLM would count an image with the budget of start-up; a request may keep more.
        return None if self.at_start is None else {"image": self.get_max_image_tokens()}


class LlavaProcessor(processing.Processor, llava.LlavaMultiModalProcessor):
    """An image is a unit."""

    def lengths(
        self, modality: str, item: int, items: MultiModalDataItems, made: MultiModalKwargsItems, tokens: int
    ) -> list[int]:
        return [] if isinstance(items[modality], ImageEmbeddingItems) else [tokens]


def build_info(ctx: InputProcessingContext) -> BaseProcessingInfo:
    """vLLM's own for a Pixtral tower, whose rows end in tokens of their own."""
    info = llava._build_llava_or_pixtral_hf_info(ctx)
    if isinstance(info, llava.LlavaProcessingInfo):
        return LlavaInfo(ctx)
    if options.of(ctx.get_mm_config().mm_processor_kwargs or {}):
        raise ValueError("apet_keep is not offered for LLaVA with a Pixtral tower")
    return info


def build_processor(info: BaseProcessingInfo, dummy_inputs: Any) -> BaseMultiModalProcessor:
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return llava._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(build_processor, info=build_info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class Llava(Model, llava.LlavaForConditionalGeneration):
    """vLLM's LLaVA-1.5, with compression between tower and projector."""

    def _parse_and_validate_image_input(self, **kwargs: Any) -> llava.LlavaImageInputs | None:
        inputs = super()._parse_and_validate_image_input(**kwargs)
        if inputs is not None:
            inputs.apet = kwargs.get("apet_image")
        return inputs

    def _process_image_pixels(self, inputs: Any) -> Tensor | tuple[Tensor, ...]:
        features = super()._process_image_pixels(inputs)
        wanted = options.unpack(inputs.apet, len(features))
        items = [Item(o, [len(tokens)]) for o, tokens in zip(wanted, features, strict=True)]
        if not any(item.gone for item in items):
            return features
        tokens, _ = compress(features.flatten(0, 1), items)
        return tokens.split([sum(item.kept) for item in items])
