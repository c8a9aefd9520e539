"""Runs a tiny model, and judges its output by the recompute."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from conversations import Part, Sample, collate, mixed, sample
from families import UNSAID, Family, reader, twin
from recompute import Expected, Options, expected, shorten
from torch import Tensor
from transformers import Cache, PreTrainedModel

NEW = 5
TOLERANCE = 1e-4  # of logits of standard deviation 1.2; recompute and unpatched models agree to 1e-5

FIRST: dict[str, Any] = {"keep": 9, "basis": 4}
SECOND: dict[str, Any] = {"basis": 4, "llm_layer": 2, "llm_keep": 6}
BOTH: dict[str, Any] = {"keep": 9, "basis": 4, "llm_layer": 2, "llm_keep": 0.5}
STAGES = {"first": FIRST, "second": SECOND, "both": BOTH}


@dataclass(frozen=True)
class Said:
    """The generated tokens [B, new], the logits [B, new, V] that they were chosen by, and the cache."""

    tokens: Tensor
    logits: Tensor
    cache: Cache | None


def say(model: PreTrainedModel, inputs: dict[str, Tensor], new: int = NEW, **more: Any) -> Said:
    """Runs greedy `generate`, unless `more` sets other options. No placeholder is generated."""
    out = model.generate(
        **inputs,
        **{
            "max_new_tokens": new,
            "do_sample": False,
            "suppress_tokens": UNSAID,
            "output_logits": True,
            "return_dict_in_generate": True,
            **more,
        },
    )
    return Said(out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1), out.past_key_values)


@functools.cache
def reads_positions_as_packed(family: Family) -> bool:
    """Some versions take the temporal M-RoPE row for text positions: without a mask and a cache, the images of a prompt
    are torn from its text, patched or not."""
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    with torch.no_grad():
        told = twin(family.name)(**inputs, use_cache=False).logits
        bare = twin(family.name)(**{n: v for n, v in inputs.items() if n != "attention_mask"}, use_cache=False).logits
    return not torch.allclose(told, bare, atol=TOLERANCE)


def conversation(family: Family, *parts: Part, seed: int = 0) -> Sample:
    return sample(twin(family.name), family, parts, seed)


def conversations(family: Family) -> list[Sample]:
    """Returns different samples: one image, two, none, and with videos if the family has any."""
    return [conversation(family, *parts, seed=seed) for seed, parts in enumerate(mixed(family))]


def judge(
    family: Family,
    rows: Sequence[Sample],
    said: Said,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    tolerance: float = TOLERANCE,
    generated: bool = True,
) -> list[Expected]:
    """Every logit of every sample is that of the recompute, given the tokens that were said: by generate(), or in a
    loop by hand that gave no positions."""
    results = []
    for row, tokens, logits in zip(rows, said.tokens, said.logits, strict=True):
        following = goes_on_at(family, row) if generated else None
        result = expected(twin(family.name, dtype), family, row, tokens[:-1].tolist(), following, **options)
        torch.testing.assert_close(logits.float(), result.logits.float(), rtol=0, atol=tolerance)
        results.append(result)
    return results


@torch.no_grad()
def goes_on_at(family: Family, row: Sample) -> int | None:
    """Returns the position at which an unpatched generate() continues; None if only one is possible.

    An image or a video may reach past the text after it. Then some versions go on after the last position, and not
    after all.
    """
    if not family.ragged:
        return None
    model = twin(family.name)
    prompt = shorten(model, family, row, Options())
    if int(prompt.positions[..., -1].max()) + 1 == prompt.following:
        return None
    told: list[Tensor] = []
    with reader(model).register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["position_ids"]), with_kwargs=True
    ):
        say(model, collate(family, [row]), new=2)
    assert len(told) == 2
    return int(told[1][-3:].max())


def lengths(cache: Cache) -> list[int]:
    """Returns the tokens in every layer of a cache."""
    return [int(cache.get_seq_length(i)) for i in range(len(cache.layers))]
