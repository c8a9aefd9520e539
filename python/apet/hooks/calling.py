"""The names that transformers gives to arguments. No other module but mask_functions.py contains them.

The hooks read and replace arguments of three modules: the core model, its language model, and the decoder layers.
transformers renames these arguments now and then (`past_key_values` became `cache` in 5.24). So each argument has a
role here, with the names known so far. When a model is patched, `Arguments` finds the name that each class uses, and
raises an error if a needed role has none. Types and shapes are checked again in each call.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import Cache

from .versions import TESTED

NAMES: Mapping[str, tuple[str, ...]] = {
    "embeds": ("inputs_embeds", "input_embeds"),
    "hidden": ("hidden_states",),
    "mask": ("attention_mask",),
    "positions": ("position_ids",),
    "rotary": ("position_embeddings",),
    "cache": ("cache", "past_key_values", "past_key_value"),
    "cache_position": ("cache_position",),
    "places": ("logits_to_keep",),  # of the prompt, that the model computes logits of; or how many, the last ones
    "recurrent": ("conv_mask",),  # the 2-D mask of new tokens of layers that attend and also keep a state
}
PIXELS = re.compile(r"(^|_)pixel_values(_|$)|^image_patches$")
SCALES = ("get_llama_4_attn_scale", "MistralLarge4TextSoftmaxScaling")  # make a factor of queries from positions
PACKED = ("cu_seq_lens_q", "cu_seqlens", "cu_seq_lens", "seq_idx")  # arguments of packed sequences


def versions() -> str:
    """Returns the installed version of transformers and the tested ones, for error messages."""
    return f"transformers {transformers.__version__} is installed; tested are {', '.join(TESTED)}"


@dataclass(frozen=True)
class Arguments:
    """The names of the arguments of one module's forward, by role."""

    owner: str  # the class, for messages
    parameters: tuple[str, ...]  # the arguments that can be given by position, in order
    names: Mapping[str, str]  # role -> parameter
    forwards: bool  # it takes only *args and **kwargs, as wrappers do: then names are found in each call

    @classmethod
    def of(cls, module: nn.Module, needed: Iterable[str] = ()) -> Arguments:
        """Looks the roles up in a module's signature. Raises ValueError if a needed one is not found."""
        module = within(module)
        owner, signature = type(module).__name__, inspect.signature(module.forward)
        kinds = inspect.Parameter
        positional = (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        parameters = tuple(p.name for p in signature.parameters.values() if p.kind in positional)
        named = {p.name: p for p in signature.parameters.values() if p.kind in (*positional, kinds.KEYWORD_ONLY)}
        names = {role: found for role in NAMES if (found := _named(role, named))}
        forwards = not named
        missing = [role for role in needed if role not in names and not forwards]
        if missing:
            known = "; ".join(f"{role}: {' or '.join(NAMES[role])}" for role in missing)
            raise ValueError(
                f"{owner}.forward{signature} has no argument known for {known}. Without it the class is not supported "
                f"({versions()})"
            )
        return cls(owner, parameters, names, forwards)

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all arguments of a call by keyword."""
        if len(args) > len(self.parameters):
            raise ValueError(
                f"{self.owner} is called with {len(args)} arguments by position, of which "
                f"{len(self.parameters)} have names; pass them by keyword ({versions()})"
            )
        return dict(zip(self.parameters, args, strict=False)) | dict(kwargs)

    def name(self, role: str, call: Mapping[str, Any]) -> str | None:
        """Returns the name of a role: from the signature, or, if the signature has no names (`forwards`), from the
        call."""
        if role in self.names:
            return self.names[role]
        return next((name for name in NAMES[role] if name in call), None)

    def get(self, role: str, call: Mapping[str, Any]) -> Any:
        """Returns the value of a role; None if the call does not give it."""
        name = self.name(role, call)
        return None if name is None else call.get(name)

    def replace(self, call: dict[str, Any], **values: Any) -> dict[str, Any]:
        """Returns the call with new values of some roles. Raises ValueError for a role that this class does not
        have."""
        for role, value in values.items():
            name = self.name(role, call)
            if name is None:
                raise ValueError(
                    f"{self.owner} was called without {' or '.join(NAMES[role])}, which has to be replaced after "
                    f"tokens were dropped; it was called with {', '.join(call)} ({versions()})"
                )
            call = call | {name: value}
        return call

    def cache(self, call: Mapping[str, Any]) -> Cache | None:
        """Returns the KV cache of a call, found by its name or else by its type."""
        name = self.name("cache", call)
        value = None if name is None else call.get(name)
        if value is None:
            others = [n for n, v in call.items() if isinstance(v, Cache)]
            if not others:
                return None
            if len(others) > 1:
                raise ValueError(f"{self.owner} was called with caches as {', '.join(others)}: one was expected")
            value = call[others[0]]
        if not isinstance(value, Cache) or isinstance(value, transformers.EncoderDecoderCache):
            raise ValueError(
                f"{self.owner} was called with a cache of type {type(value).__name__}, which is not supported as "
                f"the cache of a decoder ({versions()})"
            )
        return value

    def unknown(self, call: Mapping[str, Any]) -> list[str]:
        """Returns the names of arguments that hold numbers and have no role: they may be features of images."""
        known = {n for role in NAMES if (n := self.name(role, call)) is not None}
        return [
            name
            for name, value in call.items()
            if name not in known
            and not is_pixels(name)
            and any(t.is_floating_point() and t.dim() > 1 for t in tensors(value))
        ]


def is_pixels(name: str) -> bool:
    """Returns whether an argument of this name holds images or videos as pixels, not encoded."""
    return PIXELS.search(name) is not None


def modality_of(name: str) -> str:
    """Returns the modality ("image" or "video") of a pixel argument, from its name."""
    return "video" if "video" in name else "image"


def within(module: nn.Module) -> nn.Module:
    """Returns the module inside wrappers: modules that pass all their arguments on to their only child, as libraries
    for checkpointing or offloading put around layers."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    while all(p.kind in variadic for p in inspect.signature(module.forward).parameters.values()):
        children = list(module.children())
        if len(children) != 1:
            break
        module = children[0]
    return module


def _named(role: str, named: Mapping[str, inspect.Parameter]) -> str | None:
    found = next((name for name in NAMES[role] if name in named), None)
    if found is None and role == "cache":  # it may have a new name: its type identifies it
        found = next((name for name, p in named.items() if "Cache" in str(p.annotation)), None)
    return found


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors(one)


# ---- the rotary embedding -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rotary:
    """How a decoder makes the rotary embeddings of its layers: one for all of them, or one for each kind of layer."""

    by_kind: bool

    @classmethod
    def of(cls, decoder: nn.Module, layers: Iterable[nn.Module], cannot: str) -> Rotary | None:
        """Returns None if no layer takes a rotary embedding. Raises ValueError if the layers take one that `rotary_emb`
        does not make. cannot: which option cannot be used then."""
        owner, rotary = type(decoder).__name__, getattr(decoder, "rotary_emb", None)
        taken = [(arguments := Arguments.of(layer)).forwards or "rotary" in arguments.names for layer in layers]
        if rotary is None and not any(taken):
            return None
        if not isinstance(rotary, nn.Module) or not all(taken):
            raise ValueError(
                f"{cannot} with {owner}: its layers do not share one rotary embedding, made by its rotary_emb and "
                f"given as {' or '.join(NAMES['rotary'])}"
            )
        parameters = list(inspect.signature(rotary.forward).parameters)
        if parameters[:2] != ["x", "position_ids"] or parameters[2:] not in ([], ["layer_type"]):
            raise ValueError(
                f"{cannot}: {type(rotary).__name__}.forward takes ({', '.join(parameters)}), expected "
                f"(x, position_ids) or (x, position_ids, layer_type) ({versions()})"
            )
        return cls(len(parameters) == 3)

    def make(self, decoder: Any, x: Tensor, positions: Tensor, kind: str) -> Any:
        """Returns the rotary embedding of layers of a kind for positions [B, L]: cosines and sines [B, L, d], or one
        tensor of both."""
        return decoder.rotary_emb(x, positions, kind) if self.by_kind else decoder.rotary_emb(x, positions)
