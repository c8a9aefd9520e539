"""Both stages against the recompute: batches and single samples, every layout, budget and dtype."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import apet
import pytest
import torch
from apet.hooks import selfcheck
from conversations import collate
from families import FAMILIES, THREE, Family, build, reader, shared, twin
from recompute import Options, expected, shorten
from running import (
    BOTH,
    FIRST,
    NEW,
    SECOND,
    STAGES,
    TOLERANCE,
    conversation,
    conversations,
    goes_on_at,
    judge,
    lengths,
    reads_positions_as_packed,
    say,
)
from torch import Tensor, nn

LAYOUTS: dict[str, dict[str, Any]] = {
    "ratio": {"keep": 0.35, "basis": 4},
    "ratio under the basis": {"keep": 0.05, "basis": 4, "layout": "overwrite", "llm_layer": 2, "llm_keep": 0.1},
    "qr": {"keep": 7, "basis": 5, "select": "qr"},
    "overwrite": {"keep": 8, "basis": 3, "layout": "overwrite", "llm_layer": 3, "llm_keep": 5},
    "blend": {"keep": 8, "basis": 3, "layout": "overwrite", "blend": 0.5, "llm_layer": 2, "llm_keep": 4},
    "append": {"keep": 5, "basis": 4, "layout": "append"},
    "some units whole": {"keep": 20, "basis": 4, "llm_layer": 2, "llm_keep": 17},
    "one token": {"keep": 1, "basis": 1, "llm_layer": 2, "llm_keep": 1},
    "more basis than kept": {"keep": 4, "basis": 12},
}


@pytest.mark.parametrize("stage", STAGES)
def test_batch(family: Family, stage: str) -> None:
    """A batch of samples of different lengths, with no, one and two images and videos."""
    rows = conversations(family)
    model = shared(family.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(family, rows))
    judge(family, rows, said, STAGES[stage])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_right_padding(family: Family, stage: str, cached: bool) -> None:
    """A prefill outside of `generate`: the kept tokens of each row stay on the left, in their order."""
    rows = conversations(family)
    model = shared(family.name)
    with apet.patched(model, **STAGES[stage]):
        out = model(**collate(family, rows, side="right"), use_cache=cached)
    for row, logits in zip(rows, out.logits, strict=True):
        result = expected(twin(family.name), family, row, [], **STAGES[stage])
        torch.testing.assert_close(logits[result.deep_length - 1], result.logits[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_options(family: Family, options: dict[str, Any]) -> None:
    rows = conversations(family)
    model = shared(family.name)
    with apet.patched(model, **options):
        said = say(model, collate(family, rows))
    judge(family, rows, said, options)


@pytest.mark.parametrize(("padded", "cached"), [(0, True), (0, False), (7, True)])
@pytest.mark.parametrize("stage", STAGES)
def test_single(family: Family, stage: str, padded: int, cached: bool) -> None:
    """A single sample without padding has no mask; gaps in positions must not be read as packed sequences."""
    model = shared(family.name)
    for parts in ([3, "image", 5], [2, "image1", 3, "image2", 4], [2, "video", 3]):
        if parts[1] == "video" and not family.video:
            continue
        row = conversation(family, *parts, seed=3)
        with apet.patched(model, **STAGES[stage]):
            said = say(model, collate(family, [row], pad_to=len(row.ids) + padded), use_cache=cached)
        judge(family, [row], said, STAGES[stage])


@pytest.mark.parametrize("stage", STAGES)
def test_forward(family: Family, stage: str) -> None:
    """`model(**inputs)`, with and without a cache, also without a mask; logits of the last token."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    with apet.patched(model, **STAGES[stage]):
        results = [
            model(**given, use_cache=cached)
            for given in (inputs, bare)
            for cached in (True, False)
            if stage != "second" or given is inputs or not reads_positions_as_packed(family)
        ]
    want = expected(twin(family.name), family, row, [], **STAGES[stage]).logits[0]
    for result in results:
        torch.testing.assert_close(result.logits[0, -1], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 1.0},
        {"keep": 10_000},
        {"llm_layer": 3, "llm_keep": 1.0},
        {"keep": 1.0, "llm_layer": 2, "llm_keep": 1.0, "layout": "overwrite", "basis": 10},
        {"keep": 1.0, "layout": "append", "basis": 10},
    ],
    ids=str,
)
@pytest.mark.parametrize("batched", [True, False])
def test_keeping_all_is_bitwise_the_unpatched_model(family: Family, options: dict[str, Any], batched: bool) -> None:
    rows = conversations(family)[: None if batched else 1]
    model, inputs = shared(family.name), collate(family, rows)
    before = say(model, inputs)
    with apet.patched(model, **options):
        during = say(model, inputs)
    assert torch.equal(before.tokens, during.tokens)
    assert torch.equal(before.logits, during.logits)
    assert lengths(before.cache) == lengths(during.cache)


def test_text_alone_is_bitwise_the_unpatched_model(family: Family) -> None:
    rows = [conversation(family, 9), conversation(family, 5, seed=1)]
    model, inputs = shared(family.name), collate(family, rows)
    before = say(model, inputs)
    with apet.patched(model, **BOTH):
        during = say(model, inputs)
    assert torch.equal(before.tokens, during.tokens)
    assert torch.equal(before.logits, during.logits)


