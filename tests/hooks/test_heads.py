"""Hidden states that are read at places of the prompt as given: by classifiers, for some logits, and to speak."""

from __future__ import annotations

from typing import Any

import apet
import pytest
import torch
import transformers
from apet.hooks import selfcheck, state, tiny
from apet.hooks.selfcheck import NAMES, prompt
from torch import Tensor, nn

OLD = transformers.__version__.startswith("4.")
needs_5 = pytest.mark.skipif(
    OLD, reason="configurations of transformers 4 are shrunk for the families with an adapter alone (test_selfcheck.py)"
)

OPTIONS = [{"keep": 0.4, "basis": 4}, {"keep": 0.4, "basis": 4, "llm_layer": 2, "llm_keep": 0.5}]
PARTS = [(3, "image", 5), (2, "image", 11), ("image", 4)]
CLASSIFIERS = ("Gemma3ForSequenceClassification", "Qwen3_5ForSequenceClassification")


def classifier(name: str) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Returns a tiny classifier, the model that generates with the same core model, and prompts that fit them."""
    cls = getattr(transformers, name)
    config = tiny.config(cls.config_class.model_type)
    config.get_text_config().pad_token_id = tiny.PAD
    config.num_labels = config.get_text_config().num_labels = 3
    generates, model = (tiny.build(c, config) for c in (getattr(transformers, NAMES[config.model_type]), cls))
    model.model = generates.model
    return model, generates, [prompt(generates, parts, seed) for seed, parts in enumerate(PARTS)]


def padded(rows: list[dict[str, Any]], side: str) -> dict[str, Any]:
    """Returns a batch of prompts, padded on this side."""
    batch = tiny.collate(rows)  # padded on the left
    if side == "left":
        return batch
    width = batch["input_ids"].shape[1]
    for name, value in batch.items():
        if isinstance(value, Tensor) and value.shape[:2] == (len(rows), width):
            lengths = [row["input_ids"].shape[1] for row in rows]
            batch[name] = torch.stack([v.roll(n, 0) for v, n in zip(value, lengths, strict=True)])
    return batch


def last_state(generates: Any, row: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Returns the hidden state of the last token of a prompt, from the sequence that is left."""
    with apet.patched(generates, **options):
        states = generates(**row, output_hidden_states=True).hidden_states[-1]
    assert states.shape[1] < row["input_ids"].shape[1]
    return states[0, -1]


@needs_5
@pytest.mark.parametrize("options", OPTIONS, ids=["first", "both"])
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str, options: dict[str, Any]) -> None:
    """The scores are those of the last token, in a batch padded on either side too; so is the loss."""
    model, generates, rows = classifier(name)
    expected = torch.stack([model.score(last_state(generates, row, options)) for row in rows])
    labels = torch.tensor([2, 0, 1])
    with apet.patched(model, **options):
        alone = torch.cat([model(**row).logits for row in rows])
        for side in ("left", "right"):
            found = model(**padded(rows, side), labels=labels)
            torch.testing.assert_close(found.logits, expected, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(found.loss, nn.functional.cross_entropy(found.logits, labels))
    torch.testing.assert_close(alone, expected)
    whole = torch.cat([model(**row).logits for row in rows])
    assert (whole - expected).abs().max() > 1e-3  # tokens were dropped


@needs_5
@pytest.mark.parametrize("options", OPTIONS, ids=["first", "both"])
def test_core_model_alone(options: dict[str, Any]) -> None:
    """An embedding is the state of the last token that the mask shows, on either side of the padding."""
    model, generates, rows = classifier(CLASSIFIERS[0])
    expected = torch.stack([last_state(generates, row, options) for row in rows])
    core = model.model
    with apet.patched(core, **options):
        for side in ("left", "right"):
            batch = padded(rows, side)
            states, mask = core(**batch).last_hidden_state, batch["attention_mask"]
            last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
            torch.testing.assert_close(states[torch.arange(len(rows)), last], expected, rtol=1e-3, atol=1e-4)
            assert apet.kept(core).lengths[0] == states.shape[1] > apet.kept(core).lengths[-1]


@needs_5
def test_nothing_dropped() -> None:
    model, _, rows = classifier(CLASSIFIERS[0])
    batch = padded(rows, "right")
    whole = model(**batch).logits
    with apet.patched(model, keep=1.0):
        assert torch.equal(model(**batch).logits, whole)


@needs_5
def test_no_gradients() -> None:
    model, _, rows = classifier(CLASSIFIERS[0])
    with apet.patched(model, keep=0.4), torch.enable_grad(), pytest.raises(ValueError, match=r"torch\.no_grad"):
        model(**rows[0], labels=torch.tensor([1]))


@needs_5
def test_classes_of_tokens() -> None:
    """Logits of tokens are at their places, with NaN for dropped tokens; labels are not shortened."""
    model, _, rows = classifier("Qwen3_5ForTokenClassification")
    batch = padded(rows, "right")
    with apet.patched(model, keep=0.4, basis=4):
        logits = model(**batch).logits
        kept = apet.kept(model)
        labels = torch.where(logits.isnan().any(-1) | (batch["attention_mask"] == 0), -100, 1)
        loss = model(**batch, labels=labels).loss
    assert logits.shape[:2] == batch["input_ids"].shape
    for visual in kept.visuals:
        places = (batch["input_ids"][visual.row] == tiny.IMAGE).nonzero().flatten()
        missing = logits[visual.row, places].isnan().any(-1)
        assert missing.any()
        assert (~missing).nonzero().flatten().tolist() == visual.remaining[-1].tolist()
    assert int(logits.isnan().any(-1).sum()) == sum(v.tokens - len(v.remaining[-1]) for v in kept.visuals)
    scored = labels != -100
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits[scored], labels[scored]))


