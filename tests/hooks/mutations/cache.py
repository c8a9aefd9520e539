"""Possible changes of the cache."""

from __future__ import annotations

import copy
import inspect
import re
from typing import Any

import transformers
from transformers import generation

from .edits import ALL, CACHE, Classes, bare, mutation, renamed, source_of


@mutation(*ALL)
def core_cache_renamed(c: Classes) -> None:
    c.edit(c.core, renamed(CACHE, "kv"))
    c.edit(c.model, (rf"(= self\.model\([^\n]*?){CACHE}=", r"\g<1>kv="))


@mutation("llava")
def core_cache_renamed_without_annotation(c: Classes) -> None:
    c.edit(c.core, renamed(CACHE, "kv"), bare("kv"))
    c.edit(c.model, (rf"(= self\.model\([^\n]*?){CACHE}=", r"\g<1>kv="))


@mutation(*ALL)
def language_model_cache_renamed(c: Classes) -> None:
    c.rename_for_lm(CACHE, "kv")


@mutation(*ALL, says="no argument known for cache")
def language_model_cache_renamed_without_annotation(c: Classes) -> None:
    c.rename_for_lm(CACHE, "kv", bare("kv"))


@mutation(*ALL)
def layer_cache_renamed(c: Classes) -> None:
    c.rename_for_layers(CACHE, "kv")


@mutation(*ALL, says="no argument known for cache")
def layer_cache_renamed_without_annotation(c: Classes) -> None:
    c.rename_for_layers(CACHE, "kv", bare("kv"))


@mutation("llava")
def cache_renamed_in_generate_too(c: Classes) -> None:
    """The cache is also renamed in the core model and the model, but not in outputs and in the language model."""
    word = rf"(?<![\w.]){CACHE}(?!\w)"
    for owner in (generation.GenerationMixin, c.model, c.core):
        for name, function in list(vars(owner).items()):
            if not inspect.isfunction(function) or not re.search(word, source := source_of(owner, name)):
                continue
            changed = re.sub(word, "memory", source)
            changed = re.sub(r"(\w*Output\w*\([^\n]*?)\bmemory=", rf"\1{CACHE}=", changed)
            changed = re.sub(r"(self\.language_model\([^\n]*?)\bmemory=", rf"\1{CACHE}=", changed)
            changed = changed.replace("'memory' in outputs", f"'{CACHE}' in outputs")
            changed = changed.replace("outputs['memory']", f"outputs['{CACHE}']")
            c.edit(owner, (r"(?s)\A.*\Z", changed.replace("\\", r"\\")), method=name)


class Subclass(transformers.DynamicCache):
    """A cache of another class."""


class Wrapper:
    """An object that works as a cache but is not an instance of Cache."""

    def __init__(self, **kwargs: Any):
        self.inner = transformers.DynamicCache(**kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


@mutation(*ALL)
def cache_of_a_subclass(c: Classes) -> None:
    for module in (inspect.getmodule(generation.GenerationMixin), c.decoder_module):
        c.monkeypatch.setattr(module, "DynamicCache", Subclass)


@mutation("llava", "qwen2_5_vl", says="a cache of type Wrapper")
def cache_that_is_none(c: Classes) -> None:
    for module in (inspect.getmodule(generation.GenerationMixin), c.decoder_module):
        c.monkeypatch.setattr(module, "DynamicCache", Wrapper)


@mutation("llava", says="DecoderLayer was called with a cache of type View")
def cache_wrapped_in_the_language_model(c: Classes) -> None:
    """The layers get an object that is not a Cache."""

    class View:
        def __init__(self, cache: Any):
            self.cache = cache

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["cache"], name)

    c.edit(
        c.lm,
        c.layer_call(f"{CACHE}={CACHE}", f"{CACHE}=View({CACHE}) if {CACHE} is not None else None"),
        more={"View": View},
    )


@mutation("llava", "qwen3_vl", says="a cache of type EncoderDecoderCache")
def cache_of_an_encoder_and_a_decoder(c: Classes) -> None:
    def both(**kwargs: Any) -> transformers.EncoderDecoderCache:
        return transformers.EncoderDecoderCache(
            transformers.DynamicCache(**kwargs), transformers.DynamicCache(**kwargs)
        )

    c.monkeypatch.setattr(inspect.getmodule(generation.GenerationMixin), "DynamicCache", both)
    c.edit(c.attention, (rf"{CACHE}\.update\(", f"getattr({CACHE}, 'self_attention_cache', {CACHE}).update("))


