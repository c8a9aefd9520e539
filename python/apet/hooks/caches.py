"""Caches whose layers hold fewer tokens than the prompt had, in the hands of code that counts the prompt's tokens."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from .sequence import one_of
from .state import Prompt

STATE = "_apet"  # the attribute of a cache that holds its Prompt
# transformers 4 crops every layer to the same length, counted in tokens of the prompt; 5 says how many are to leave.
CROPS_TO_LENGTH = next(iter(inspect.signature(DynamicCache().crop).parameters)) == "max_length"


def prompt_of(cache: Any) -> Prompt | None:
    """What stands on a cache that a patched model has filled and shortened."""
    return getattr(cache, STATE, None)


def remember(cache: Any, prompt: Prompt) -> None:
    """Leaves the prompt on its cache."""
    setattr(cache, STATE, prompt)
    if CROPS_TO_LENGTH and hasattr(cache, "crop"):
        cache.crop = functools.partial(_crop, cache)  # a deep copy of the cache gets one of its own


def forget(cache: Any) -> None:
    """The cache was reset."""
    del vars(cache)[STATE]
    vars(cache).pop("crop", None)


def check_empty(cache: Any) -> None:
    """Refuses images where there is something before them already."""
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            f"images cannot follow a cache that holds {int(cache.get_seq_length())} tokens: give the whole "
            "conversation without past_key_values"
        )


def check(prompt: Prompt, cache: Any, batch: int) -> None:
    """Refuses what a prompt cannot be continued with."""
    if batch != prompt.batch:
        raise ValueError(f"a batch of {batch} cannot go on from the cache of a batch of {prompt.batch}")
    if cache.is_compileable:  # cannot be cropped, and reading its length waits for the device
        return
    past = int(cache.get_seq_length())
    if past < prompt.tokens - prompt.dropped and past < int(prompt.least):
        raise ValueError(f"the cache was cropped to {past} tokens, into its compressed images; start without it")


def tail(prompt: Prompt, cache: Any, mask: Any, past: int | Tensor, new: int) -> Tensor | None:
    """Which of the tokens after the prompt are no padding [B, n] bool, from a mask over all tokens; None: all."""
    fixed, mask = cache.is_compileable, one_of(mask)
    if mask is None or (fixed and torch.compiler.is_compiling()):
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        if fixed:  # generate() builds it, of the size of the cache
            return None
        raise ValueError("after a compressed prompt attention_mask must be 2-D, or left out")
    after = max(int(past) + prompt.dropped - prompt.tokens, 0) + new
    given = mask[:, -after:].bool()
    if given.shape[1] != after:
        return None
    if fixed and not given.all():
        raise ValueError("padding after a compressed prompt needs a cache that grows, not one of fixed size")
    return given


def count_prompt(cache: Any) -> bool:
    """Makes a cache say that it is as long as the tokens it was given, until `count_cache`; False: it is already.

    generate() takes the tokens of a conversation beyond this length for new.
    """
    prompt = prompt_of(cache)
    if prompt is None or not prompt.dropped or int(cache.get_seq_length()) == 0:
        return False
    cache.get_seq_length = functools.partial(_given, cache)
    return True


def count_cache(cache: Any) -> None:
    """Takes back `count_prompt`."""
    del cache.get_seq_length


def _given(cache: Any, layer_idx: int = 0) -> int | Tensor:
    return type(cache).get_seq_length(cache, layer_idx) + prompt_of(cache).dropped


def _crop(cache: Any, max_length: int) -> None:
    """`DynamicCache.crop` of transformers 4, with max_length counted in the tokens that were given."""
    leave = -max_length if max_length < 0 else _given(cache) - max_length
    if leave > 0:
        type(cache).crop(cache, -leave)
