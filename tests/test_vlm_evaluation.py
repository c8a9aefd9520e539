"""Answers to the test questions, the figures from them, and the rule for the default."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import apet_kernels
from apet_kernels.options import Options
from benchmarks.lib import selection
from benchmarks.vlm import arms, evaluation, features, guard, packing, report
from benchmarks.vlm.questions import KINDS
from tests.test_vlm_model import packer, some_pictures, untrained  # noqa: F401 (fixtures)

pytestmark = pytest.mark.rest  # a study, and no part of the package


def test_every_kind_is_asked_in_turn() -> None:
    split = some_pictures(30)
    for picture in split.pictures:
        some = evaluation.chosen(picture.questions)
        there = {one.kind for one in picture.questions}
        assert len(some) == min(evaluation.EACH, len(picture.questions))
        assert len({one.kind for one in some}) == min(len(there), len(some))
        assert set(some) <= set(picture.questions)


def test_evaluation_writes_answers_that_count_again(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
    tmp_path: Path,
) -> None:
    split = some_pictures(4)
    evaluation.evaluate(untrained, packer, split, ["paper", "random"], [16], tmp_path)
    found = evaluation.Answers(tmp_path)
    assert len(found.asked) == sum(len(evaluation.chosen(p.questions)) for p in split.pictures)
    assert len(list(tmp_path.iterdir())) == 4 + len(arms.WHOLE) + 2
    assert found.needed(16).tolist() == arms.needed(evaluation.look(untrained, split).tokens, 16)
    said = evaluation.answers(untrained, packer, evaluation.look(untrained, split), "paper", 16)
    right = [one.answer == given for picture, some in zip(split.pictures, said, strict=True)
             for one, given in zip(evaluation.chosen(picture.questions), some, strict=True)]  # fmt: skip
    assert found.right("paper", 16).tolist() == right
    assert found.stored() == [("paper", 16), ("random", 16)]


def test_answers_of_other_weights_or_questions_are_not_continued(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
    tmp_path: Path,
) -> None:
    """They would stand in one table."""
    split = some_pictures(2)
    for _ in range(2):
        evaluation.evaluate(untrained, packer, split, ["paper"], [16], tmp_path)
    with pytest.raises(ValueError, match="has answers to other questions"):
        evaluation.evaluate(untrained, packer, some_pictures(2, seed=11), ["paper"], [16], tmp_path)
    weight = untrained.model.multi_modal_projector.linear_2.weight
    before = weight.data.clone()
    try:
        weight.data.mul_(1.5)
        with pytest.raises(ValueError, match="has answers of other weights"):
            evaluation.evaluate(untrained, packer, split, ["random"], [16], tmp_path)
    finally:
        weight.data.copy_(before)
    (tmp_path / evaluation.MADE).unlink()
    with pytest.raises(ValueError, match="has answers of other weights"):
        evaluation.evaluate(untrained, packer, split, ["paper"], [16], tmp_path)


def test_two_stages_keep_half_as_many_more_and_half_as_many(
    untrained: Any,  # noqa: F811
    packer: packing.Packer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[tuple[int, int]] = []
    uniform = arms.STAGED["uniform in two stages"]

    def recorded(batch: arms.Batch, keep: int) -> apet_kernels.Compressed:
        kept.append((batch.x.shape[1], keep))
        found = uniform(batch, keep)
        assert isinstance(found, apet_kernels.Compressed)
        return found

    monkeypatch.setitem(arms.STAGED, "uniform in two stages", recorded)
    split = some_pictures(2)
    seen = evaluation.look(untrained, split)
    staged = evaluation.answers(untrained, packer, seen, "uniform in two stages", 16)
    assert kept == [(256, 24), (24, 8)]
    assert [len(some) for some in staged] == [len(evaluation.chosen(p.questions)) for p in split.pictures]


def test_intervals_resample_photographs(tmp_path: Path) -> None:
    """Four photographs, each all right or all wrong, are four observations, however many questions there are."""
    lines: list[dict[str, Any]] = [
        {"picture": i, "photograph": f"{i % 4}", "region": 0, "kind": "read", "text": "", "answer": "A", "height": 9}
        for i in range(400)
    ]
    lines += [{**lines[0], "picture": 400 + i, "photograph": "", "kind": "count"} for i in range(400)]
    evaluation._write(tmp_path / evaluation.QUESTIONS, lines)
    evaluation._write(tmp_path / "some-arm.16.jsonl.gz", ["A" if i % 4 < 2 else "B" for i in range(800)])
    found = evaluation.Answers(tmp_path)
    right = found.right("some arm", 16)
    few = found.interval(right, found.where("read"))
    many = found.interval(right, found.where("count"))
    assert few.value == many.value == 50
    assert few.high - few.low > 60
    assert 8 < many.high - many.low < 12
    assert not found.interval(right.astype(float) - right).beyond
    assert evaluation.by_kind(found.asked, right) == {"count": 50.0, "read": 50.0, "all": 50.0}


@pytest.mark.parametrize(
    ("share", "chosen"),
    [
        ({"qr refine 2": 0.8, "qr refine 0": 0.6}, "qr refine 2"),
        ({"qr refine 2": 0.6, "qr refine 0": 0.8}, "qr refine 0"),
        ({"qr refine 2": 0.8, "qr refine 0": 0.6, "tome": 0.95}, "paper"),
        ({"qr refine 2": 0.8, "qr refine 0": 0.6, "scope": 0.95}, "qr refine 2"),
        ({"paper": 0.8}, "paper"),
    ],
)
def test_the_default_is_decided_by_the_rule(tmp_path: Path, share: dict[str, float], chosen: str) -> None:
    """The shares of right answers decide. Attention gives `scope` an advantage, so it does not count."""
    lines = [
        {"picture": q, "photograph": f"{q % 60}", "region": 0, "kind": "read", "text": "", "answer": "A", "height": 9}
        for q in range(600)
    ]
    evaluation._write(tmp_path / evaluation.QUESTIONS, lines)
    names = ["paper", "qr refine 2", "qr refine 0", *arms.OTHERS]
    for number, (name, keep) in enumerate((name, keep) for name in names for keep in arms.BUDGETS):
        right = np.random.default_rng(number).random(600) < share.get(name, 0.5)
        evaluation._write(evaluation.path_of(tmp_path, name, keep), ["A" if is_right else "B" for is_right in right])
    decided = f"**So `{chosen}` is the default.**"
    if chosen != arms.DEFAULT:
        decided = f"**With this model the rule gives `{chosen}`, not `{arms.DEFAULT}`, which is the default.**"
    assert decided in report.decision(evaluation.Answers(tmp_path))
    evaluation.path_of(tmp_path, "tome", 16).unlink()
    assert report.decision(evaluation.Answers(tmp_path)) == "Not decided: not measured with each budget: tome.\n"


def test_two_models_are_compared_by_question(tmp_path: Path) -> None:
    """The second model answers as the first one does, but for one arm, which is right where the paper's rule is."""
    folder = tmp_path / report.SECOND
    folder.mkdir()
    lines = [
        {"picture": q, "photograph": f"{q % 60}", "region": 0, "kind": kind, "text": "", "answer": "A", "height": 9}
        for q, kind in zip(range(600), itertools.cycle(KINDS), strict=False)
    ]
    shares = {"paper": 0.4, "qr refine 0": 0.7, "tome": 0.6}
    for where in (tmp_path, folder):
        evaluation._write(where / evaluation.QUESTIONS, lines)
        cells = [(name, features.TOKENS) for name in arms.WHOLE] + [(n, k) for n in shares for k in arms.BUDGETS]
        for number, (name, keep) in enumerate(cells):
            seed = number if where == tmp_path or name != "tome" else cells.index(("paper", keep))
            share = shares.get("paper" if seed != number else name, 0.5)
            said = np.random.default_rng(seed).random(600) < share
            evaluation._write(evaluation.path_of(where, name, keep), ["A" if is_right else "B" for is_right in said])
    for steps, where in enumerate((tmp_path, folder), start=7):
        plan = {"seed": 1, "steps": steps}
        line = {"step": 9, "accuracy": {"all": 50.0}, "plan": plan, "machine": {"machine": "one"}}
        (where / "log.jsonl").write_text(json.dumps(line) + "\n")
    text, decided, training, sees, table = report.another(
        evaluation.Answers(tmp_path), evaluation.Answers(folder), tmp_path
    )
    assert "the decoder for 8 steps, where the first model had 7" in text
    assert decided.startswith("Not decided: not measured with each budget: ")
    assert "| 9 | 0 |" in training
    assert "| full |" in sees
    same, apart = (line for line in table.splitlines() if line.startswith(("| qr refine 0", "| tome")))
    assert "**" not in same
    assert all(cell.endswith("+0.0**") for cell in apart.strip("| ").split(" | ")[1:])
    assert "4 of 8 do not differ" in table
    assert report.deciding()[:3] == ["paper", "qr refine 2", "qr refine 0"]
    assert not {"scope", "cdpruner", "qr refine 2 shared"} & set(report.deciding())
    assert set(report.again()) <= {*arms.ARMS, *arms.IN_PLACE}


