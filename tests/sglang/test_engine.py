"""SGLang's answers with the plugin are those of the same model in transformers with the hooks."""

from __future__ import annotations

import pytest
from served import Served, agree, clip, picture

SIZES = [(112, 168), (84, 280), (224, 112)]


def test_without_the_plugin_both_engines_agree(served: Served) -> None:
    """Otherwise a comparison with transformers shows nothing."""
    image = picture(112, 168)
    found, expected = served.ask([image]), served.expect([image])
    assert found.prompt == expected.prompt
    assert agree(found, expected)
    assert found.ids == expected.ids


@pytest.mark.parametrize(
    "options",
    [
        {"keep": 6},
        {"keep": 0.3},
        {"keep": 12, "layout": "overwrite", "basis": 4, "blend": 0.5},
        {"keep": 10, "select": "qr", "basis": "keep", "refine": 2},
    ],
    ids=["count", "ratio", "overwrite", "rounds"],
)
def test_compressed_pictures(served: Served, options: dict) -> None:
    """Several pictures of different sizes: the same probabilities, at the same positions, and another answer than
    without compression."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    found = served.ask(images, **{f"apet_{name}": value for name, value in options.items()})
    assert agree(found, served.expect(images, **options))
    whole = served.ask(images)
    assert found.prompt < whole.prompt
    assert not agree(found, whole)


@pytest.mark.parametrize("options", [{"keep": 3}, {"keep": 0.4}], ids=["count", "ratio"])
def test_compressed_videos(served: Served, options: dict) -> None:
    """Videos alone, and after a picture: each of their temporal steps keeps as many, at its positions."""
    if served.name != "qwen2_vl":
        pytest.skip("about frames without their times, SGLang answers otherwise than transformers, or raises an error")
    for images in ([], [picture(112, 168)]):
        videos = [clip(112, 140, 8, seed=4), clip(84, 84, 4, seed=6)]
        whole = served.ask(images, videos=videos)
        assert agree(whole, served.expect(images, videos=videos)), "the engines differ without compression"
        found = served.ask(images, videos=videos, **{f"apet_{name}": value for name, value in options.items()})
        assert agree(found, served.expect(images, videos=videos, **options))
        assert found.prompt < whole.prompt
        assert not agree(found, whole)


def test_budgets_do_not_share_caches(served: Served) -> None:
    """One picture with several budgets and options, with full caches, and again from the prefix cache."""
    image = picture(140, 196, 7)
    asked = [{}, {"apet_keep": 8}, {"apet_keep": 8, "apet_layout": "overwrite", "apet_basis": 4}, {"apet_keep": 9}]
    expected = []
    for kwargs in asked:
        served.forget()
        expected.append(served.ask([image], **kwargs))
    assert not any(agree(one, other) for i, one in enumerate(expected) for other in expected[:i])
    for _ in range(2):
        for kwargs, alone in zip(asked, expected, strict=True):
            assert agree(served.ask([image], **kwargs), alone)
    again = served.ask([image], **asked[1])
    assert again.cached > alone.prompt // 2
    other_text = served.ask([image], "why?", **asked[1])  # encoded before: its positions are still known
    served.forget()
    assert agree(other_text, served.ask([image], "why?", **asked[1]))


def test_generation_goes_on(served: Served) -> None:
    """After the prompt, positions are those without compression."""
    image = picture(112, 168, 3)
    assert served.ask([image], tokens=8, apet_keep=5).ids == served.expect([image], tokens=8, keep=5).ids


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"apet_keep": 0}, "apet_keep=0 is neither a count"),
        ({"apet_kep": 8}, "apet_kep is not an option of ApET"),
        ({"apet_basis": 8}, "apet_basis=8 needs apet_keep"),
    ],
)
def test_invalid_options_raise(served: Served, kwargs: dict, message: str) -> None:
    """And the engine continues."""
    with pytest.raises(ValueError, match=message):
        served.ask([picture(56, 56)], **kwargs)
    assert served.ask([picture(56, 56)]).ids
