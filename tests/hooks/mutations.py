"""What transformers might change next, applied to the installed one: source of its functions, edited and compiled anew.

A mutation must not change what the model that is not patched computes; so the recompute of the unchanged classes says
what is right. Edits are made in the source as `ast.unparse` writes it: one line to a statement, keywords as `name=`.
"""

# ruff: noqa: E501 - an edit is on one line, as the source that it edits
from __future__ import annotations

import ast
import copy
import functools
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from apet.hooks.calling import NAMES
from families import FAMILIES
from torch import nn
from transformers import generation, masking_utils

# What this version calls the cache, in the language model and in generate().
CACHE = next(n for n in NAMES["cache"] if n in inspect.signature(transformers.LlamaModel.forward).parameters)
DECODERS = {
    "llava": ("LlamaModel", "LlamaDecoderLayer", "LlamaAttention", "LlamaRotaryEmbedding"),
    "qwen2_5_vl": (
        "Qwen2_5_VLTextModel",
        "Qwen2_5_VLDecoderLayer",
        "Qwen2_5_VLAttention",
        "Qwen2_5_VLRotaryEmbedding",
    ),
    "qwen3_vl": (
        "Qwen3VLTextModel",
        "Qwen3VLTextDecoderLayer",
        "Qwen3VLTextAttention",
        "Qwen3VLTextRotaryEmbedding",
    ),
}


class NotThisVersion(Exception):
    """The source that a mutation edits is written otherwise in the installed transformers."""


class Classes:
    """The classes of a family, and edits of their functions until the test ends."""

    def __init__(self, name: str, monkeypatch: pytest.MonkeyPatch):
        self.name, self.monkeypatch, self.edited = name, monkeypatch, False
        self.model = getattr(transformers, FAMILIES[name].model)
        self.module = inspect.getmodule(self.model)
        self.core = getattr(self.module, self.model.__name__.replace("ForConditionalGeneration", "Model"))
        self.decoder_module = inspect.getmodule(transformers.LlamaModel) if name == "llava" else self.module
        self.lm, self.layer, self.attention, self.rotary = (getattr(self.decoder_module, n) for n in DECODERS[name])

    def edit(self, owner: Any, *changes: tuple[str, str], method: str = "forward", more: dict | None = None) -> None:
        """Replaces a function of a class or module by its edited source. changes: (regular expression, new text), each
        of which has to be found."""
        source = source_of(owner, method)
        for pattern, new in changes:
            source, count = re.subn(pattern, new, source)
            if not count:
                raise NotThisVersion(f"{owner.__name__}.{method} has no {pattern!r} in\n{source}")
        names = inspect.unwrap(vars(owner)[method]).__globals__ | (more or {})
        exec(compile(source, f"<{owner.__name__}.{method}, changed>", "exec"), names)
        self.monkeypatch.setattr(owner, method, names[method])
        self.edited = True

    def layer_call(self, pattern: str, new: str) -> tuple[str, str]:
        """A change within the call of a decoder layer."""
        return rf"(= decoder_layer\([^\n]*?){pattern}", rf"\g<1>{new}"

    def lm_call(self, pattern: str, new: str) -> tuple[str, str]:
        """A change within the core model's call of its language model."""
        return rf"(= self\.language_model\([^\n]*?){pattern}", rf"\g<1>{new}"

    def after_init(self, owner: type, change: Callable[[Any], None]) -> None:
        """Changes instances when they have been made."""
        init = owner.__init__

        def changed(this: Any, *args: Any, **kwargs: Any) -> None:
            init(this, *args, **kwargs)
            change(this)

        self.monkeypatch.setattr(owner, "__init__", changed)
        self.edited = True


def source_of(owner: Any, method: str) -> str:
    """The source of a function, normalized; without the decorator that reads sources to write documentation."""
    source = inspect.getsource(inspect.unwrap(vars(owner)[method]))
    (tree,) = ast.parse(f"class Indented:\n{source}" if source[0] == " " else source).body
    if isinstance(tree, ast.ClassDef):
        (tree,) = tree.body
    assert isinstance(tree, ast.FunctionDef)
    tree.decorator_list = [d for d in tree.decorator_list if "auto_docstring" not in ast.unparse(d)]
    return ast.unparse(tree)


# Where a decoder layer begins.
FIRST_LINE = r"\n    residual = [^\n]*(?=\n    hidden_states = self\.input_layernorm)"


