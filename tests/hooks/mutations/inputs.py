"""Possible changes in further arguments of the language model, and in embeddings, pixels and its configuration."""

# ruff: noqa: E501 - an edit is on one line, like the source that it edits
from __future__ import annotations

import inspect
import re
from typing import Any

import transformers

from .edits import ALL, Classes, NotThisVersion, mutation, source_of

# ---- further arguments along the sequence


@mutation(*ALL)
def layer_argument_along_the_sequence(c: Classes) -> None:
    """The layers get a new argument [B, L]."""
    c.edit(
        c.lm,
        c.layer_call("position_embeddings=position_embeddings", "position_embeddings=position_embeddings, gate=gate"),
        (r"\n    position_embeddings = ", r"\n    gate = torch.ones(hidden_states.shape[:2])\g<0>"),
    )
    c.edit(
        c.layer,
        (r"\*\*kwargs: ", "gate=None, **kwargs: "),
        (r"\n    return hidden_states", r"\n    hidden_states = hidden_states * gate[..., None]\g<0>"),
    )


@mutation(*ALL)
def layer_argument_along_the_sequence_with_channels(c: Classes) -> None:
    """The layers get a new argument [B, L, D]."""
    c.edit(
        c.lm,
        c.layer_call(
            r"position_embeddings=position_embeddings", "position_embeddings=position_embeddings, added=added"
        ),
        (r"\n    position_embeddings = ", r"\n    added = torch.zeros_like(hidden_states)\g<0>"),
    )
    c.edit(
        c.layer,
        (r"\*\*kwargs: ", "added=None, **kwargs: "),
        (r"\n    return hidden_states", r"\n    hidden_states = hidden_states + added\g<0>"),
    )


@mutation("llava", "qwen2_5_vl", both=r"DecoderLayer got an attribute first of shape \(.*\) in this call")
def first_states_added_in_each_layer(c: Classes) -> None:
    """They are also subtracted again. They are an attribute of the layers, so no argument contains them."""
    c.edit(
        c.lm,
        (r"\n( *)position_embeddings = ", r"\n\1for layer in self.layers:\n\1    layer.first = hidden_states\g<0>"),
    )
    c.edit(c.layer, (r"\n    return hidden_states", r"\n    hidden_states = hidden_states + 0 * self.first\g<0>"))


@mutation("llava", "qwen2_5_vl", says=r"Model got an attribute first of shape \(.*\) in this call")
def embeddings_added_in_the_language_model(c: Classes) -> None:
    """They are also subtracted again. They are an attribute of the language model, so no argument contains them."""
    c.edit(c.core, (r"\n( *)outputs = self\.language_model", r"\n\1self.language_model.first = inputs_embeds\g<0>"))
    c.edit(c.lm, (r"\n( *)hidden_states = inputs_embeds", r"\g<0> + 0 * self.first"))


@mutation(*ALL)
def language_model_argument_along_the_sequence(c: Classes) -> None:
    """The language model gets a new argument [B, L]."""
    c.edit(
        c.core,
        c.lm_call(
            r"inputs_embeds=inputs_embeds", "inputs_embeds=inputs_embeds, gate=torch.ones(inputs_embeds.shape[:2])"
        ),
    )
    c.edit(
        c.lm,
        (r"\*\*kwargs: ", "gate=None, **kwargs: "),
        (
            r"\n    hidden_states = inputs_embeds",
            r"\n    hidden_states = inputs_embeds if gate is None else inputs_embeds * gate[..., None]",
        ),
    )


@mutation("llava", "qwen2_5_vl")
def language_model_argument_of_the_visual_tokens(c: Classes) -> None:
    """The language model gets a new argument [visual tokens, D], and adds it to its states."""
    c.edit(
        c.core,
        (
            r"\n( *)inputs_embeds = inputs_embeds\.masked_scatter\((\w*image_mask), (\w+)\)",
            r"\g<0>\n\1kwargs['deep'] = [\3 * 0]\n\1kwargs['deep_mask'] = \2[..., 0]",
        ),
    )
    c.edit(
        c.lm,
        (r"\*\*kwargs: ", "deep=None, deep_mask=None, **kwargs: "),
        (
            r"\n( *)hidden_states = inputs_embeds",
            r"\g<0>\n\1if deep is not None:\n\1    hidden_states = hidden_states.masked_scatter(deep_mask[..., None], hidden_states[deep_mask] + deep[0])",
        ),
    )