def test_the_section_of_kept_positions(tmp_path: Path) -> None:
    """The gain of the default, which methods are ahead of it and level, and what merging changes, by hand."""
    lines = [
        {"picture": q, "photograph": f"{q % 60}", "region": 0, "kind": "read", "text": "", "answer": "A", "height": 9}
        for q in range(600)
    ]
    evaluation._write(tmp_path / evaluation.QUESTIONS, lines)
    weighted, alone = f"{report.DISTINCT} in place", f"{report.DISTINCT} without merge in place"
    shares = {arms.DEFAULT: 0.3, f"{arms.DEFAULT} in place": 0.6, "fps in place": 0.9, weighted: 0.7, alone: 0.8}
    shares |= {"uniform in place": 0.6}
    order = np.random.default_rng(0).permutation(600)
    cells = [(arms.FULL, features.TOKENS), *itertools.product([arms.DEFAULT, *arms.IN_PLACE], arms.BUDGETS)]
    for name, keep in cells:
        right = order < 600 * shares.get(name, 0.1)
        evaluation._write(evaluation.path_of(tmp_path, name, keep), ["A" if is_right else "B" for is_right in right])
    found = evaluation.Answers(tmp_path)
    text, accuracy, against = report.positions(found)
    assert text.count("30.0 [") == len(arms.BUDGETS) + 1  # the gains, and `fps` ahead of the default
    flat = " ".join(text.split())
    assert "in the mean of the budgets. Ahead of it: `fps in place` (30.0 [" in flat
    assert "level with it: `uniform in place` (0.0 [0.0, 0.0])." in flat
    assert f"- **`distinct`:** `{weighted}` is ahead of the default by 10.0 [" in flat
    assert "of the same methods: `fps in place` (20.0 [" in flat
    assert "level with it: none." in flat
    assert f"changes the accuracy of `{weighted}` by -10.0 [" in flat
    assert f"| {weighted} | 70.0 [" in accuracy
    assert accuracy.count(" in place |") == len(arms.IN_PLACE)
    assert f"| {weighted} | **+10.0 [" in against
    assert f"| {arms.DEFAULT} in place |" not in against


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({}, ["so `qr refine 0` is the default", '`positions="keep"` is recommended', "`distinct=2` is recommended"]),
        ({("qr refine 0", 1): 0.4}, ["so `paper` is the default", '`positions="keep"` is recommended']),
        ({("qr refine 0 in place", 1): 0.5}, ["so `qr refine 0` is the default", '`positions="keep"` is not recomm']),
        ({("qr refine 0 distinct 2 in place", 0): 0.6}, ['"keep"` is recommended', "`distinct=2` is not recommended"]),
    ],
)
def test_what_is_recommended_holds_with_both_seeds(
    tmp_path: Path, shares: dict[tuple[str, int], float], words: list[str]
) -> None:
    lines = [
        {"picture": q, "photograph": f"{q % 60}", "region": 0, "kind": "read", "text": "", "answer": "A", "height": 9}
        for q in range(600)
    ]
    usual = {"paper": 0.4, "qr refine 0": 0.5, "qr refine 0 in place": 0.6, "qr refine 0 distinct 2 in place": 0.7}
    models = []
    for number, folder in enumerate((tmp_path / "first", tmp_path / "second")):
        folder.mkdir()
        evaluation._write(folder / evaluation.QUESTIONS, lines)
        order = np.random.default_rng(number).permutation(600)
        for (name, share), keep in itertools.product(usual.items(), arms.BUDGETS):
            right = order < 600 * shares.get((name, number), share)
            evaluation._write(evaluation.path_of(folder, name, keep), ["A" if is_right else "B" for is_right in right])
        models.append(evaluation.Answers(folder))
    text = report.recommended(*models)
    assert all(word in text for word in words), text
    assert "10.0 [" in text
    assert report.recommended(models[0], None) == "Not decided: not measured with both seeds.\n"