def renamed(old: str, new: str) -> tuple[str, str]:
    """A local name or parameter, but no keyword of a call."""
    return rf"(?<![\w.'\"]){old}\b(?!=[^=]|['\"])", new


def parameter(old: str, new: str) -> list[tuple[str, str]]:
    """A parameter gets another name, annotated as it was."""
    return [renamed(old, new)]


def bare(name: str) -> tuple[str, str]:
    """A parameter loses its annotation."""
    return rf"\b{name}: [\w. |]+=", f"{name}="


@dataclass(frozen=True)
class Mutation:
    apply: Callable[[Classes], None]
    families: tuple[str, ...] = ("llava",)
    # What `patch` or the call says, by stage; a stage that is not here must give the right answers.
    says: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)  # what the arguments of a call are called
    faithful: bool = True  # the model that is not patched computes what it did


MUTATIONS: dict[str, Mutation] = {}
ALL = tuple(DECODERS)


def mutation(
    *families: str, says: str | None = None, first: str | None = None, both: str | None = None, **more: Any
) -> Callable[[Callable[[Classes], None]], Callable[[Classes], None]]:
    """Adds a mutation of these families. says: what an error says with the first stage and with both; first, both:
    where they differ, or one of them is right."""
    texts = {stage: text for stage, text in (("first", first or says), ("both", both or says)) if text is not None}

    def add(apply: Callable[[Classes], None]) -> Callable[[Classes], None]:
        MUTATIONS[apply.__name__] = Mutation(apply, families, texts, **more)
        return apply

    return add


# ---- the cache ------------------------------------------------------------------------------------------------------


@mutation(*ALL)
def core_cache_renamed(c: Classes) -> None:
    c.edit(c.core, *parameter(CACHE, "kv"))
    c.edit(c.model, (rf"(= self\.model\([^\n]*?){CACHE}=", r"\g<1>kv="))


@mutation("llava")
def core_cache_renamed_without_annotation(c: Classes) -> None:
    c.edit(c.core, *parameter(CACHE, "kv"), bare("kv"))
    c.edit(c.model, (rf"(= self\.model\([^\n]*?){CACHE}=", r"\g<1>kv="))


@mutation(*ALL)
def language_model_cache_renamed(c: Classes) -> None:
    c.edit(c.lm, *parameter(CACHE, "kv"))
    c.edit(c.core, c.lm_call(f"{CACHE}=", "kv="))


@mutation(*ALL, says="no argument known for cache")
def language_model_cache_renamed_without_annotation(c: Classes) -> None:
    c.edit(c.lm, *parameter(CACHE, "kv"), bare("kv"))
    c.edit(c.core, c.lm_call(f"{CACHE}=", "kv="))


@mutation(*ALL)
def layer_cache_renamed(c: Classes) -> None:
    c.edit(c.layer, *parameter(CACHE, "kv"))
    c.edit(c.lm, c.layer_call(f"{CACHE}=", "kv="))


@mutation(*ALL, says="no argument known for cache")
def layer_cache_renamed_without_annotation(c: Classes) -> None:
    c.edit(c.layer, *parameter(CACHE, "kv"), bare("kv"))
    c.edit(c.lm, c.layer_call(f"{CACHE}=", "kv="))


@mutation("llava")
def cache_renamed_in_generate_too(c: Classes) -> None:
    """And in the core model and the model; not in outputs and in the language model."""
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
    """What works as a cache and is none."""

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
    """The layers get something that is no Cache."""

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
    """Handed on in the output; the layers fill another than the one that was given."""
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
    """Of the outputs of the core model and the model, where generate() looks for it."""
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


# ---- the mask -------------------------------------------------------------------------------------------------------


@mutation("llava", "qwen3_vl", both="no argument known for mask")
def layer_mask_renamed(c: Classes) -> None:
    c.edit(c.layer, *parameter("attention_mask", "mask"))
    c.edit(c.lm, c.layer_call("attention_mask=", "mask="))


@mutation("llava", "qwen2_5_vl", says="no argument known for mask")
def language_model_mask_renamed(c: Classes) -> None:
    c.edit(c.lm, *parameter("attention_mask", "mask"))
    c.edit(c.core, c.lm_call("attention_mask=", "mask="))


@mutation("llava", "qwen3_vl", says="no argument known for mask")
def language_model_mask_among_keywords(c: Classes) -> None:
    c.edit(
        c.lm,
        (r" attention_mask: [^=]*=None,", ""),
        (r"\n    if \(?input_ids is None", r"\n    attention_mask = kwargs.pop('attention_mask', None)\g<0>"),
    )


