"""Corrects the encoder's budget, and rejects requests that would stop the engine or never end.

vLLM counts the rows of an item after compression, but the encoder runs all of them. vLLM packs images and videos into
one pass of the encoder, up to a number of embeddings for which it has measured the memory. It assumes one embedding per
placeholder of an item. Compression lowers that number, so without this correction a pass would get several times as
many embeddings. It also rejects items that exceed this number.
"""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.input_processor import InputProcessor

from ..engines import options, plan
from . import processing
from .compress import check_lora


def count_whole_items() -> None:
    """Patches the scheduler to spend, for each item of a pass, its rows before compression. A second call does
    nothing."""
    schedule = Scheduler._try_schedule_encoder_inputs
    if hasattr(schedule, "__wrapped__"):
        return

    @functools.wraps(schedule)
    def whole(
        self: Any, request: Any, computed: int, new: int, budget: int, shift_computed_tokens: int = 0
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        items, new, left, *others = schedule(self, request, computed, new, budget, shift_computed_tokens)
        spent = 0
        for item in items:
            feature = request.mm_features[item]
            made = plan.of(feature.data)
            spent += feature.mm_position.get_num_embeds() if made is None else made.encoded
            if spent > budget:  # the step ends before this item
                before = max(0, feature.mm_position.offset - computed - shift_computed_tokens)
                return whole(self, request, computed, before, budget, shift_computed_tokens)
        return items, new, budget - spent if items else left, *others

    Scheduler._try_schedule_encoder_inputs = whole


def check_whole_items() -> None:
    """Patches the check of a request. A second call does nothing.

    ValueError is raised by
    - an item with more rows before compression than a pass of the encoder may have, as without compression; it would
      never be scheduled,
    - `prompt_embeds` beside images or videos of a model with M-RoPE: the model would look for positions at the end of
      its embeddings, as in those of images, and stop the engine,
    - an item that another process has shortened for a model with M-RoPE, in an engine that was started without
      `apet_keep`: the model stops the engine,
    - a shortened item where LoRA reaches the encoder: vLLM would apply it to as many rows as are kept.
    """
    check = InputProcessor._validate_model_input
    if hasattr(check, "__wrapped__"):
        return

    @functools.wraps(check)
    def whole(self: Any, prompt_input: Any, prompt_type: str) -> None:
        check(self, prompt_input, prompt_type)
        if prompt_input["type"] != "multimodal":
            return
        at_start = options.of(self.model_config.multimodal_config.mm_processor_kwargs or {})
        with processing.forgotten_if_rejected(self.renderer.mm_processor_cache, prompt_input):
            if at_start and self.model_config.uses_mrope and "prompt_embeds" in prompt_input["mm_kwargs"]:
                raise ValueError(
                    "prompt_embeds beside images or videos are not supported with apet_keep: they have no M-RoPE "
                    "positions"
                )
            for modality, items in prompt_input["mm_kwargs"].items():
                for made in filter(None, map(plan.of, items)):
                    if at_start is None and self.model_config.uses_mrope:
                        raise ValueError(
                            f"the {modality} was shortened with apet_keep, but this engine was started without it"
                        )
                    check_lora(self.lora_config)
                    if made.encoded > self.mm_encoder_cache_size:
                        raise ValueError(
                            f"the {modality} has {made.encoded} tokens before compression, and the encoder's budget "
                            f"is {self.mm_encoder_cache_size}: give it in a smaller size, or start the engine with a "
                            "larger max_num_batched_tokens"
                        )

    InputProcessor._validate_model_input = whole
