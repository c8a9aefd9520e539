"""The model that is trained here: packing, patching, loading and training, on random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import apet
import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from apet_kernels.options import PAPER
from benchmarks.lib import selection
from benchmarks.vlm import (
    alignment,
    arms,
    evaluation,
    features,
    llava,
    packing,
    scenes,
    sources,
    training,
    words,
)
from tests.test_vlm import made_of

pytestmark = pytest.mark.rest  # a study, and no part of the package


@pytest.fixture(scope="module")
def coffee() -> sources.Sources:
    return made_of("test")


@pytest.fixture(scope="module")
def untrained() -> Any:
    """Returns the model with random weights, also in the tower."""
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(llava.config(words.tokenizer())).eval()
    for name, parameter in model.named_parameters():  # so that answers depend on what is seen
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.04 if name.startswith(llava.TOWER) else 0.1)
    return model


@pytest.fixture(scope="module")
def packer(untrained: Any) -> packing.Packer:
    return packing.Packer(words.tokenizer(), untrained.config.image_token_index)


# ---- packing, and the product's path


def some_pictures(count: int, seed: int = 10) -> features.Split:
    """Returns pictures with random states."""
    at = made_of("test")
    made = [features.Picture.of(*features.make(at, seed, number)) for number in range(count)]
    states = np.random.default_rng(seed).standard_normal((count, features.STATES, features.WIDTH))
    return features.Split((states * 0.1).astype(np.float16), made)


def test_packed_questions_have_the_logits_that_each_has_alone(untrained: Any, packer: packing.Packer) -> None:
    split = some_pictures(3)
    asked = [picture.questions[: 3 + 2 * i] for i, picture in enumerate(split.pictures)]
    rows = features.to_torch(split.states)[:, 1:41]
    packed = packer.pack(asked, 40, answers=True)
    with torch.inference_mode():
        projected = untrained.model.multi_modal_projector(rows)
        logits = untrained.lm_head(packing.hidden(untrained, packed, projected))
        for i, some in enumerate(asked):
            for number, one in enumerate(some, start=1):
                at = packed.part[i] == number
                ids = packer.encode(one.text) + packer.encode(one.answer)
                assert packed.ids[i, at].tolist() == ids
                assert packed.target[i, at].tolist()[-len(packer.encode(one.answer)) - 1 :] == [
                    *packer.encode(one.answer),
                    packer.end,
                ]
                before = torch.tensor([[packer.begin, *[packer.image] * 40, *ids]])
                embeddings = untrained.get_input_embeddings()(before)
                embeddings[:, 1:41] = untrained.model.multi_modal_projector(rows[i : i + 1])
                alone = untrained.lm_head(untrained.model.language_model(inputs_embeds=embeddings)[0])
                torch.testing.assert_close(logits[i, at], alone[0, 41:], rtol=1e-4, atol=1e-4)


def test_tokens_in_place_have_the_positions_of_the_whole_sequence(untrained: Any, packer: packing.Packer) -> None:
    """With all tokens nothing changes. With some, positions are those of the whole sequence, and matter."""
    split = some_pictures(2)
    asked = [picture.questions[:3] for picture in split.pictures]
    whole = packer.pack(asked, features.TOKENS, answers=True)
    every = torch.arange(features.TOKENS).expand(2, -1)
    assert torch.equal(packing.in_place(whole, every, features.TOKENS).positions, whole.positions)
    kept = torch.stack([torch.arange(3, 256, 9), torch.arange(0, 253, 9)])  # [2, 29]
    placed = packing.in_place(packer.pack(asked, kept.shape[1], answers=True), kept, features.TOKENS)
    columns = torch.cat([torch.zeros(2, 1, dtype=torch.long), 1 + kept], 1)
    want = torch.cat([whole.positions.gather(1, columns), whole.positions[:, 1 + features.TOKENS :]], 1)
    assert torch.equal(placed.positions, want)
    x = evaluation.look(untrained, split).tokens
    rows = selection.take(x, kept)
    anew = packing.answer(untrained, packer, rows, asked)
    assert packing.answer(untrained, packer, rows, asked, kept=kept) != anew
    assert packing.answer(untrained, packer, x, asked, kept=every) == packing.answer(untrained, packer, x, asked)
    with pytest.raises(ValueError, match="kept cannot be used with it"):
        packing.answer(untrained, packer, rows, asked, packing.Second(2, lambda states: states[:, :8]), kept)


@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        {"select": "qr", "basis": None, "refine": 2},
        {"llm_layer": 2, "llm_keep": 8},
        {"positions": "keep"},
        {"positions": "keep", "distinct": 2.0},
    ],
)
def test_the_patched_model_answers_as_the_arms_do(
    untrained: Any, packer: packing.Packer, coffee: sources.Sources, options: dict[str, Any] | None
) -> None:
    """From pixels, through processor, tower, `apet.patch` and `generate`, one question at a time."""
    processor, keep = llava.processor(), 32
    scene, asked = features.make(coffee, 11, 0)
    asked = asked[:4]
    picture = Image.fromarray(scene.pixels)
    pixels = processor(images=picture, text=llava.prompt(asked[0].text), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        seen = untrained.model.vision_tower(pixels, output_hidden_states=True).hidden_states[llava.LAYERS][:, 1:]
        rule = {name: value for name, value in (options or {}).items() if name in ("select", "basis", "refine")}
        if options is None:
            found = arms.all_of(seen)
        elif "distinct" in options:
            found = arms.distinct(arms.Batch(seen), keep, options["distinct"], 0)
        else:
            found = arms.apet(arms.Batch(seen), keep, **rule)
        later = (
            packing.Second(2, lambda states: arms.apet(arms.Batch(states), 8).tokens)
            if "llm_layer" in (options or {})
            else None
        )
        kept = found.indices if "positions" in (options or {}) else None
        packed = packing.answer(untrained, packer, found.tokens, [asked], later, kept)[0]
        if options is not None:
            apet.patch(untrained, keep=keep, **{k: "keep" if v is None else v for k, v in options.items()})
        try:
            for one, said in zip(asked, packed, strict=True):
                inputs = processor(images=picture, text=llava.prompt(one.text), return_tensors="pt")
                ids = untrained.generate(**inputs, max_new_tokens=packing.LONGEST, do_sample=False)
                assert packing._text(packer, ids[0, inputs["input_ids"].shape[1] :].tolist()) == said
        finally:
            if options is not None:
                apet.unpatch(untrained)
    assert len(set(packed)) > 1  # random weights, but not blind


def test_stored_and_assembled_models_load(untrained: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower = {n: w for n, w in untrained.state_dict().items() if n.startswith(llava.TOWER)}
    monkeypatch.setattr(llava, "trunk", lambda: tower)
    with pytest.raises(FileNotFoundError, match="no trained model"):
        llava.load(tmp_path / "stored")
    llava.save(untrained, tmp_path / "stored")
    stored = llava.load(tmp_path / "stored")
    layers = {int(name.split(".")[4]) for name in tower if ".layer." in name}
    assert layers == set(range(llava.LAYERS))
    for name, weight in untrained.state_dict().items():
        trunk = name.startswith(llava.TOWER) and not (".layer." in name and int(name.split(".")[4]) >= features.LAYER)
        wanted = weight if trunk else weight.half().float()
        assert torch.equal(stored.state_dict()[name], wanted), name
    llava.assemble(tmp_path / "whole", tmp_path / "stored")
    whole = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "whole")
    for name, weight in stored.state_dict().items():
        assert torch.equal(whole.state_dict()[name], weight), name
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "whole")
    image = Image.new("RGB", (300, 200))
    inputs = processor(images=image, text=llava.prompt("is there a 7"), return_tensors="pt")
    assert (inputs["input_ids"] == whole.config.image_token_index).sum() == features.TOKENS
    assert inputs["pixel_values"].shape == (1, 3, scenes.SIDE, scenes.SIDE)


# ---- training


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "trunk", dict)
    split = some_pictures(5)
    plan = training.Plan(steps=4, cool=2, warm=2, pictures=5, at_once=2, questions=3)
    straight, stopped = training.Run(plan), training.Run(plan)
    losses = [straight.train(split) for _ in range(4)]
    for _ in range(2):
        stopped.train(split)
    stopped.checkpoint(tmp_path / "checkpoint.pt")
    resumed = training.Run(dataclasses.replace(plan))
    resumed.resume(tmp_path / "checkpoint.pt")
    assert [resumed.train(split) for _ in range(2)] == losses[2:]
    for one, other in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert losses[0] != losses[1]


def test_an_epoch_takes_every_picture_once_and_the_rate_cools() -> None:
    plan = training.Plan(steps=40, cool=10, warm=5, pictures=12, at_once=4)
    for epoch in range(3):
        taken = [n for step in range(3 * epoch, 3 * epoch + 3) for n in plan.numbers(step)]
        assert sorted(taken) == list(range(12))
    assert plan.numbers(0) + plan.numbers(1) != plan.numbers(3) + plan.numbers(4)
    rates = [plan.rate_at(step) for step in range(40)]
    assert rates[4:30] == [plan.rate] * 26
    assert rates[:5] == sorted(rates[:5])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[-1] == pytest.approx(plan.rate / 10)


def test_training_lowers_the_loss_on_what_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava, "trunk", dict)
    split = some_pictures(2)
    run = training.Run(training.Plan(steps=12, cool=0, warm=1, pictures=2, at_once=2, questions=8))
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    losses = [run.train(split) for _ in range(12)]
    assert losses[-1]["loss"] < 0.7 * losses[0]["loss"]
    assert losses[-1]["looks"] < losses[0]["looks"]
    changed = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    decoder = {name for name in before if name.startswith(("model.language_model", "lm_head"))}
    assert changed == decoder


def test_alignment_teaches_what_is_before_the_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """It lowers every loss, leaves trunk and decoder as they are, and ends with rows as large as the embeddings."""
    monkeypatch.setattr(llava, "trunk", dict)
    split = some_pictures(2)
    first = training.Run(training.Plan(pictures=2)).align(split, [0, 1], 2)
    run = training.Run(training.Plan(pictures=2))
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    last = run.align(split, [0, 1], 60)
    assert all(last[name] < 0.8 * loss for name, loss in first.items())
    changed = {name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])}
    tower = {name for name in changed if name.startswith(llava.TOWER)}
    assert {int(name.split(".")[4]) for name in tower} == {features.LAYER, features.LAYER + 1}
    assert {name.partition("multi_modal_projector")[0] for name in changed - tower} == {"model."}
    assert len(changed - tower) == 4
    embeddings = run.model.get_input_embeddings().weight
    torch.testing.assert_close(
        run.project(split, [0, 1]).square().mean(), embeddings.square().mean(), rtol=1e-4, atol=0
    )


def test_training_continues_from_a_checkpoint(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the losses of a run that was not stopped: weights and optimiser are restored."""
    monkeypatch.setattr(llava, "trunk", dict)
    split, plan = some_pictures(2), training.Plan(steps=6, cool=0, warm=1, pictures=2, at_once=2, questions=4)
    run = training.Run(plan)
    for _ in range(2):
        run.train(split)
    run.checkpoint(tmp_path / "saved.pt")
    going = [run.train(split) for _ in range(2)]
    other = training.Run(dataclasses.replace(plan, seed=0))
    other.resume(tmp_path / "saved.pt")
    assert other.step == 2
    assert [other.train(split) for _ in range(2)] == going