@mutation("llava", "qwen3_vl")
def layers_make_their_masks(c: Classes) -> None:
    """From a mask [B, past + L]."""
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
    """The language model is given one of four dimensions."""
    more = {"make": masking_utils.create_causal_mask}
    made = f"attention_mask = make(self.config.get_text_config(), inputs_embeds, attention_mask, {CACHE}, allow_is_causal_skip=False)"
    c.edit(c.core, (r"\n    outputs = self\.language_model", rf"\n    {made}\g<0>"), more=more)


@mutation("llava", "qwen3_vl", both=r"create_causal_mask\(config, heads, .* is not called as apet knows it")
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
    """Each layer takes its own out of it."""
    c.edit(c.lm, c.layer_call(r"attention_mask=(\w+)", r"attention_mask={'full_attention': \g<2>}"))
    c.edit(c.layer, (FIRST_LINE, r"\n    attention_mask = attention_mask['full_attention']\g<0>"))


# ---- positions and rotary embeddings ----------------------------------------------------------------------------------


@mutation("llava", "qwen2_5_vl", says="no argument known for positions")
def language_model_positions_renamed(c: Classes) -> None:
    c.edit(c.lm, *parameter("position_ids", "positions"))
    c.edit(c.core, c.lm_call("position_ids=", "positions="))


@mutation("llava", "qwen2_5_vl", both="called with positions of shape")
def layer_positions_renamed(c: Classes) -> None:
    c.edit(c.layer, *parameter("position_ids", "positions"))
    c.edit(c.lm, c.layer_call("position_ids=", "positions="))


@mutation(*ALL, both="layers do not share one rotary embedding")
def layer_rotary_renamed(c: Classes) -> None:
    c.edit(c.layer, *parameter("position_embeddings", "rotary"))
    c.edit(c.lm, c.layer_call("position_embeddings=", "rotary="))


@mutation("llava", "qwen3_vl", both="layers do not share one rotary embedding")
def layer_rotary_split(c: Classes) -> None:
    c.edit(
        c.layer,
        (r"position_embeddings: tuple\[[^\]]*\]( \| None=None)?, ", ""),
        (r"\*\*kwargs: ", "cos=None, sin=None, **kwargs: "),
        ("position_embeddings=position_embeddings", "position_embeddings=(cos, sin)"),
    )
    c.edit(
        c.lm,
        c.layer_call(
            "position_embeddings=position_embeddings", "cos=position_embeddings[0], sin=position_embeddings[1]"
        ),
    )


@mutation("llava", both="layers do not share one rotary embedding")
def layer_makes_its_rotary_embeddings(c: Classes) -> None:
    """From position_ids."""
    made = c.rotary
    c.after_init(c.layer, lambda this: setattr(this, "rotary", made(this.self_attn.config)))
    c.edit(
        c.layer,
        (r" position_embeddings: [^=]*=None,", ""),
        ("position_embeddings=position_embeddings", "position_embeddings=self.rotary(hidden_states, position_ids)"),
    )
    c.edit(
        c.lm, c.layer_call("position_embeddings=position_embeddings, ", ""), (r"\n *position_embeddings = [^\n]*", "")
    )


@mutation("llava")
def layer_makes_its_rotary_embeddings_all_the_same(c: Classes) -> None:
    """From position_ids, and the argument is still there."""
    made = c.rotary
    c.after_init(c.layer, lambda this: setattr(this, "rotary", made(this.self_attn.config)))
    c.edit(
        c.layer,
        ("position_embeddings=position_embeddings", "position_embeddings=self.rotary(hidden_states, position_ids)"),
    )


@mutation("llava")
def attention_makes_rotary_embeddings(c: Classes) -> None:
    """From position_ids, and layers are given both."""
    made = c.rotary
    c.after_init(c.attention, lambda this: setattr(this, "rotary", made(this.config)))
    positions = "kwargs['position_ids']"
    if c.name != "llava":  # the layers get M-RoPE's positions, too
        c.edit(
            c.lm, c.layer_call(r"position_ids=\w+", "position_ids=text_position_ids, rotary_position_ids=position_ids")
        )
        positions = "kwargs.pop('rotary_position_ids')"
    c.edit(c.attention, (r"cos, sin = position_embeddings", f"cos, sin = self.rotary(hidden_states, {positions})"))