@pytest.mark.slow
def test_the_default_of_the_op_is_the_one_that_was_decided() -> None:
    """By the stored answers of both models; the page and its summary say so."""
    folder = Path(__file__).parents[1] / "benchmarks/results/vlm"
    found, other = evaluation.Answers(folder), evaluation.Answers(folder / report.SECOND)
    said = report.recommended(found, other)
    assert f"**so `{arms.DEFAULT}` is the default.**" in said
    for page in ("vlm.md", "quality.md"):
        text = (Path(__file__).parents[1] / "docs" / page).read_text()
        assert said.strip() in text
        assert report.decision(found).rpartition("\n\n")[2].strip() in text
    assert arms.ARMS[arms.DEFAULT].keywords == arms.IN_ROUNDS
    assert Options() == Options(**arms.IN_ROUNDS)


def test_signals_are_judged_by_the_roc_curve(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    signal, right = torch.randn(60, generator=g).numpy().round(1), torch.rand(240, generator=g).numpy() < 0.6
    lines = [
        {
            "picture": q % 60,
            "photograph": f"{q % 12}",
            "region": 0,
            "kind": "read",
            "text": "",
            "answer": "A",
            "height": 9,
        }
        for q in range(240)
    ]
    evaluation._write(tmp_path / evaluation.QUESTIONS, lines)
    found = evaluation.Answers(tmp_path)
    among = np.arange(240) % 7 > 0
    got = found.foretold(signal, right, among)
    lost = [signal[q % 60] for q in range(240) if among[q] and not right[q]]
    kept = [signal[q % 60] for q in range(240) if among[q] and right[q]]
    want = np.mean([(a > b) + (a == b) / 2 for a in lost for b in kept])
    assert got.value == pytest.approx(100 * want)
    assert got.low < got.value < got.high
    whether = np.arange(60) % 4 > 0
    perfect = found.foretold(-whether.astype(float), whether[np.arange(240) % 60], among)
    assert tuple(perfect) == pytest.approx((100, 100, 100))


def test_the_table_of_the_guard(tmp_path: Path) -> None:
    """Sixty pictures with four questions each; those with odd numbers need more than 16 tokens, and lose all there."""
    lines = [
        {"picture": q % 60, "photograph": f"{q % 60}", "region": 0, "kind": kind, "text": "", "answer": "A"}
        for q, kind in enumerate(["read"] * 60 + ["digit"] * 180)
    ]
    evaluation._write(tmp_path / evaluation.QUESTIONS, [{**line, "height": 9} for line in lines])
    evaluation._write(tmp_path / evaluation.NEEDED, [[128, 64, 32, 16 + 10 * (i % 2)] for i in range(60)])
    for name, keep in [(arms.FULL, 256), *((n, k) for n in (arms.DEFAULT, arms.GUARDED) for k in arms.BUDGETS)]:
        wrong = [name == arms.DEFAULT and keep == 16 and q % 2 == 1 for q in range(240)]
        evaluation._write(evaluation.path_of(tmp_path, name, keep), ["B" if is_wrong else "A" for is_wrong in wrong])
    sheet = report.guards(evaluation.Answers(tmp_path))
    assert [line[1] for line in sheet.lines] == ["0", "0", "0", "50"]
    keep, little, there, elsewhere, read_there, read_elsewhere, mean, alone, guarded = sheet.lines[3]
    assert (keep, little, mean) == ("16", "50", "21.0")
    assert there == read_there == "100.0 [100.0, 100.0]"
    assert elsewhere == read_elsewhere == "0.0 [0.0, 0.0]"
    assert alone.startswith("50.0 [")
    assert guarded == "100.0 [100.0, 100.0]"
    assert sheet.lines[0][2] == sheet.lines[0][4] == ""


def test_signals_are_larger_where_more_is_lost() -> None:
    g = torch.Generator().manual_seed(4)
    few = torch.randn(1, 8, 128, generator=g)[:, torch.arange(256) % 8] + 0.1 * torch.randn(1, 256, 128, generator=g)
    many = torch.randn(1, 256, 128, generator=g)
    found = guard.signals(torch.cat([few, many]), (64, 16))
    assert set(found) == {"next pivot", "residual", "distance", "spread"}
    for name, values in found.items():
        assert values.shape == (2, 2)
        assert (values[1] > values[0]).all(), name
        assert name == "spread" or (values[:, 1] > values[:, 0]).all(), name
    rows = selection.take(many, apet_kernels.compress(many, 16, select="qr", basis=None, refine=2).indices)[0].double()
    rebuilt = np.linalg.lstsq(rows.T.numpy(), many[0].T.double().numpy(), rcond=None)[0].T @ rows.numpy()
    want = ((many[0].double().numpy() - rebuilt) ** 2).sum() / (many[0].double() ** 2).sum().item()
    assert found["residual"][1, 1].item() == pytest.approx(want)
