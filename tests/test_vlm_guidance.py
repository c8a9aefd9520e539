"""The loss on where the decoder attends to, which the training of the vision-language model uses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.vlm import features, guidance, packing
from tests.test_vlm_model import coffee, packer, some_pictures, untrained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.rest  # a study, and no part of the package


def test_answers_look_at_what_they_are_about(packer: packing.Packer) -> None:  # noqa: F811
    """A letter of a word at its own patches, other answers at all patches of their things, ends nowhere."""
    split = some_pictures(12)
    asked = [picture.questions for picture in split.pictures]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    kinds = set()
    for b, picture in enumerate(split.pictures):
        for number, one in enumerate(asked[b], start=1):
            at = ((packed.part[b] == number) & (packed.target[b] != packing.NOTHING)).nonzero().flatten().tolist()
            answer = packer.encode(one.answer)
            assert len(at) == len(answer) + 1
            assert not looks[b, at[-1]].any()
            for letter, position in enumerate(at[:-1], start=1):
                seen = looks[b, position].nonzero().flatten().tolist()
                assert {picture.owners[n] - 1 for n in seen} <= set(one.about)
                if one.kind in guidance.SPELLED:
                    assert {chr(picture.patches[n]) for n in seen} <= {one.answer[letter - 1]}
                elif one.about:
                    shown = [n for n in range(features.TOKENS) if picture.owners[n] - 1 in one.about]
                    assert seen == shown
                else:
                    assert not seen
                kinds.add((one.kind, bool(seen)))
        assert not looks[b, packed.target[b] == packing.NOTHING].any()
    assert {("read", True), ("beside", True), ("digit", True), ("place", True), ("count", False)} <= kinds


def test_the_loss_is_of_the_attention_that_the_layer_computes(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    """Against the weights that transformers returns; the states of the decoder are the same with and without."""
    split = some_pictures(2)
    asked = [picture.questions[:6] for picture in split.pictures]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    guide, decoder = guidance.Guide(), untrained.model.language_model
    rows = features.to_torch(split.states)[:, 1:]
    with torch.inference_mode():
        projected = untrained.model.multi_modal_projector(rows)
        plain = packing.hidden(untrained, packed, projected)
        with guide.on(decoder, looks):
            guided = packing.hidden(untrained, packed, projected)
        decoder.set_attn_implementation("eager")
        try:
            weights = decoder(
                inputs_embeds=packing.embed(untrained, packed, projected),
                attention_mask=torch.where(packed.mask(), 0.0, torch.finfo(torch.float32).min),
                position_ids=packed.positions,
                output_attentions=True,
                use_cache=False,
            ).attentions[guidance.LAYER]  # [B, heads, L, L]
        finally:
            decoder.set_attn_implementation("sdpa")
    assert torch.equal(plain, guided)
    assert guide.loss is not None
    share = [
        weights[b, : guidance.HEADS, at, 1 : 1 + features.TOKENS][:, looks[b, at]].sum(-1).log()
        for b, at in looks.any(-1).nonzero().tolist()
    ]
    torch.testing.assert_close(guide.loss, -torch.stack(share).mean(), rtol=1e-3, atol=1e-3)
    assert decoder.config._attn_implementation == "sdpa"


def test_without_anything_to_look_at_there_is_no_loss(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
) -> None:
    split = some_pictures(1)
    asked = [[one for one in split.pictures[0].questions if not one.about][:1]]
    packed = packer.pack(asked, features.TOKENS, answers=True)
    looks = guidance.looks(packed, asked, split.pictures)
    guide = guidance.Guide()
    with torch.inference_mode(), guide.on(untrained.model.language_model, looks):
        rows = features.to_torch(split.states)[:, 1:]
        packing.hidden(untrained, packed, untrained.model.multi_modal_projector(rows))
    assert guide.loss is None
