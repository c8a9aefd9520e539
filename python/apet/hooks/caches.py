"""Stores the state of a prompt on its KV cache, and updates it when other code changes that cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .calling import versions
from .state import Forward, Prompt

STATE = "_apet"  # the attribute of a cache that holds its Prompt
FIXED = "padding after a compressed prompt needs a cache that grows, not one of fixed size"


def prompt_of(cache: Cache | None) -> Prompt | None:
    """Returns the prompt stored on a cache that a patched model has filled, else None."""
    return getattr(cache, STATE, None)


def remember(cache: Cache, prompt: Prompt) -> None:
    """Stores the prompt on its cache. If it is compressed, the methods that change the cache's rows or length
    then update the prompt, too.

    The wrapped methods are attributes of the instance, and partials of functions of this module, so that a deep copy or
    a pickle of the cache gets its own.
    """
    setattr(cache, STATE, prompt)
    for name in WRAPPED:
        vars(cache).pop(name, None)
    if prompt.compressed:
        for name, wrapper in WRAPPED.items():
            if hasattr(cache, name):
                setattr(cache, name, functools.partial(wrapper, cache))


def forget(cache: Cache) -> None:
    """Removes the prompt from its cache, which was reset."""
    del vars(cache)[STATE]
    for name in WRAPPED:
        vars(cache).pop(name, None)


def check(prompt: Prompt, cache: Cache, batch: int) -> None:
    """Raises ValueError if a prompt cannot be continued from this cache."""
    if batch != prompt.batch:
        raise ValueError(f"a batch of {batch} cannot go on from the cache of a batch of {prompt.batch}")
    if cache.is_compileable:  # `_crop` has checked it, and reading its length waits for the device
        return
    past = int(cache.get_seq_length())
    if past < prompt.length - prompt.dropped and past < int(prompt.least):
        raise ValueError(f"the cache was cropped to {past} tokens, into its compressed images; start without it")


def tail(prompt: Prompt, cache: Cache, mask: Any, past: int | Tensor, new: int) -> Tensor | None:
    """Returns which of the n tokens after the prompt are no padding, [B, n] bool, from a mask over all tokens; None:
    all."""
    fixed = cache.is_compileable
    if mask is None or (fixed and torch.compiler.is_compiling()):
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        if fixed:  # generate() has built the mask, with the size of the cache
            return None
        raise ValueError("after a compressed prompt attention_mask must be 2-D, or left out")
    given = int(past) + prompt.dropped + new
    # A loop may count the columns of one more token by the cache. With several new tokens, this would also be what a
    # loop gives that takes the tokens beyond the length of the cache as new, of which some were given before.
    counted = new == 1 and mask.shape[1] == int(past) + new
    if mask.shape[1] != given and not counted and not (fixed and mask.shape[1] > given):
        raise ValueError(
            f"attention_mask has {mask.shape[1]} columns, but {given} tokens were given ({int(past) + new} of them are "
            f"in the cache or new, {prompt.dropped} were dropped): the new tokens do not continue this cache"
        )
    after = max(int(past) + prompt.dropped - prompt.length, 0) + new
    end = min(mask.shape[1], given)
    behind = mask[:, end - after : end].bool()
    if fixed and not behind.all():
        raise ValueError(FIXED)
    return None if fixed else behind


def check_padding(cache: Cache | None, mask: Any) -> None:
    """Raises ValueError if a mask over all tokens [B, L] hides some after the compressed prompt of a cache of fixed
    size. generate() turns this mask into one with the size of the cache, in which they cannot be told from empty
    places."""
    prompt = prompt_of(cache)
    if prompt is None or not prompt.compressed or not cache.is_compileable:
        return
    if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[:, prompt.length :].all():
        raise ValueError(FIXED)


def check_position(prompt: Prompt, past: int | Tensor, position: Tensor | None) -> None:
    """Raises ValueError if new tokens do not begin at the end of the tokens that were given before."""
    expected = int(past) + prompt.dropped
    if position is not None and len(position) and int(position[0]) not in (expected, int(past)):
        raise ValueError(f"cache_position begins with {int(position[0])}, but {expected} tokens were given before")


def count_prompt(cache: Cache | None) -> None:
    """Makes a cache report the number of tokens that were given, dropped ones included, until `count_cache`.

    generate() takes the tokens of a conversation beyond this length as new.
    """
    prompt = prompt_of(cache)
    if prompt is not None and prompt.dropped and int(cache.get_seq_length()) > 0:
        cache.get_seq_length = functools.partial(_given, cache)


def count_cache(cache: Cache | None) -> None:
    """Undoes `count_prompt`."""
    if cache is not None and "get_seq_length" in cache.__dict__:
        del cache.get_seq_length


def length(cache: Cache, layer: int) -> int | Tensor:
    """Returns how many tokens the cache of a layer holds. A layer with only a recurrent state counts none; then the
    length is that of the next layer that counts them."""
    held = (i for i in range(layer, len(cache.layers)) if holds_tokens(cache, i))
    return cache.get_seq_length(next(held, layer))


def lengths(cache: Cache, llm_layer: int | None) -> list[int]:
    """Returns how many tokens each layer has been given. A layer whose cache counts none (it has a recurrent state, or
    uses the keys of an earlier layer) has as many as the next one that does, else as the one before, on its side of
    `llm_layer`."""
    border = len(cache.layers) if llm_layer is None else llm_layer
    found = []
    for side in (range(border), range(border, len(cache.layers))):
        counting = [i for i in side if holds_tokens(cache, i)]
        found += [int(cache.get_seq_length(next((i for i in counting if i >= n), counting[-1]))) for n in side]
    return found


def holds_tokens(cache: Cache, layer: int) -> bool:
    """Returns whether the cache of a layer holds keys of tokens, and not only a recurrent state."""
    return hasattr(cache.layers[layer], "get_seq_length")


def _given(cache: Cache, layer_idx: int = 0) -> int | Tensor:
    return type(cache).get_seq_length(cache, layer_idx) + prompt_of(cache).dropped


def check_lengths(forward: Forward, llm_layer: int | None) -> None:
    """Raises ValueError if the cache of a layer does not hold as many tokens as the layer was given."""
    prompt, cache = forward.prompt, forward.cache
    before = prompt.length - prompt.dropped
    after = forward.late.mask.shape[1] if forward.late is not None else before
    border = len(cache.layers) if llm_layer is None else llm_layer
    for i, layer in enumerate(cache.layers):
        if not holds_tokens(cache, i):
            continue
        held, expected = int(cache.get_seq_length(i)), before if i < border else after
        if held != expected:
            raise ValueError(
                f"layer {i} of the cache ({type(layer).__name__}) holds {held} tokens after a prefill of {expected}: "
                f"the way in which this model fills its cache is not supported ({versions()})"
            )


# ---- methods of a cache with a compressed prompt --------------------------------------------------------------------


def _update(cache: Cache, *args: Any, **kwargs: Any) -> Any:
    """Adds keys and values, but only within a call of the model that compressed the prompt; else raises ValueError."""
    if prompt_of(cache).forward is None:
        raise ValueError(
            "this cache holds a prompt that a patched model has compressed, and a model that is not patched (any more) "
            "adds tokens to it: masks and positions would be wrong. Start without the cache, or patch the model again"
        )
    return type(cache).update(cache, *args, **kwargs)


def _crop(cache: Cache, length: int) -> None:
    """Crops the cache. transformers 4 and early 5 pass the length to keep (`max_length`), counted in tokens as given;
    later versions pass the number of tokens to remove. Raises ValueError if that removes visual tokens: how many of
    those were given is not how many the layers hold."""
    later = "max_length" not in inspect.signature(type(cache).crop).parameters
    leave = abs(length) if later or length < 0 else int(_given(cache)) - length
    prompt, held = prompt_of(cache), int(type(cache).get_seq_length(cache))
    if leave > 0 and held - leave < int(prompt.least):
        raise ValueError(
            f"the cache of {held} tokens would be cropped by {leave}, into its compressed images; start without it"
        )
    if later or leave > 0:
        type(cache).crop(cache, length if later else -leave)


def _reorder_cache(cache: Cache, beam_idx: Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    _take(cache, beam_idx)


def _batch_repeat_interleave(cache: Cache, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    _take(cache, torch.arange(prompt_of(cache).batch).repeat_interleave(repeats))


def _batch_select_indices(cache: Cache, indices: Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    rows = torch.arange(prompt_of(cache).batch)
    _take(cache, rows[torch.as_tensor(indices).to(rows.device)])  # indices may be a mask, or negative


def _take(cache: Cache, rows: Tensor) -> None:
    prompt = prompt_of(cache)
    prompt.early = prompt.early and prompt.early.rows(rows)
    prompt.late = prompt.late and prompt.late.rows(rows)
    prompt.batch = len(rows)


def _reset(cache: Cache) -> None:
    type(cache).reset(cache)
    forget(cache)


WRAPPED: dict[str, Callable[..., Any]] = {
    "update": _update,
    "crop": _crop,
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "reset": _reset,
}