@mutation("llava", "qwen2_5_vl", both=r"takes \(x, position_ids, length\), where apet knows")
def rotary_called_with_another_argument(c: Classes) -> None:
    c.edit(c.rotary, ("@dynamic_rope_update\n", ""), (r"\(self, x, position_ids\)", "(self, x, position_ids, length)"))
    c.edit(c.lm, (r"(self\.rotary_emb\([^\n]*)\)\n", r"\1, length=1)\n"))


@mutation("llava", "qwen2_5_vl", both=r"takes \(x, positions\), where apet knows")
def rotary_argument_renamed(c: Classes) -> None:
    c.edit(c.rotary, ("@dynamic_rope_update\n", ""), *parameter("position_ids", "positions"))
    c.edit(
        c.lm,
        (
            r"self\.rotary_emb\(hidden_states, (position_ids=)?position_ids\)",
            "self.rotary_emb(hidden_states, positions=position_ids)",
        ),
    )


@mutation("llava", "qwen3_vl", both="was called with rotary embeddings")
def rotary_with_an_axis_for_heads(c: Classes) -> None:
    c.edit(
        c.rotary,
        (
            r"return \(cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\)\)",
            "return (cos.to(dtype=x.dtype)[:, None], sin.to(dtype=x.dtype)[:, None])",
        ),
    )
    c.edit(c.attention, (r"cos, sin = position_embeddings", "cos, sin = (t[:, 0] for t in position_embeddings)"))


@mutation("llava", "qwen2_5_vl")
def rotary_in_one_tensor(c: Classes) -> None:
    c.edit(
        c.rotary,
        (r"return \((cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\))\)", r"return torch.cat([\1], dim=-1)"),
    )
    c.edit(c.attention, (r"cos, sin = position_embeddings", "cos, sin = position_embeddings.chunk(2, dim=-1)"))


@mutation("llava", both="was called with rotary embeddings")
def rotary_before_the_sequence(c: Classes) -> None:
    """[L, B, d]: with as many rows as columns nothing would fail."""
    c.edit(
        c.rotary,
        (
            r"return \(cos\.to\(dtype=x\.dtype\), sin\.to\(dtype=x\.dtype\)\)",
            "return (cos.to(dtype=x.dtype).transpose(0, 1), sin.to(dtype=x.dtype).transpose(0, 1))",
        ),
    )
    c.edit(
        c.attention, (r"cos, sin = position_embeddings", "cos, sin = (t.transpose(0, 1) for t in position_embeddings)")
    )


@mutation("llava", "qwen3_vl", says="no argument known for positions")
def language_model_counts_its_positions(c: Classes) -> None:
    """And is told none."""
    if c.name == "llava":
        made = "attention_mask.cumsum(1)[:, -inputs_embeds.shape[1]:] - 1 if attention_mask is not None else None"
        c.edit(c.core, c.lm_call("position_ids=position_ids, ", ""))
        c.edit(
            c.lm,
            (r" position_ids: [^=]*=None,", ""),
            (r"\n    if position_ids is None", rf"\n    position_ids = {made}\g<0>"),
        )
    else:
        c.edit(c.core, c.lm_call("position_ids=position_ids", "places=position_ids"))
        c.edit(
            c.lm,
            (r"position_ids: ", "places: "),
            (r"\n    if position_ids is None", r"\n    position_ids = places\g<0>"),
        )


# ---- how things are called --------------------------------------------------------------------------------------------


@mutation("llava", "qwen3_vl", says="no argument known for .*hidden")
def hidden_states_renamed(c: Classes) -> None:
    c.edit(c.layer, *parameter("hidden_states", "x"))


@mutation("llava", says="no argument known for .*hidden")
def hidden_states_renamed_and_given_by_keyword(c: Classes) -> None:
    c.edit(c.layer, *parameter("hidden_states", "x"))
    c.edit(c.lm, (r"decoder_layer\(hidden_states", "decoder_layer(x=hidden_states"))


@mutation(*ALL)
def hidden_states_given_by_keyword(c: Classes) -> None:
    c.edit(c.lm, (r"decoder_layer\(hidden_states", "decoder_layer(hidden_states=hidden_states"))


def in_order(function: Any, call: str) -> str:
    """A call by keyword, with as many arguments by position as its function takes."""
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
    """A module around a layer, as checkpointing and offloading libraries put there."""

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


