"""`family`: one test body, every model family. Shared models must come back from a test as they went into it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import apet
import families
import processors
import pytest
import torch


@pytest.fixture(params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> families.Family:
    return families.FAMILIES[request.param]


FOUR = ("llava", "llava_next", "qwen2_5_vl", "video_llava")


@pytest.fixture(
    params=[name if name in FOUR else pytest.param(name, marks=pytest.mark.slow) for name in families.FAMILIES]
)
def main_family(request: pytest.FixtureRequest) -> families.Family:
    """For what is the engine's alone, and slow: four families every day."""
    return families.FAMILIES[request.param]


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny LLaVA-1.5."""
    return processors.llava_folder(tmp_path_factory.mktemp("models") / "llava", "llava")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """No hook, option or attribute stays on a shared model; nothing is printed about tiny configurations."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with torch.no_grad():
        yield
    for model in families.built.values():
        assert apet.options(model) is None
        assert families.hooks_of(model, "apet") == []
