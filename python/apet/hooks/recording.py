"""Finds the decoder of a tiny model, and records its generation for the reference (reference.py).

This module shares no code with the hooks.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Row = Mapping[str, Any]  # the inputs of one prompt, not padded


@dataclass
class Decoder:
    """The module with the decoder layers."""

    module: nn.Module
    layers: nn.ModuleList
    calls: int = 1  # in which a prompt is prefilled, one part of it after another

    @classmethod
    def of(cls, model: nn.Module, row: Row) -> Decoder:
        """Calls the model to find its decoder: the module with a list of layers that receives embeddings as long as the
        prompt, or that receives them in several calls of one prefill."""
        seen: list[tuple[nn.Module, int]] = []  # the calls with embeddings, and the number of their tokens
        batch, length = row["input_ids"].shape

        def listen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            embeds = bound(module, args, kwargs).get("inputs_embeds")
            if isinstance(embeds, Tensor) and len(embeds) == batch:
                seen.append((module, embeds.shape[1]))

        failed: Exception | None = None
        with ExitStack() as hooks:
            for module in model.modules():
                if any(isinstance(child, nn.ModuleList) for child in module.children()):
                    hooks.enter_context(module.register_forward_pre_hook(listen, with_kwargs=True))
            try:
                model(**row, use_cache=False)
            except Exception as error:  # a prefill in several calls may need the cache
                failed = error
            whole = [module for module, tokens in seen if tokens == length]
            decoders = [module for module, _ in seen if hasattr(module, "embed_tokens")]  # no encoders of images
            if failed and (whole or not decoders):
                raise failed
            if whole:
                return cls(whole[0], _layers(whole[0]))
            if not decoders:
                raise ValueError(f"{type(model).__name__} calls no module with decoder layers with embeddings")
            seen.clear()
            model.generate(**row, max_new_tokens=1, do_sample=False)
        counts = [tokens for module, tokens in seen if module is decoders[0]]
        if sum(counts) != length:
            raise ValueError(
                f"{type(model).__name__} calls {type(decoders[0]).__name__} with {', then '.join(map(str, counts))} of "
                f"the {length} tokens of a prompt, expected one call with all of them, or one after another with a "
                "part of them"
            )
        return cls(decoders[0], _layers(decoders[0]), len(counts))


def _layers(decoder: nn.Module) -> nn.ModuleList:
    lists = {name: c for name, c in decoder.named_children() if isinstance(c, nn.ModuleList) and len(c)}
    return lists.get("layers") or next(iter(lists.values()))


@dataclass
class Generation:
    """The recorded generation of a model from a batch of B prompts."""

    tokens: Tensor  # [B, N]: the generated tokens
    states: Tensor  # [B, N, D]: the output of the decoder for each
    entered: list[Tensor] = field(default_factory=list)  # rows that entered the decoder, then layer `llm_layer`


def generate(
    model: nn.Module, decoder: Decoder, inputs: Row, new: int, static: bool = False, llm_layer: int | None = None
) -> Generation:
    """Generates `new` tokens greedily, without special tokens, and records the generation."""
    states: list[Tensor] = []
    rows: list[Tensor] = []  # of each call of the prefill
    at_llm_layer: list[Tensor] = []

    def before_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(states) < decoder.calls:
            rows.append(entering(bound(module, args, kwargs)))

    def before_llm_layer(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if len(states) < decoder.calls:
            at_llm_layer.append(hidden(args, kwargs))

    def after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        states.append(output[0][:, -1])

    words = set(range(3, 99))  # ids of ordinary tokens in a tiny model's vocabulary
    size = model.config.get_text_config().vocab_size
    more = {"cache_implementation": "static", "disable_compile": True} if static else {}
    with ExitStack() as hooks:
        hooks.enter_context(decoder.module.register_forward_pre_hook(before_decoder, with_kwargs=True))
        hooks.enter_context(decoder.module.register_forward_hook(after_decoder, with_kwargs=True))
        if llm_layer is not None:
            hooks.enter_context(decoder.layers[llm_layer].register_forward_pre_hook(before_llm_layer, with_kwargs=True))
        tokens = model.generate(
            **inputs,
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            suppress_tokens=[i for i in range(size) if i not in words],
            **more,
        )
    if len(states) != decoder.calls - 1 + new:
        raise ValueError(
            f"{type(model).__name__} called {type(decoder.module).__name__} {len(states)} times to generate {new} "
            "tokens, expected one call for each"
        )
    entered = [torch.cat(parts, dim=-2) for parts in (rows, at_llm_layer) if parts]
    return Generation(tokens[:, -new:], torch.stack(states[-new:], 1), entered)


def entering(call: Mapping[str, Any]) -> Tensor:
    """Returns the rows that enter the first layer: the embeddings, and features that the decoder adds before it."""
    rows: Tensor = call["inputs_embeds"]
    name = first_features(call)
    if name is None:
        return rows
    rows = rows.clone()
    rows[visual_mask(call)] = call[name][0]
    return rows


def first_features(call: Mapping[str, Any]) -> str | None:
    """Returns the name of a decoder's argument with features by layer, if the embeddings at their places are zeros, so
    that the first layer needs some."""
    name = next((name for name, value in call.items() if isinstance(value, Mapping) and 0 in value), None)
    return None if name is None or call["inputs_embeds"][visual_mask(call)].any() else name


def visual_mask(call: Mapping[str, Any]) -> Tensor:
    """Returns the argument of a decoder that marks visual tokens, [B, L] bool."""
    shape = call["inputs_embeds"].shape[:2]
    found = (v for v in call.values() if isinstance(v, Tensor) and v.dtype == torch.bool and v.shape[:2] == shape)
    return next(found).flatten(1)


def hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Returns the hidden states that a layer is called with."""
    rows: Tensor = args[0] if args else kwargs["hidden_states"]
    return rows


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by name."""
    return dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | dict(kwargs)
