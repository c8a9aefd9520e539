"""Possible changes in how the language model and the layers are called."""

# ruff: noqa: E501 - an edit is on one line, like the source that it edits
from __future__ import annotations

import ast
import functools
import inspect
import itertools
import re
from typing import Any

import torch
import transformers
from torch import nn

from .edits import ALL, CACHE, Classes, mutation, renamed, source_of


@mutation("llava", "qwen3_vl", says="no argument known for .*hidden")
def hidden_states_renamed(c: Classes) -> None:
    c.edit(c.layer, renamed("hidden_states", "x"))


@mutation("llava", says="no argument known for .*hidden")
def hidden_states_renamed_and_given_by_keyword(c: Classes) -> None:
    c.edit(c.layer, renamed("hidden_states", "x"))
    c.edit(c.lm, (r"decoder_layer\(hidden_states", "decoder_layer(x=hidden_states"))


@mutation(*ALL)
def hidden_states_given_by_keyword(c: Classes) -> None:
    c.edit(c.lm, (r"decoder_layer\(hidden_states", "decoder_layer(hidden_states=hidden_states"))


def in_order(function: Any, call: str) -> str:
    """Changes a call by keyword to one with as many positional arguments as its function takes."""
    (expression,) = ast.parse(call.strip()).body
    given = expression.value
    assert isinstance(given, ast.Call)
    names = [n for n, p in inspect.signature(function).parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD][1:]
    keywords = {k.arg: k.value for k in given.keywords}
    by_position = list(given.args)
    last = max(i for i, name in enumerate(names) if name in keywords)
    for name in names[len(by_position) : last + 1]:
        by_position.append(keywords.pop(name, ast.Constant(None)))
    given.args = by_position
    given.keywords = [ast.keyword(name, value) for name, value in keywords.items()]
    return ast.unparse(expression)


@mutation(*ALL)
def layers_called_by_position(c: Classes) -> None:
    call = re.search(r"= (decoder_layer\([^\n]*\))\n", source_of(c.lm, "forward"))[1]
    c.edit(c.lm, (re.escape(call), in_order(c.layer.forward, call).replace("\\", "")))


@mutation("llava")
def language_model_called_by_position(c: Classes) -> None:
    call = re.search(r"= (self\.language_model\([^\n]*\))\n", source_of(c.core, "forward"))[1]
    c.edit(c.core, (re.escape(call), in_order(c.lm.forward, call)))


