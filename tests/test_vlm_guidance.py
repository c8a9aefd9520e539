"""The loss on where the decoder attends to, which the training of the vision-language model uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.vlm import features, guidance, packing
from tests.test_vlm_model import coffee, packer, some_pictures, untrained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.rest  # a study, and no part of the package


def test_answers_look_at_what_they_are_about(packer: packing.Packer) -> None:  # noqa: F811
    """A letter of a word at its own patches, places at the middles of things, the brightest quarter at itself, other
    answers at all patches of their things, ends nowhere. Two things that are compared have a head each."""
    split = some_pictures(12)
    asked = [picture.questions for picture in split.pictures]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    assert set(looks) == {guidance.BEFORE, guidance.LAYER}
    kinds = set()
    for b, picture in enumerate(split.pictures):
        of_thing, middle = (
            {i: [n for n, owner in enumerate(grid) if owner - 1 == i] for i in range(8)}
            for grid in (picture.owners, picture.middles)
        )
        for number, one in enumerate(asked[b], start=1):
            at = ((packed.part[b] == number) & (packed.target[b] != packing.NOTHING)).nonzero().flatten().tolist()
            answer = packer.encode(one.answer)
            assert len(at) == len(answer) + 1
            assert not looks[guidance.LAYER][b, at[-1]].any()
            for letter, position in enumerate(at[:-1], start=1):
                for head in range(guidance.HEADS):
                    seen = looks[guidance.LAYER][b, position, head].nonzero().flatten().tolist()
                    if one.kind in guidance.SPELLED:
                        assert {picture.owners[n] - 1 for n in seen} <= set(one.about)
                        assert {chr(picture.patches[n]) for n in seen} <= {one.answer[letter - 1]}
                    elif one.kind == "relation":
                        assert seen == middle[one.about[head]]
                    elif one.kind == "place":
                        assert seen == middle[one.about[0]]
                    elif one.kind == "brightest":
                        down, along = one.answer.split()
                        rows, columns = ({n // 16 for n in seen}, {n % 16 for n in seen})
                        assert rows == set(range(8) if down == "top" else range(8, 16))
                        assert columns == set(range(8) if along == "left" else range(8, 16))
                        assert len(seen) == 64
                    else:
                        assert seen == sorted(n for i in one.about for n in of_thing[i])
                    kinds.add((one.kind, bool(seen)))
        for grid in looks.values():
            assert not grid[b, packed.target[b] == packing.NOTHING].any()
    assert {("read", True), ("beside", True), ("digit", True), ("place", True), ("count", False)} <= kinds
    assert {("relation", True), ("brightest", True)} <= kinds


def test_the_word_beside_is_found_by_the_other_one(packer: packing.Packer) -> None:  # noqa: F811
    split = some_pictures(12)
    asked = [picture.questions for picture in split.pictures]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    before = guidance.looks(packed, asked, split.pictures)[guidance.BEFORE]
    found = 0
    for b, picture in enumerate(split.pictures):
        for number, one in enumerate(asked[b], start=1):
            for position in ((packed.part[b] == number) & (packed.target[b] != packing.NOTHING)).nonzero()[:-1, 0]:
                patches = [grid.nonzero().flatten().tolist() for grid in before[b, position]]
                assert all(own == patches[0] for own in patches)
                assert one.kind == "beside" or not patches[0]
                owners = {picture.owners[n] for n in patches[0]}
                assert len(owners) <= 1
                word = one.text.split()[-1]
                letters = {(picture.letters[n], chr(picture.patches[n])) for n in patches[0] if picture.letters[n]}
                assert letters <= set(enumerate(word, start=1))
                found += bool(letters)
    assert found > 20


def test_the_loss_is_of_the_attention_that_the_layer_computes(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    """Against the weights that transformers returns; the decoder's states are, but for rounding, the same without."""
    split = some_pictures(12)
    beside = next(i for i, p in enumerate(split.pictures) if any(one.kind == "beside" for one in p.questions))
    other = next(i for i, p in enumerate(split.pictures) if any(one.kind == "relation" for one in p.questions))
    split = features.Split(split.states[[beside, other]], [split.pictures[beside], split.pictures[other]])
    asked = [[one for one in picture.questions if one.about] for picture in split.pictures]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    guide, decoder = guidance.Guide(), untrained.model.language_model
    rows = features.to_torch(split.states)[:, 1:]
    with torch.inference_mode():
        projected = untrained.model.multi_modal_projector(rows)
        plain = packing.hidden(untrained, packed, projected)
        with guide.on(decoder, packed, looks):
            guided = packing.hidden(untrained, packed, projected)
        decoder.set_attn_implementation("eager")
        try:
            weights = decoder(
                inputs_embeds=packing.embed(untrained, packed, projected),
                attention_mask=torch.where(packed.mask(), 0.0, torch.finfo(torch.float32).min),
                position_ids=packed.positions,
                output_attentions=True,
                use_cache=False,
            ).attentions  # [B, heads, L, L] of each layer
        finally:
            decoder.set_attn_implementation("sdpa")
    real = packed.part >= 0
    torch.testing.assert_close(guided[real], plain[real], rtol=1e-4, atol=1e-5)
    assert guide.loss is not None
    want = 0.0
    assert all(grid.any() for grid in looks.values())
    for layer, grid in looks.items():
        share = [
            weights[layer][b, head, at, 1 : 1 + features.TOKENS][grid[b, at, head]].sum().log()
            for b, at, head in grid.any(-1).nonzero().tolist()
        ]
        want -= torch.stack(share).mean().item()
    assert guide.loss.item() == pytest.approx(want, abs=2e-3)
    assert decoder.config._attn_implementation == "sdpa"


def test_without_anything_to_look_at_there_is_no_loss(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    split = some_pictures(1)
    asked = [[one for one in split.pictures[0].questions if one.kind == "count"]]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    guide = guidance.Guide()
    with torch.inference_mode(), guide.on(untrained.model.language_model, packed, looks):
        rows = features.to_torch(split.states)[:, 1:]
        packing.hidden(untrained, packed, untrained.model.multi_modal_projector(rows))
    assert guide.loss is None


def test_attention_within_blocks_is_that_of_the_mask(packer: packing.Packer) -> None:  # noqa: F811
    """Values and gradients, against attention over all pairs in float64, for pictures with questions of other numbers
    and lengths."""
    split = some_pictures(3)
    asked = [picture.questions[: 3 * i + 1] for i, picture in enumerate(split.pictures)]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    real = (packed.part >= 0)[:, None, :, None]
    assert not real.all()
    draw = torch.manual_seed(0)
    given = [torch.randn(3, 2, packed.ids.shape[1], 8, generator=draw, dtype=torch.float64) for _ in range(4)]
    results = []
    for blocks in (packing.Blocks.of(packed.part), None):
        rows = [x.clone().requires_grad_() for x in given[:3]]
        if blocks:
            out = packing.attend(*rows, blocks, 0.3)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(*rows, packed.mask(), scale=0.3)
        (torch.where(real, out, 0.0) * given[3]).sum().backward()
        results.append([torch.where(real, out, 0.0).detach(), *(x.grad for x in rows)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