@mutation("llava", "qwen2_5_vl", says="but calls its language model with|the hooks are not right for")
def language_model_called_twice(c: Classes) -> None:
    """The first time to measure something."""
    c.edit(
        c.core,
        (
            r"\n( *)outputs = (self\.language_model\([^\n]*\))",
            r"\n\1_ = self.language_model(inputs_embeds=inputs_embeds[:, :1], use_cache=False)\g<0>",
        ),
    )


@mutation("llava", says="but calls its language model with|the hooks are not right for")
def prefill_in_two_calls(c: Classes) -> None:
    """Of the language model: images in the first, and the rest of the prompt in the second."""
    c.edit(
        c.core,
        (
            r"\n( *)outputs = self\.language_model\([^\n]*",
            rf"\n\1cut = inputs_embeds.shape[1] - (3 if inputs_embeds.shape[1] > 3 else 0)"
            rf"\n\1if cut < inputs_embeds.shape[1]:"
            rf"\n\1    self.language_model(attention_mask=attention_mask[:, :cut], position_ids=position_ids if position_ids is None else position_ids[:, :cut], {CACHE}={CACHE}, inputs_embeds=inputs_embeds[:, :cut])"
            rf"\n\1    position_ids, inputs_embeds = position_ids if position_ids is None else position_ids[:, cut:], inputs_embeds[:, cut:]"
            r"\g<0>",
        ),
    )


# ---- more along the sequence ------------------------------------------------------------------------------------------


@mutation(*ALL)
def layer_argument_along_the_sequence(c: Classes) -> None:
    """[B, L]"""
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
    """[B, L, D]"""
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


@mutation("llava", "qwen2_5_vl", both="the hooks are not right for")
def first_states_added_in_each_layer(c: Classes) -> None:
    """And taken away again: an attribute of the layers, which no argument shows."""
    c.edit(
        c.lm,
        (r"\n( *)position_embeddings = ", r"\n\1for layer in self.layers:\n\1    layer.first = hidden_states\g<0>"),
    )
    c.edit(c.layer, (r"\n    return hidden_states", r"\n    hidden_states = hidden_states + 0 * self.first\g<0>"))


@mutation(*ALL)
def language_model_argument_along_the_sequence(c: Classes) -> None:
    """[B, L]"""
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
    """[visual tokens, D], added in the language model."""
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
    """[visual tokens, D], and the language model knows where."""
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


# ---- embeddings, placeholders and pixels ------------------------------------------------------------------------------


@mutation("llava", "qwen2_5_vl")
def embeddings_scaled_in_the_language_model(c: Classes) -> None:
    c.edit(c.core, c.lm_call("inputs_embeds=inputs_embeds", "inputs_embeds=inputs_embeds / 2"))
    c.edit(c.lm, (r"\n( *)hidden_states = inputs_embeds", r"\g<0> * 2"))


@mutation("llava", says="without embeddings|the hooks are not right for")
def language_model_embeds_the_text(c: Classes) -> None:
    """It is given ids, and the features of the images."""
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
    c.edit(c.lm, *parameter("inputs_embeds", "embeddings"))
    c.edit(c.core, c.lm_call("inputs_embeds=", "embeddings="))


@mutation("llava", says="has none of image_token_id|has no image_token_id|the hooks are not right for")
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


@mutation(
    *ALL, inputs={"pixel_values": "image_pixels"}, faithful=False, says="image_pixels|the hooks are not right for"
)
def pixels_renamed(c: Classes) -> None:
    """A caller says image_pixels. (generate() does not know that, and leaves them out.)"""
    for owner in (c.model, c.core):
        for name, function in list(vars(owner).items()):
            if inspect.isfunction(function) and re.search(r"\bpixel_values\b", source_of(owner, name)):
                c.edit(owner, (r"\bpixel_values\b", "image_pixels"), method=name)


# ---- the configuration ------------------------------------------------------------------------------------------------


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
    """In the configuration of the language model."""

    class Config:
        def __init__(self, config: Any):
            self.__dict__["config"] = config

        def __getattr__(self, name: str) -> Any:
            if name == "_attn_implementation":
                raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
            return getattr(self.__dict__["config"], "_attn_implementation" if name == "attention" else name)

    c.after_init(c.lm, lambda this: setattr(this, "config", Config(this.config)))
    c.edit(c.lm, (r"config=self\.config|'config': self\.config", r"\g<0>.config"))  # of masks
