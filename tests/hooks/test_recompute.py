"""The recompute equals the unpatched model if there are no options, and it notices small mistakes."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conversations import collate
from families import Family, shared, twin
from recompute import Options, language, shorten
from running import BOTH, TOLERANCE, conversation, conversations, judge, say


def test_is_the_unpatched_model(family: Family) -> None:
    rows = conversations(family)
    judge(family, rows, say(shared(family.name), collate(family, rows)), {})


@pytest.mark.parametrize("mistake", ["position", "next position", "one key too many", "two rows swapped"])
def test_notices(family: Family, mistake: str) -> None:
    model, row, options = twin(family.name), conversation(family, 3, "image", 5), Options(**BOTH)
    right = shorten(model, family, row, options)
    wrong = dataclasses.replace(right)
    if mistake == "position":
        wrong.positions = right.positions.clone()
        wrong.positions[..., 4:] += 1
    elif mistake == "next position":
        wrong.following += 2
    elif mistake == "one key too many":
        options = dataclasses.replace(options, llm_keep=0.7)
    else:
        wrong.embeds = right.embeds.clone()
        wrong.embeds[right.groups[0][0][:2]] = right.embeds[right.groups[0][0][:2].flip(0)]
    with torch.no_grad():
        said = language(model, right, [7, 8], Options(**BOTH))[0]
        other = language(model, wrong, [7, 8], options)[0]
    assert (said - other).abs().max() > 30 * TOLERANCE
