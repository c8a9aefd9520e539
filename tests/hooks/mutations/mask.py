"""Possible changes of the mask."""

# ruff: noqa: E501 - an edit is on one line, like the source that it edits
from __future__ import annotations

import functools
from typing import Any

from transformers import masking_utils

from .edits import CACHE, FIRST_LINE, Classes, mutation


@mutation("llava", "qwen3_vl", both="no argument known for mask")
def layer_mask_renamed(c: Classes) -> None:
    c.rename_for_layers("attention_mask", "mask")


@mutation("llava", "qwen2_5_vl", says="no argument known for mask")
def language_model_mask_renamed(c: Classes) -> None:
    c.rename_for_lm("attention_mask", "mask")


@mutation("llava", "qwen3_vl", says="no argument known for mask")
def language_model_mask_among_keywords(c: Classes) -> None:
    c.edit(
        c.lm,
        (r" attention_mask: [^=]*=None,", ""),
        (r"\n    if \(?input_ids is None", r"\n    attention_mask = kwargs.pop('attention_mask', None)\g<0>"),
    )


@mutation("llava", "qwen3_vl")
def layers_make_their_masks(c: Classes) -> None:
    """The layers build their masks from a mask [B, past + L]."""
    more = {
        "make": lambda layer, x, mask, cache: masking_utils.create_causal_mask(
            layer.self_attn.config, x, mask, cache, layer_idx=layer.self_attn.layer_idx
        )
    }
    c.edit(
        c.layer,
        (FIRST_LINE, rf"\n    attention_mask = make(self, hidden_states, attention_mask, {CACHE})\g<0>"),
        more=more,
    )
    c.edit(c.lm, (r"= create_causal_mask\([^\n]*\)", "= attention_mask"))


@mutation("llava", "qwen3_vl")
def core_makes_the_mask(c: Classes) -> None:
    """The core model passes a mask of four dimensions to the language model."""
    more = {"make": masking_utils.create_causal_mask}
    made = f"attention_mask = make(self.config.get_text_config(), inputs_embeds, attention_mask, {CACHE}, allow_is_causal_skip=False)"
    c.edit(c.core, (r"\n    outputs = self\.language_model", rf"\n    {made}\g<0>"), more=more)


@mutation("llava", "qwen3_vl", both=r"create_causal_mask\(config, heads, .* is not supported")
def masks_made_by_a_function_of_other_arguments(c: Classes) -> None:
    name = "create_causal_mask"
    c.edit(
        masking_utils,
        (rf"def {name}\(config: \w+, inputs_embeds: [\w.]+, ", f"def {name}(config, heads, inputs_embeds, "),
        method=name,
    )
    c.monkeypatch.setattr(c.decoder_module, name, getattr(masking_utils, name))
    c.edit(c.lm, (rf"{name}\(", f"{name}(heads=1, "))


@mutation("llava", "qwen3_vl", both="has no create_causal_mask")
def function_that_makes_masks_moved(c: Classes) -> None:
    c.monkeypatch.delattr(masking_utils, "create_causal_mask")


@mutation("llava", "qwen3_vl", both="a mask of type dict")
def function_that_makes_masks_returns_a_dictionary(c: Classes) -> None:
    name = "create_causal_mask"
    make = getattr(masking_utils, name)

    @functools.wraps(make)
    def changed(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"mask": make(*args, **kwargs)}

    c.monkeypatch.setattr(masking_utils, name, changed)
    c.monkeypatch.setattr(c.decoder_module, name, changed)
    c.edit(
        c.attention,
        (
            r"\n    input_shape",
            r"\n    attention_mask = attention_mask['mask'] if isinstance(attention_mask, dict) else attention_mask\n    input_shape",
        ),
    )


@mutation("llava", "qwen3_vl", both="a mask of type dict")
def masks_of_the_layers_in_a_dictionary(c: Classes) -> None:
    """Each layer takes its own mask from a dictionary."""
    c.edit(c.lm, c.layer_call(r"attention_mask=(\w+)", r"attention_mask={'full_attention': \g<2>}"))
    c.edit(c.layer, (FIRST_LINE, r"\n    attention_mask = attention_mask['full_attention']\g<0>"))