@needs_5
def test_the_self_check_takes_the_class_that_generates(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(selfcheck, "as_tested", lambda files: False)
    model, *_ = classifier(CLASSIFIERS[0])
    apet.patch(model, keep=0.4)
    apet.unpatch(model)
    assert len(list(tmp_path.rglob("*.json"))) == 1


class Speaking(nn.Module):
    """A model that speaks, as Qwen's omni models do: its talker goes on from the thinker's hidden states."""

    def __init__(self, thinker: nn.Module) -> None:
        super().__init__()
        self.thinker, self.talker = thinker, nn.Identity()

    def generate(self, return_audio: bool = True, **inputs: Any) -> Any:
        more = {"output_hidden_states": True, "return_dict_in_generate": True} if return_audio else {}
        return self.thinker.generate(**inputs, max_new_tokens=3, do_sample=False, **more)


@needs_5
def test_speech() -> None:
    """A thinker that drops tokens gives text, but no hidden states to its talker; to others it does."""
    thinker = tiny.build(transformers.Qwen2_5OmniThinkerForConditionalGeneration, tiny.config("qwen2_5_omni_thinker"))
    row = prompt(thinker, (3, "image", 5))
    model = Speaking(thinker)
    with apet.patched(thinker, keep=0.4):
        text = thinker.generate(**row, max_new_tokens=3, do_sample=False)
        assert torch.equal(model.generate(**row, return_audio=False), text)
        with pytest.raises(ValueError, match=r"Speaking\.generate would make speech .* return_audio=False"):
            model.generate(**row)
        told = thinker.generate(
            **row, max_new_tokens=3, do_sample=False, output_hidden_states=True, return_dict_in_generate=True
        )
        assert torch.equal(told.sequences, text)
        words = {"input_ids": row["input_ids"][:, :3], "attention_mask": row["attention_mask"][:, :3]}
        assert model.generate(**words).sequences.shape == (1, 6)  # no visual tokens, so nothing is missing


def places(width: int) -> dict[str, Any]:
    """Returns values of `logits_to_keep` for the batch of `PARTS` with this width."""
    found = {"last": 1, "several": 6, "places": torch.tensor([0, 2, width // 2, width - 1])}
    if not OLD:  # transformers 4 takes no more
        mask = torch.zeros(len(PARTS), width, dtype=torch.bool)
        mask[0, 1], mask[1, width - 3 :], mask[2, 0] = True, True, True
        found |= {"places of each": torch.tensor([[1, 2], [0, width - 1], [5, 6]]), "mask": mask}
    return found


def sliced(rows: Tensor, chosen: Any) -> Tensor:
    """Returns the rows of [B, L, V] that `logits_to_keep` stands for."""
    if isinstance(chosen, int):
        return rows[:, -chosen:]
    if chosen.dim() == 1 or chosen.dtype == torch.bool:
        return rows[:, chosen] if chosen.dim() == 1 else rows[chosen]
    return torch.stack([row[at] for row, at in zip(rows, chosen, strict=True)])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", OPTIONS, ids=["first", "both"])
def test_logits_of_places(options: dict[str, Any], side: str, compiled: bool) -> None:
    """`logits_to_keep` counts in the prompt as given."""
    model = tiny.build(transformers.LlavaForConditionalGeneration, tiny.config("llava"))
    batch = padded([prompt(model, parts, seed) for seed, parts in enumerate(PARTS)], side)
    with apet.patched(model, **options):
        call = torch.compile(model, backend="eager") if compiled else model
        logits = call(**batch).logits
        aligned = apet.kept(model).align(logits)
        assert logits.shape[1] < aligned.shape[1] == batch["input_ids"].shape[1]
        for chosen in places(aligned.shape[1]).values():
            found = call(**batch, logits_to_keep=chosen).logits
            torch.testing.assert_close(found, sliced(aligned, chosen), equal_nan=True)
            assert state._CALLS.get() == ()
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -1 if side == "left" else 1] = 5
        assert call(**batch, labels=labels).loss.isfinite()
        assert state._CALLS.get() == ()
        torch.testing.assert_close(call(**batch).logits, logits)


def test_core_model_of_a_model_that_generates() -> None:
    """Called without its head, it gives the states of all layers after the last stage at their places."""
    model = tiny.build(transformers.LlavaForConditionalGeneration, tiny.config("llava"))
    batch = padded([prompt(model, parts, seed) for seed, parts in enumerate(PARTS)], "right")
    for options in OPTIONS:
        with apet.patched(model, **options):
            short = model(**batch, output_hidden_states=True)
            kept = apet.kept(model)
            found = model.model(**batch, output_hidden_states=True)
            torch.testing.assert_close(model.lm_head(found.last_hidden_state), kept.align(short.logits), equal_nan=True)
            for one, whole in zip(short.hidden_states, found.hidden_states, strict=True):
                if one.shape[1] == kept.lengths[-1]:
                    torch.testing.assert_close(whole, kept.align(one), equal_nan=True)
                else:
                    torch.testing.assert_close(whole, one)


@needs_5
@pytest.mark.parametrize("name", ["gemma4", "gemma3"])
def test_last_logits(name: str) -> None:
    """Gemma 4 computes the last logits only if its decoder's rows are as many as the tokens that it was given."""
    config = tiny.config(name)
    config.get_text_config().num_kv_shared_layers = 0
    model = tiny.build(getattr(transformers, NAMES[name]), config)
    row = prompt(model, (3, "image", 5))
    with apet.patched(model, keep=0.4, basis=4):
        whole = model(**row).logits
        for last in (1, 4):
            found = model(**row, logits_to_keep=last).logits
            assert found.shape[1] == last
            torch.testing.assert_close(found, whole[:, -last:])


def test_appended_rows_are_at_the_places_of_their_tokens() -> None:
    """With layout="append" rows are moved to the first places of their unit, not to those of their tokens."""
    model = tiny.build(transformers.LlavaOnevisionForConditionalGeneration, tiny.config("llava_onevision"))
    row = prompt(model, (3, "image", 5))
    options = {"keep": 3, "basis": 2, "select": "fps", "layout": "append"}
    with apet.patched(model, **options):
        states = model(**row, output_hidden_states=True).hidden_states[0]
        kept = apet.kept(model)
        aligned = kept.align(states)
    places = (row["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    remaining = places[kept.visuals[0].remaining[-1]]
    assert not aligned[0, remaining].isnan().any()
    assert (aligned[0, remaining].abs().sum(-1) > 0).all()
    gone = places[~torch.isin(places, remaining)]
    assert aligned[0, gone].isnan().all()


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_that_end_in_an_image(side: str) -> None:
    """The last token that is left stands for the last one that was given."""
    model = tiny.build(transformers.LlavaForConditionalGeneration, tiny.config("llava"))
    rows = [prompt(model, parts, seed) for seed, parts in enumerate([(9, "image"), (3, "image", 2)])]
    batch = padded(rows, side)
    with apet.patched(model, keep=4, basis=4):
        alone = torch.cat([model(**row).logits[:, -1] for row in rows])
        states = model.model(**batch).last_hidden_state
        mask = batch["attention_mask"]
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        torch.testing.assert_close(model.lm_head(states[[0, 1], last]), alone)
        if side == "left":
            torch.testing.assert_close(model(**batch, logits_to_keep=1).logits[:, 0], alone)
            said = model.generate(**batch, max_new_tokens=2, do_sample=False)
            for row, one in zip(rows, said, strict=True):
                assert one[-2:].tolist() == model.generate(**row, max_new_tokens=2, do_sample=False)[0, -2:].tolist()
