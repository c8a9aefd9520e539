"""A core model that calls its language model for one part of the prompt after another, compared with one call."""

from __future__ import annotations

from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from families import FAMILIES, build
from mutations import Classes
from mutations.calls import split
from mutations.edits import CACHE
from running import STAGES, TOLERANCE, conversations

PARTS = {
    "the text before the images, the images, the text after them": lambda length: [1, length - 3],
    "images, then text": lambda length: [length - 3],
    "text, then images": lambda length: [1],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("stage", STAGES)
def test_record_and_labels(stage: str, parts: str, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apet.kept`, logits, labels and loss are those of one call."""
    family = FAMILIES["llava"]
    rows = conversations(family)[:2]
    inputs = collate(family, rows, side=side)
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, row in enumerate(rows):
        end = labels.shape[1] if side == "left" else len(row.ids)
        labels[b, end - 2 : end] = torch.tensor(row.ids[-2:])

    def run() -> tuple[apet.Kept, Any]:
        model = build("llava")
        with apet.patched(model, check=False, **STAGES[stage]), torch.no_grad():
            out = model(**inputs, labels=labels, **{CACHE: transformers.DynamicCache()})
            return apet.kept(model), out

    whole, one = run()
    split(Classes("llava", monkeypatch), PARTS[parts])
    kept, several = run()
    assert kept.lengths[0] == whole.lengths[0] == labels.shape[1]
    assert len(kept.lengths) == len(whole.lengths) > 1
    for ours, theirs in zip(kept.visuals, whole.visuals, strict=True):
        assert (ours.modality, ours.row, ours.tokens) == (theirs.modality, theirs.row, theirs.tokens)
        assert all(torch.equal(a, b) for a, b in zip(ours.remaining, theirs.remaining, strict=True))
    torch.testing.assert_close(several.loss, one.loss, rtol=0, atol=TOLERANCE)
    ours, theirs = kept.align(several.logits), whole.align(one.logits)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(ours[real], theirs[real], rtol=0, atol=TOLERANCE, equal_nan=True)
    assert (ours[~real] == 0).all()
    assert ours.isnan().any()