class Around(nn.Module):
    """A module around a layer, as of libraries for checkpointing and offloading."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class AroundNamed(Around):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.inner(hidden_states, *args, **kwargs)


def wrap(c: Classes, cls: type) -> None:
    def change(this: nn.Module) -> None:
        for i, layer in enumerate(this.layers):
            this.layers[i] = cls(layer)

    c.after_init(c.lm, change)


@mutation("llava", "qwen2_5_vl")
def layers_wrapped(c: Classes) -> None:
    wrap(c, Around)


@mutation("llava")
def layers_wrapped_and_called_by_keyword(c: Classes) -> None:
    wrap(c, Around)
    hidden_states_given_by_keyword(c)


@mutation(
    "llava",
    "qwen3_vl",
    first="AroundNamed.* has no argument known for cache",
    both="layers do not share one rotary embedding",
)
def layers_wrapped_and_one_argument_named(c: Classes) -> None:
    wrap(c, AroundNamed)


@mutation("llava", "qwen2_5_vl")
def language_model_wrapped(c: Classes) -> None:
    class AroundDecoder(Around):
        def __getattr__(self, name: str) -> Any:
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

    c.after_init(c.core, lambda this: setattr(this, "language_model", AroundDecoder(this.language_model)))


@mutation("llava", "qwen2_5_vl")
def layers_run_in_two_groups(c: Classes) -> None:
    loop = re.search(r"\n    for [^\n]*\n(        [^\n]*\n|\n)*", source_of(c.lm, "forward"))[0]
    if c.name == "llava":
        halves = [re.sub(r"self\.layers\[[^\]]*\]", f"self.layers[{part}]", loop) for part in (":2", "2:")]
    else:
        halves = [
            loop.replace("enumerate(self.layers)", f"list(enumerate(self.layers))[{part}]") for part in (":2", "2:")
        ]
    c.edit(c.lm, (re.escape(loop), "".join(halves).replace("\\", "")))


@mutation("llava", both="has 3 layers, and its configuration 4")
def layers_in_two_lists(c: Classes) -> None:
    def change(this: nn.Module) -> None:
        this.layers_late = this.layers[3:]
        this.layers = this.layers[:3]

    c.after_init(c.lm, change)
    c.edit(c.lm, (r"self\.layers\[:self\.config\.num_hidden_layers\]", "[*self.layers, *self.layers_late]"))


@mutation("llava")
def layers_renamed(c: Classes) -> None:
    def change(this: nn.Module) -> None:
        this.layers_ = this.layers
        del this.layers

    c.after_init(c.lm, change)
    c.edit(c.lm, (r"self\.layers", "self.layers_"))


@mutation("llava", "qwen2_5_vl", says=r"called \w+ 8 times to generate 4 tokens, expected one call for each")
def language_model_called_twice(c: Classes) -> None:
    """The first call only measures something."""
    c.edit(
        c.core,
        (
            r"\n( *)outputs = (self\.language_model\([^\n]*\))",
            r"\n\1_ = self.language_model(inputs_embeds=inputs_embeds[:, :1], use_cache=False)\g<0>",
        ),
    )


def in_parts(language_model: nn.Module, *, ends: Any, inputs_embeds: torch.Tensor, **given: Any) -> Any:
    """Calls the language model for the columns up to each end, and then for the rest. ends: a function of the length."""
    length, mask, positions = inputs_embeds.shape[1], given.get("attention_mask"), given.get("position_ids")
    columns = given.get("cache_position")  # of earlier versions
    if length > 1 and given.get(CACHE) is None and given.get("use_cache"):  # earlier versions begin without a cache
        given[CACHE] = transformers.DynamicCache()
    cuts, states = [0, *(ends(length) if length > 1 else ()), length], []
    for start, end in itertools.pairwise(cuts):
        if positions is not None:
            given["position_ids"] = positions[..., start:end]
        if columns is not None:
            given["cache_position"] = columns[start:end]
        if mask is not None:
            given["attention_mask"] = mask[:, : end - length or None] if mask.dim() == 2 else mask[:, :, start:end]
        output = language_model(inputs_embeds=inputs_embeds[:, start:end], **given)
        states.append(output.last_hidden_state)
    output.last_hidden_state = torch.cat(states, 1)
    return output


def split(c: Classes, ends: Any) -> None:
    more = {"in_parts": functools.partial(in_parts, ends=ends)}
    c.edit(c.core, (r"self\.language_model\(", "in_parts(self.language_model, "), more=more)


@mutation("llava", "qwen2_5_vl")
def prefill_of_the_images_and_then_of_the_rest(c: Classes) -> None:
    split(c, lambda length: [length - 3])


@mutation("llava", "qwen2_5_vl")
def prefill_of_the_first_token_and_then_of_the_rest(c: Classes) -> None:
    split(c, lambda length: [1])


@mutation("llava", "qwen2_5_vl")
def prefill_in_four_calls(c: Classes) -> None:
    split(c, lambda length: [1, length - 3, length - 1])


@mutation("llava", "qwen2_5_vl", says=r"of its \d+ placeholders .* one call must have all of them")
def prefill_in_two_halves(c: Classes) -> None:
    """The end of the first half lies within an image."""
    split(c, lambda length: [length // 2])


@mutation(
    "llava",
    says=r"columns 3 to \d+ of a prompt of \d+ tokens, and with a cache of 0 tokens, not the 3 of the parts before",
    faithful=False,
)
def prefill_in_two_calls_with_other_caches(c: Classes) -> None:
    """Each call gets a new cache, so the second one does not see what the first one has read."""

    def apart(
        language_model: nn.Module, *, inputs_embeds: torch.Tensor, attention_mask: Any, position_ids: Any, **given: Any
    ) -> Any:
        cuts = [0, 3, inputs_embeds.shape[1]] if inputs_embeds.shape[1] > 1 else [0, 1]
        for start, end in itertools.pairwise(cuts):
            given[CACHE] = transformers.DynamicCache()
            output = language_model(inputs_embeds=inputs_embeds[:, start:end], **given)
        return output

    c.edit(c.core, (r"self\.language_model\(", "apart(self.language_model, "), more={"apart": apart})


@mutation("llava", says=r"with \d+ of the \d+ tokens of a prompt", faithful=False)
def prefill_without_the_end(c: Classes) -> None:
    def cut(
        language_model: nn.Module, *, inputs_embeds: torch.Tensor, attention_mask: Any, position_ids: Any, **given: Any
    ) -> Any:
        inputs_embeds = inputs_embeds[:, :-1] if inputs_embeds.shape[1] > 1 else inputs_embeds
        return language_model(inputs_embeds=inputs_embeds, **given)

    c.edit(c.core, (r"self\.language_model\(", "cut(self.language_model, "), more={"cut": cut})
