"""Extends vLLM's input processing: options, placeholders, plans and cache keys, before any image is encoded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import MultiModalDataItems
from vllm.multimodal.processing import (
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    InputProcessingContext,
    ProcessorInputs,
    PromptUpdate,
    PromptUpdateDetails,
)

from ..engines import options, plan
from . import metrics

M = TypeVar("M", bound=type[nn.Module])
VISUAL = ("image", "video")  # modalities that are compressed; audio stays as it is


class Context(InputProcessingContext):
    """Removes `apet_*` from the arguments of the model's own processor, which does not know them."""

    has_apet = True  # unsupported.py rejects the options in other contexts

    def get_merged_mm_kwargs(self, kwargs: Mapping[str, object], **supported: Any) -> dict[str, Any]:
        return options.without(super().get_merged_mm_kwargs(kwargs, **supported))


class Info(BaseProcessingInfo):
    """Reads the options of the engine's start-up, and those of a request, which override them."""

    def __init__(self, ctx: InputProcessingContext) -> None:
        super().__init__(Context(ctx.model_config, ctx.tokenizer))
        self.options({})

    def options(self, kwargs: Mapping[str, object]) -> options.Wanted | None:
        """Returns the options of a request with these `mm_processor_kwargs`. Raises ValueError if they are invalid."""
        return options.of(self.ctx.get_mm_config().merge_mm_processor_kwargs(kwargs))


class Processor(BaseMultiModalProcessor):
    """Shortens the placeholders of every item that loses tokens, and attaches its plan."""

    info: Info

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> tuple[Tensor, Tensor, int] | Tensor:
        """Returns the units of an item whose rows have the placeholder ids [N]: for every row the number of its unit,
        or -1. If compression is before the projector, it also returns `sources` and `features` of `plan.Plan`."""
        raise NotImplementedError

    def embedded(self, details: PromptUpdateDetails) -> Tensor:
        """Returns [L] bool: which of the tokens that replace an item stand for the model's embeddings."""
        if details.is_embed is None:
            return torch.ones(len(details.full), dtype=torch.bool)
        return details.is_embed(details.full)

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        kwargs = inputs.hf_processor_mm_kwargs
        items = sum(n for modality, n in inputs.mm_data_items.get_all_counts().items() if modality in VISUAL)
        shared = {**kwargs, **options.share(self.info.options(kwargs), items)}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=shared), timing_ctx)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> ProcessorInputs:
        # vLLM measures memory, and reserves space, with the largest input: a request may ask for all tokens.
        inputs = super().get_dummy_inputs(*args, **kwargs)
        if self.info.options({}) is None:
            return inputs
        everything = dict.fromkeys((options.PREFIX + name for name in options.BOUNDS), None) | {"apet_keep": 1.0}
        return replace(inputs, hf_processor_mm_kwargs={**inputs.hf_processor_mm_kwargs, **everything})

    def _get_mm_hashes(self, inputs: ProcessorInputs) -> Any:
        # These are the keys of the processor cache, the encoder cache and the prefix cache. vLLM makes them from the
        # request; with the options in force they also distinguish engines with different start-up options.
        kwargs = options.without(inputs.hf_processor_mm_kwargs)
        if wanted := self.info.options(inputs.hf_processor_mm_kwargs):
            kwargs["apet"] = repr(wanted)
        return super()._get_mm_hashes(replace(inputs, hf_processor_mm_kwargs=kwargs))

    def _get_cache_missing_processor_kwargs(self, inputs: ProcessorInputs, mm_is_cached: Any) -> Mapping[str, object]:
        # Qwen3-VL returns resolved options here, from which `Context` has removed ours.
        kwargs = super()._get_cache_missing_processor_kwargs(inputs, mm_is_cached)
        return {**options.without(kwargs), **options.only(inputs.hf_processor_mm_kwargs)}

    def _apply_hf_processor_main(self, mm_items: MultiModalDataItems, hf_kwargs: Mapping[str, object]) -> Any:
        return super()._apply_hf_processor_main(mm_items, options.without(hf_kwargs))

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, options.without(hf_processor_mm_kwargs), out_mm_kwargs)
        wanted = self.info.options(hf_processor_mm_kwargs)
        if wanted is None:
            return updates

        def shorten(update: PromptUpdate, number: int) -> PromptUpdateDetails:
            details = update._resolve_content(number)
            ids, embedded = torch.tensor(details.full), self.embedded(details)
            item = out_mm_kwargs[update.modality][number]
            units = self.units(update.modality, item, ids[embedded])
            made = plan.make(wanted, *(units if isinstance(units, tuple) else (units,)))
            if not made.gone:
                return details
            item[plan.FIELD] = MultiModalFieldElem(made.pack(), MultiModalBatchedField(keep_on_cpu=True))
            left = ~embedded
            left[embedded] = ~made.removed
            embedded = embedded[left]
            return Shortened(ids[left].tolist(), lambda _: embedded, len(made.units))

        return [
            replace(update, replacement=lambda n, u=update: shorten(u, n)) if update.modality in VISUAL else update
            for update in updates
        ]

    def _apply_prompt_updates(self, token_ids: list[int], mm_prompt_updates: Any) -> Any:
        for modality, items in mm_prompt_updates.items():
            for update in (update for updates in items for update in updates):
                if isinstance(content := update.content, Shortened):
                    metrics.count(modality, content.before, int(content.is_embed(content.full).sum()))
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


@contextlib.contextmanager
def forgotten_if_rejected(cache: Any, request: Any) -> Iterator[None]:
    """If a check of a processed request raises an error, removes its items from vLLM's list of those that the engine
    has (`cache`, if there is one): the engine does not get this request, and would miss them in the next one."""
    try:
        yield
    except ValueError:
        for hashes in request["mm_hashes"].values() if cache is not None else ():
            for mm_hash in hashes:
                cache.invalidate(mm_hash)
        raise


@dataclass
class Shortened(PromptUpdateDetails):
    """The tokens that replace an item; without compression, `before` of them would stand for embeddings."""

    before: int = 0


def equal_units(ids: Tensor, size: int) -> Tensor:
    """Returns units of `size` rows each, for the placeholder ids [N]."""
    if len(ids) % size:
        raise ValueError(f"{len(ids)} embeddings of an image or video are not whole units of {size}")
    return torch.arange(len(ids)) // size


def serve(processor: type[Processor], info: type[Info] = Info) -> Any:
    """Returns a decorator for a subclass of a vLLM model. It registers that model's input processing with these classes
    mixed in."""

    def register(model: M) -> M:
        factory = model._processor_factory  # of vLLM's model
        mixed = [
            type(ours.__name__, (ours, theirs), {})
            for ours, theirs in ((processor, factory.processor), (info, factory.info))
        ]
        return MULTIMODAL_REGISTRY.register_processor(mixed[0], info=mixed[1], dummy_inputs=factory.dummy_inputs)(model)

    return register