@pytest.mark.parametrize("options", [FIRST, BOTH, LAYOUTS["append"]], ids=["first", "both", "append"])
def test_positions(family: Family, options: dict[str, Any]) -> None:
    """LLaVA's language model gets positions 0, 1, 2, ..., and Qwen's tokens keep their M-RoPE positions."""
    model, rows = shared(family.name), conversations(family)
    told: list[tuple[Tensor, Tensor]] = []

    def listen(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told.append((kwargs["position_ids"], kwargs["attention_mask"]))

    with apet.patched(model, **options), reader(model).register_forward_pre_hook(listen, with_kwargs=True):
        said = say(model, collate(family, rows), new=2)
    (prompt, mask), (following, _) = told
    for b, row in enumerate(rows):
        want = shorten(twin(family.name), family, row, Options(**options))
        if family.ragged:
            assert torch.equal(prompt[-3:, b, mask[b].bool()], want.positions)
            at = goes_on_at(family, row) or want.following
            assert {at} == {*following[..., b, :].flatten().tolist()}
        else:
            assert torch.equal(prompt[b][mask[b].bool()], torch.arange(len(want.source)))
            assert following[b].tolist() == [len(want.source)]
    assert said.tokens.shape == (len(rows), 2)


@pytest.mark.parametrize("stage", STAGES)
def test_lengths_of_the_cache(family: Family, stage: str) -> None:
    """Every layer holds the kept tokens of the longest row after its stage, and the generated tokens."""
    rows = conversations(family)
    model, options = shared(family.name), STAGES[stage]
    with apet.patched(model, **options):
        said = say(model, collate(family, rows))
    results = judge(family, rows, said, options)
    first, deep = (max(getattr(r, name) for r in results) + NEW - 1 for name in ("length", "deep_length"))
    border = options.get("llm_layer", 4)
    assert lengths(said.cache) == [first] * border + [deep] * (4 - border)
    assert first < len(collate(family, rows)["input_ids"][0]) + NEW - 1 or "keep" not in options
    assert deep < first or "llm_layer" not in options


# Number type -> what rounding may change logits by.
ROUNDING = {torch.bfloat16: 0.1, torch.float16: 0.02}

# The type of the weights, and that of products under autocast.
TYPES = [*((dtype, None) for dtype in ROUNDING), (torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)]


def in_types(names: Iterable[str], types: Iterable[Any]) -> list[Any]:
    """Returns pairs of a family and a number type; `make test` runs all families in bfloat16, and some in all types."""
    return [
        pytest.param(name, kind, marks=() if name in THREE or kind in (torch.bfloat16, TYPES[2]) else pytest.mark.slow)
        for name in names
        for kind in types
    ]


@pytest.mark.parametrize(("name", "dtype"), in_types(FAMILIES, ROUNDING), ids=str)
def test_number_types(name: str, dtype: torch.dtype) -> None:
    """One sample, first stage: rounding changes logits by a percent, and also what a second stage would keep."""
    family = FAMILIES[name]
    model, row = shared(name, dtype=dtype), conversation(family, 3, "image", 5)
    with apet.patched(model, **FIRST):
        said = say(model, collate(family, [row], dtype=dtype))
    assert said.logits.dtype in (dtype, torch.float32)
    judge(family, [row], said, FIRST, dtype, tolerance=ROUNDING[dtype])
    with apet.patched(model, **SECOND):  # the same prefill twice, so the same tokens; then the cache against none
        cached = say(model, collate(family, [row], dtype=dtype))
        again = say(model, collate(family, [row], dtype=dtype), new=1)
    assert torch.equal(cached.logits[:, :1], again.logits)


@pytest.mark.parametrize("stage", selfcheck.STAGES)
@pytest.mark.parametrize(("name", "types"), in_types(FAMILIES, TYPES), ids=str)
def test_number_types_against_the_reference(
    name: str, types: tuple[torch.dtype, torch.dtype | None], stage: str
) -> None:
    """Both stages, of a padded batch. The reference is given the rows that were kept, so it does not depend on what
    rounding made the stages keep."""
    (dtype, cast), model = types, build(name)
    rows = [selfcheck.prompt(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)]
    rows = [{n: v.to(dtype) if v.is_floating_point() else v for n, v in row.items()} for row in rows]
    model.to(dtype)
    with torch.autocast("cpu", cast) if cast is not None else nullcontext():
        found = selfcheck.judge(model, rows, selfcheck.STAGES[stage])
    assert found < ROUNDING[torch.bfloat16 if torch.bfloat16 in types else torch.float16]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_hidden_states_of_another_type_than_the_embeddings(name: str) -> None:
    """Some models add up hidden states in float32. Their rotary embeddings are of the type of the embeddings."""
    model = build(name, dtype=torch.bfloat16)

    def add_up(layer: Any, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # transformers 4
            return (output[0].float(), *output[1:])
        return output.float()

    reader(model).layers[0].register_forward_hook(add_up)
    rows = [selfcheck.prompt(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)]
    with torch.autocast("cpu", torch.bfloat16):
        assert selfcheck.judge(model, rows, selfcheck.STAGES["both"]) < ROUNDING[torch.bfloat16]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", THREE)
def test_float64_raises(name: str, stage: str) -> None:
    """There are no kernels for it."""
    model, inputs = build(name, dtype=torch.float64), collate(FAMILIES[name], conversations(FAMILIES[name])[:1])
    inputs = {key: v.double() if v.is_floating_point() else v for key, v in inputs.items()}
    with (
        apet.patched(model, **STAGES[stage]),
        pytest.raises(ValueError, match=r"visual tokens in torch\.float64, .* torch\.float16 or torch\.bfloat16"),
    ):
        say(model, inputs)