@mutation("llava", "qwen2_5_vl")
def cache_made_anew_by_the_language_model(c: Classes) -> None:
    """The layers fill another cache than the given one; the new one is returned in the output."""
    c.edit(
        c.lm,
        (r"\n( *)(\w+) = inputs_embeds\n", rf"\n\1{CACHE} = copy.copy({CACHE})\n\1\2 = inputs_embeds\n"),
        more={"copy": copy},
    )


@mutation("llava", "qwen2_5_vl", faithful=False, says="was called with no cache in a step of generate")
def cache_lost_after_the_prefill(c: Classes) -> None:
    c.edit(
        generation.GenerationMixin,
        (rf"model_kwargs\['{CACHE}'\] = outputs\['?{CACHE}'?\]", "pass"),
        method="_update_model_kwargs_for_generation",
    )
    c.edit(
        generation.GenerationMixin,
        (rf"model_inputs\['{CACHE}'\] = {CACHE}", f"model_inputs['{CACHE}'] = {CACHE} if is_first_iteration else None"),
        method="prepare_inputs_for_generation",
    )


@mutation("llava", "qwen3_vl")
def cache_cropped_and_the_last_token_given_again(c: Classes) -> None:
    c.edit(
        generation.GenerationMixin,
        (
            r"\n( *)model_inputs = \{\}\n",
            rf"\n\1model_inputs = {{}}\n\1if next_sequence_length == 1:\n\1    {CACHE}.crop(-1)\n"
            r"\1    next_sequence_length = 2\n",
        ),
        method="prepare_inputs_for_generation",
    )


@mutation("llava", "qwen2_5_vl")
def outputs_of_the_language_model_renamed(c: Classes) -> None:
    Output = transformers.utils.ModelOutput
    c.edit(
        c.lm,
        (
            r"return BaseModelOutputWithPast\(last_hidden_state=(\w+), \w+=\w+\)",
            rf"return Output(states=\1, memory={CACHE})",
        ),
        more={"Output": Output},
    )
    c.edit(
        c.core,
        (
            r"\n( *)return (\w+)\(\*\*outputs",
            rf"\n\1return \2(last_hidden_state=outputs.states, {CACHE}=outputs.memory",
        ),
    )


@mutation("llava", "qwen2_5_vl")
def language_model_returns_a_tuple(c: Classes) -> None:
    c.edit(
        c.lm,
        (r"@capture_outputs\n", ""),
        (r"return BaseModelOutputWithPast\(last_hidden_state=(\w+), \w+=\w+\)", rf"return (\1, {CACHE})"),
    )
    c.edit(
        c.core, (r"\n( *)return (\w+)\(\*\*outputs", rf"\n\1return \2(last_hidden_state=outputs[0], {CACHE}=outputs[1]")
    )


@mutation(*ALL)
def cache_handed_on_in_another_field(c: Classes) -> None:
    """The cache is in another field of the outputs of the core model and the model, where generate() looks for it."""
    Output = transformers.utils.ModelOutput
    c.edit(
        c.core,
        (r"return \w+\(\*\*outputs", rf"return Output(last_hidden_state=outputs[0], memory=outputs.{CACHE}"),
        more={"Output": Output},
    )
    c.edit(
        c.model,
        (r"return \w+\(loss=[^\n]*", r"return Output(logits=logits, memory=outputs.memory)"),
        more={"Output": Output},
    )
    c.edit(
        generation.GenerationMixin,
        (rf"'{CACHE}' in outputs", "'memory' in outputs"),
        (rf"outputs\['{CACHE}'\]", "outputs['memory']"),
        method="_update_model_kwargs_for_generation",
    )


@mutation("llava", "qwen2_5_vl")
def layers_return_a_tuple(c: Classes) -> None:
    c.edit(c.layer, (r"return hidden_states\Z", "return (hidden_states, None)"))
    c.edit(c.lm, (r"(= decoder_layer\([^\n]*\))\n", r"\1[0]\n"))
