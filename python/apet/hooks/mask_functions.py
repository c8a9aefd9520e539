"""transformers' functions that build attention masks: their names, the kinds of attention, and calls for one layer.

Like the names of arguments (calling.py), they change now and then, so they are looked up when a model is patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, masking_utils

from .calling import NAMES, versions

KINDS: Mapping[str, str] = {  # kind of attention, named as in transformers' configurations -> function for its mask
    "full_attention": "create_causal_mask",
    "sliding_attention": "create_sliding_window_causal_mask",
    "chunked_attention": "create_chunked_causal_mask",
    "minimax_m3_sparse": "create_causal_mask",  # this and the next choose among the keys that a causal mask shows
    "indexed_attention": "create_causal_mask",
}
MATERIALIZED = ("indexed_attention",)  # kinds whose layers read their mask, so it must not be None for a causal one
IDLE = ("mlp", "moe")  # kinds of layers that hold no tokens
RECURRENT = ("linear_attention", "conv", "mamba")  # kinds of layers that keep a state; they get 2-D masks of new tokens


@dataclass(frozen=True)
class MaskBuilder:
    """transformers' own functions that build the mask of a decoder layer from a 2-D mask."""

    functions: Mapping[str, Callable[..., Any]]  # by the kind of attention
    embeds: str  # the name of the argument for embeddings
    cache: str  # the name of the argument for the cache
    takes_layer: bool  # False: they choose a layer of the cache themselves, and ask it for its sizes
    takes_cache_position: bool

    @classmethod
    def find(cls) -> MaskBuilder:
        """Finds the functions in the installed transformers. Raises ValueError if their arguments are not the known
        ones."""
        functions, shapes = {}, {}
        for kind, name in KINDS.items():
            function = getattr(masking_utils, name, None)
            if function is None:
                raise ValueError(f"transformers.masking_utils has no {name} ({versions()})")
            parameters = inspect.signature(function).parameters
            names = {role: next((n for n in NAMES[role] if n in parameters), None) for role in ("embeds", "cache")}
            needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD}
            known = {"config", "attention_mask", *NAMES["embeds"], *NAMES["cache"], "cache_position"}
            given = {"config", "attention_mask", "or_mask_function"}
            if None in names.values() or not given <= {*parameters} or needed - known:
                raise ValueError(f"{name}{inspect.signature(function)} is not supported ({versions()})")
            functions[kind] = function
            shapes[name] = (names["embeds"], names["cache"], "layer_idx" in parameters, "cache_position" in needed)
        if len({*shapes.values()}) > 1:
            raise ValueError(f"the functions that build masks differ: {shapes} ({versions()})")
        return cls(functions, *next(iter(shapes.values())))

    def build(
        self,
        config: Any,
        x: Tensor,
        mask: Tensor,
        cache: Cache | None,
        layer: int,
        past: Any,
        kind: str,
        more: Tensor | None = None,
    ) -> Any:
        """Builds the mask of one layer from mask [B, past + L] bool, in the form that its attention implementation
        takes.

        x [B, L, ...]: only its shape, dtype and device matter; more [B, L, past + L] bool: pairs that attention sees in
        addition to the causal ones.
        """
        given: dict[str, Any] = {"layer_idx": layer} if self.takes_layer else {}
        shown: Any = cache
        if cache is not None and not self.takes_layer:
            shown = _OneLayer(cache, layer, KINDS[kind] != "create_causal_mask")
        if self.takes_cache_position:
            given["cache_position"] = torch.arange(x.shape[1], device=x.device) + past
        if kind in MATERIALIZED:
            given["allow_is_causal_skip"] = False
        if more is not None:
            given["or_mask_function"] = mask_function(more.to(x.device), past)
        names = {self.embeds: x, self.cache: shown}
        made = self.functions[kind](config=config, attention_mask=mask, **names, **given)
        check_mask(f"{KINDS[kind]} returned", made)
        return made


def mask_function(more: Tensor, past: int) -> Callable[..., Tensor]:
    """Returns pairs [B, L, past + L] bool as a function of a query and a key, as transformers takes them. Both are
    counted in columns of the cache, which may have more columns than the pairs."""
    length, total = more.shape[1:]

    def seen(batch: Tensor, _: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = (query >= past) & (query < past + length) & (key < total)
        return inside & more[batch, (query - past).clamp(0, length - 1), key.clamp(0, total - 1)]

    return seen


def check_mask(what: str, mask: Any) -> None:
    """Raises ValueError if `mask` cannot be the mask of one decoder layer."""
    if mask is not None and not isinstance(mask, Tensor | BlockMask):
        raise ValueError(f"{what} a mask of type {type(mask).__name__}, which is not supported ({versions()})")


class _OneLayer:
    """A cache that shows only one of its layers, for versions of the mask functions that do not take a layer."""

    def __init__(self, cache: Cache, layer: int, sliding: bool):
        self.cache, self.layer = cache, layer
        self.is_sliding = [sliding]
        self.is_compileable = cache.is_compileable

    def get_mask_sizes(self, queries: Any, _: int) -> tuple[int, int]:
        return self.cache.get_mask_sizes(queries, self.layer)

    def get_seq_length(self, _: int = 0) -> int:
        return self.cache.get_seq_length(self.layer)


def implementation(config: Any) -> str:
    """Returns the name of the attention implementation of a decoder."""
    found = getattr(config, "_attn_implementation", None)
    if not isinstance(found, str):
        raise ValueError(
            f"{type(config).__name__} has no _attn_implementation, which names the attention of a decoder "
            f"({versions()})"
        )
    return found


def attention_types(config: Any) -> list[str]:
    """Returns the kind of each decoder layer, from the configuration."""
    types = getattr(config, "layer_types", None)
    if types is None:
        limits = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}
        kind = next((k for k, limit in limits.items() if getattr(config, limit, None) is not None), "full_attention")
        types = [kind] * config.num_hidden_layers
    return list(types)
