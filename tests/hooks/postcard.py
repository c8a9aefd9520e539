"""A model that does not follow adapters or transformers' conventions: other names, another structure.

An image is 25 patches of 12 values; its first token is a summary, which must be kept. The core model is `album`, its
language model `reader`.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

PATCHES = 25
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


class PostcardConfig(PretrainedConfig):
    model_type = "postcard"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012

    def __init__(self, text_config: dict | LlamaConfig | None = None, image_token_id: int = 0, **kwargs: Any):
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class Album(PreTrainedModel):
    config_class = PostcardConfig
    _supports_sdpa = True

    def __init__(self, config: PostcardConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.see = nn.Linear(12, width)
        self.mix = nn.Linear(width, width)
        self.reader = LlamaModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.reader.embed_tokens

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        x = self.reader.embed_tokens(input_ids)
        if pixel_values is not None:  # [images, PATCHES, 12]
            seen = self.see(pixel_values)
            seen = torch.cat([seen.mean(1, keepdim=True), self.mix(seen.tanh())], dim=1)  # [images, 1 + PATCHES, D]
            there = (input_ids == self.config.image_token_id)[..., None]
            x = x.masked_scatter(there.expand_as(x), seen.to(x.dtype))
        return self.reader(inputs_embeds=x, **kwargs)


class Answering(PreTrainedModel, GenerationMixin):
    """A core model, in the attribute named by `base_model_prefix`, with a head, so that it generates."""

    core_class: type[PreTrainedModel]
    _supports_sdpa = True

    def __init__(self, config: Any):
        super().__init__(config)
        setattr(self, self.base_model_prefix, self.core_class(config))
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
        if cache_position is not None:  # transformers 4
            given["cache_position"] = cache_position
        given[CACHE] = kwargs.get(CACHE)
        out = self.base_model(input_ids=input_ids, pixel_values=pixel_values, **given)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state), **{CACHE: getattr(out, CACHE)})

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        at = inputs.get("cache_position")
        if at is not None and at[0] != 0:  # transformers 4; 5 does that by itself
            inputs["pixel_values"] = None
        return inputs


class PostcardForGeneration(Answering):
    config_class = PostcardConfig
    base_model_prefix = "album"
    core_class = Album