@mutation("llava", says="called with deep of shape")
def language_model_argument_of_the_visual_tokens_and_no_mask(c: Classes) -> None:
    """The language model gets a new argument [visual tokens, D], and finds their places itself."""
    c.edit(
        c.core,
        (
            r"\n( *)inputs_embeds = inputs_embeds\.masked_scatter\((\w*image_mask), (\w+)\)",
            r"\g<0>\n\1kwargs['deep'] = [\3 * 0]\n\1self.language_model.deep_mask = \2[..., 0]",
        ),
    )
    c.edit(
        c.lm,
        (r"\*\*kwargs: ", "deep=None, **kwargs: "),
        (
            r"\n( *)hidden_states = inputs_embeds",
            r"\g<0>\n\1if deep is not None:\n\1    hidden_states = hidden_states.masked_scatter(self.deep_mask[..., None], hidden_states[self.deep_mask] + deep[0])",
        ),
    )


# ---- embeddings, placeholders and pixels


@mutation("llava", "qwen2_5_vl")
def embeddings_scaled_in_the_language_model(c: Classes) -> None:
    c.edit(c.core, c.lm_call("inputs_embeds=inputs_embeds", "inputs_embeds=inputs_embeds / 2"))
    c.edit(c.lm, (r"\n( *)hidden_states = inputs_embeds", r"\g<0> * 2"))


@mutation("llava", says="without embeddings|calls no module with decoder layers with embeddings")
def language_model_embeds_the_text(c: Classes) -> None:
    """The language model gets ids, and the features of the images."""
    c.edit(
        c.core,
        (
            r"\n( *)inputs_embeds = inputs_embeds\.masked_scatter\((\w*image_mask), (\w+)\)",
            r"\n\1kwargs['images'] = \3\n\1kwargs['where'] = \2",
        ),
        c.lm_call("inputs_embeds=inputs_embeds", "input_ids=input_ids"),
    )
    c.edit(
        c.lm,
        (r"\*\*kwargs: ", "images=None, where=None, **kwargs: "),
        (
            r"\n( *)hidden_states = inputs_embeds",
            r"\n\1hidden_states = inputs_embeds if images is None else inputs_embeds.masked_scatter(where, images)",
        ),
    )


@mutation("llava", says="no argument known for embeds")
def embeddings_renamed(c: Classes) -> None:
    c.rename_for_lm("inputs_embeds", "embeddings")


@mutation("llava", says="has image_token_id=-1")
def placeholder_moved_in_the_configuration(c: Classes) -> None:
    config = c.model.config_class

    def change(this: Any) -> None:
        this.placeholder = this.image_token_id
        this.image_token_id = -1  # its type is checked

    c.after_init(config, change)
    for owner in (c.core,):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function) and "config.image_token_id" in source_of(owner, name):
                c.edit(owner, (r"config\.image_token_id", "config.placeholder"), method=name)


@mutation(*ALL, inputs={"pixel_values": "image_pixels"}, faithful=False, says="image_pixels")
def pixels_renamed(c: Classes) -> None:
    """The caller passes image_pixels. (generate() does not support that name, and drops them.)"""
    for owner in (c.model, c.core):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function) and re.search(r"\bpixel_values\b", source_of(owner, name)):
                c.edit(owner, (r"\bpixel_values\b", "image_pixels"), method=name)


# ---- the configuration


@mutation("qwen2_5_vl", both="layers of type attention")
def types_of_layers_renamed(c: Classes) -> None:
    for name in ("DYNAMIC_LAYER_TYPE_MAPPING", "STATIC_LAYER_TYPE_MAPPING"):
        if not hasattr(transformers.cache_utils, name):
            raise NotThisVersion(f"transformers.cache_utils has no {name}")
        known = getattr(transformers.cache_utils, name)
        c.monkeypatch.setitem(known, "attention", known["full_attention"])
    c.after_init(c.lm, lambda this: setattr(this.config, "layer_types", ["attention"] * len(this.layers)))
    c.edit(c.lm, ("'full_attention'", "'attention'"))


@mutation("llava", "qwen2_5_vl", says="has no _attn_implementation")
def implementation_of_attention_renamed(c: Classes) -> None:
    """The attribute of the language model's configuration is renamed."""

    class Config:
        def __init__(self, config: Any):
            self.__dict__["config"] = config

        def __getattr__(self, name: str) -> Any:
            if name == "_attn_implementation":
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
            return getattr(self.__dict__["config"], "_attn_implementation" if name == "attention" else name)

    c.after_init(c.lm, lambda this: setattr(this, "config", Config(this.config)))
    c.edit(c.lm, (r"config=self\.config|'config': self\.config", r"\g<0>.config"))  # of masks