def test_a_token_is_read_by_linear_layers() -> None:
    """Rows that are the sums of the layers' weights for the right labels lose less than those of other pictures."""
    torch.manual_seed(0)
    reader, split = alignment.Reader(512), some_pictures(4)
    for layer in reader.read.values():
        layer.weight.data.normal_()
    at = torch.arange(scenes.GRID**2)
    rows = torch.stack([
        reader.read["characters"].weight[reader.number[torch.tensor(picture.patches)]]
        + reader.read["letters"].weight[torch.tensor(picture.letters)]
        + reader.read["colours"].weight[torch.tensor(picture.colours)]
        + reader.read["middles"].weight[(torch.tensor(picture.middles) > 0).long()]
        + reader.read["rows"].weight[at // scenes.GRID]
        + reader.read["columns"].weight[at % scenes.GRID]
        for picture in split.pictures
    ]).detach()  # fmt: skip
    right, wrong = (reader.losses(of, split.pictures) for of in (rows, rows.roll(1, 0)))
    for name in ("characters", "letters", "colours", "middles"):
        assert right[name] < 0.2 * wrong[name], name
    assert right["places"] < 0.2 * reader.losses(rows.roll(1, 1), split.pictures)["places"]
    bright = torch.tensor([picture.brightness for picture in split.pictures]) / 127.5 - 1
    # Rows of mean square 1 in which the sum of two channels is the brightness.
    angle = (bright / 2).asin()
    rows = torch.stack([angle.sin(), angle.sin(), angle.cos(), angle.cos()], -1).repeat(1, 1, 128) * 2**0.5
    reader.brightness.weight.data.zero_()[0, :2] = 0.5**0.5
    reader.brightness.bias.data.zero_()
    assert reader.losses(rows, split.pictures)["brightness"] < 1e-6


def test_features_that_are_missing_or_too_few_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no features of split 'val'"):
        features.read(tmp_path, "val")
    with pytest.raises(ValueError, match="pictures=9, but features of 2"):
        some_pictures(2).first(9)


def test_a_stopped_extraction_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the files were cut to; the result has the bytes of one that was not stopped."""

    class Encoder:
        layer = features.LAYER + 1

        def states(self, views: list[Image.Image]) -> torch.Tensor:
            means = torch.tensor([float(np.asarray(view).mean()) for view in views])
            return means.view(-1, 1, 1).expand(-1, features.STATES, features.WIDTH)

    monkeypatch.setattr(features.encoders, "load", lambda **_: Encoder())
    monkeypatch.setattr(features.sources, "load", lambda split, photos: made_of(split))
    monkeypatch.setattr(features, "BATCH", 2)
    features.extract(tmp_path / "whole", "val", 5, 0)
    features.extract(tmp_path / "stopped", "val", 3, 0)
    with open(tmp_path / "stopped/val.jsonl", "r+b") as lines:
        lines.truncate((tmp_path / "stopped/val.jsonl").stat().st_size - 10)
    features.extract(tmp_path / "stopped", "val", 5, 0)
    for name in ("val.f16", "val.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "stopped" / name).read_bytes()
    split = features.read(tmp_path / "stopped", "val")
    assert split.states.shape == (5, features.STATES, features.WIDTH)
    assert split.pictures[3].questions == features.make(made_of("val"), 0, 3)[1]


def test_the_tower_sees_what_the_whole_model_sees(untrained: Any, coffee: sources.Sources) -> None:
    """From the stored states: the tokens of all layers, and the attention of the class token in the last one."""
    scene, asked = features.make(coffee, 12, 0)
    picture, processor = Image.fromarray(scene.pixels), llava.processor()
    pixels = processor(images=picture, text=llava.prompt(""), return_tensors="pt")["pixel_values"]
    tower = untrained.model.vision_tower
    tower.set_attn_implementation("eager")  # the only one that returns weights
    try:
        with torch.inference_mode():
            whole = tower(pixels, output_hidden_states=True, output_attentions=True)
    finally:
        tower.set_attn_implementation("sdpa")
    states = whole.hidden_states[features.LAYER].float().numpy()
    seen = evaluation.look(untrained, features.Split(states, [features.Picture.of(scene, asked)]))
    torch.testing.assert_close(seen.tokens, whole.hidden_states[llava.LAYERS][:, 1:], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen.attention, whole.attentions[-1][:, :, 0, 1:].mean(1), rtol=1e-3, atol=1e-5)
    assert seen.attention.sum() < 1  # the rest is to itself


def test_the_projector_begins_with_standardised_channels() -> None:
    """Whatever the means and spreads of the tokens' channels are."""
    model = llava.create(seed=0)
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(8, 256, 384, generator=draw) * torch.rand(384, generator=draw) + torch.randn(384, generator=draw)
    llava.standardise(model, x)
    hidden = model.model.multi_modal_projector.linear_1(x)
    torch.testing.assert_close(hidden.mean((0, 1)), torch.zeros(hidden.shape[-1]), atol=1e-3, rtol=0)
    assert 0.8 < hidden.std((0, 1)).mean() < 1.2


def test_embeddings_of_letters_begin_as_sums_of_letter_and_place() -> None:
    ids = words.letters()
    tokens = words.tokenizer().convert_ids_to_tokens(ids.flatten().tolist())
    assert tokens[:2] + tokens[26:28] + tokens[-1:] == ["A", "B", "##2A", "##2B", "##6Z"]
    table = llava.create(seed=0).get_input_embeddings().weight[ids]  # [places, 26, D]
    torch.testing.assert_close(table[1] - table[0], (table[1, :1] - table[0, :1]).expand(26, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(
        table[:, 3] - table[:, 5], (table[:1, 3] - table[:1, 5]).expand(6, -1), rtol=0, atol=1e-5
    )
    assert 0.9 < table.square().mean() < 1.1


def test_products_in_bfloat16_are_near_those_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of the same step, and an error for another type."""
    monkeypatch.setattr(llava, "trunk", dict)
    split = some_pictures(2)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        plan = training.Plan(steps=1, cool=0, pictures=2, at_once=2, questions=4, dtype=dtype)
        losses[dtype] = training.Run(plan).train(split)["loss"]
    assert losses["float32"] != losses["bfloat16"]
    assert abs(losses["float32"] - losses["bfloat16"]) < 0.02 * losses["float32"]
    with pytest.raises(ValueError, match="dtype='float16': must be 'float32' or 'bfloat16'"):
        training.Plan(dtype="float16").products()


@pytest.mark.slow
@pytest.mark.skipif(not (llava.STORED / llava.WEIGHTS).exists(), reason="no trained model is stored")
@pytest.mark.parametrize(("name", "options"), [
    (arms.FULL, None), (arms.DEFAULT, {}), ("paper", PAPER), ("qr refine 2", {"refine": 2}),
    ("qr refine 0 in place", {"positions": "keep"}),
    ("qr refine 0 distinct 2 in place", {"positions": "keep", "distinct": 2.0}),
])  # fmt: skip
def test_the_stored_model_gives_the_stored_answers(name: str, options: dict[str, Any] | None) -> None:
    """A hundred test questions from pixels, through `apet.patch`; rounding differs between machines."""
    for package in ("sklearn", "gradio"):
        pytest.importorskip(package)
    keep, results = 64, Path(__file__).parents[1] / "benchmarks/results/vlm"
    given = evaluation._read(evaluation.path_of(results, name, keep if options is not None else features.TOKENS))[:100]
    asked = evaluation._read(results / evaluation.QUESTIONS)[:100]
    model, processor, at = llava.load(), llava.processor(), sources.load("test")
    packer = packing.Packer(words.tokenizer(), model.config.image_token_index)
    if options is not None:
        apet.patch(model, keep=keep, **options)
    same = right = 0
    for line, stored in zip(asked, given, strict=True):
        picture = Image.fromarray(features.make(at, 0, line["picture"])[0].pixels)
        inputs = processor(images=picture, text=llava.prompt(line["text"]), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=packing.LONGEST, do_sample=False)
        said = packing._text(packer, ids[0, inputs["input_ids"].shape[1] :].tolist())
        same, right = same + (said == stored), right + (said == line["answer"])
    assert same >= 95
    assert abs(right - sum(line["answer"] == stored for line, stored in zip(asked, given, strict=True))) <= 5
