"""The fixture `family` runs a test on every model family. Tests must not change shared models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import apet
import families
import processors
import pytest
import torch
from apet.hooks.adapters import ADAPTERS


@pytest.fixture(params=list(families.FAMILIES))
def family(request: pytest.FixtureRequest) -> families.Family:
    return families.FAMILIES[request.param]


# Tests of the code that all families share take long. So `make test` runs these functions on every family, and the
# others on `families.THREE`.
EVERY_FAMILY = {
    *("test_batch", "test_forward", "test_positions", "test_presets", "test_second_turn"),
    *("test_generate_of_the_class", "test_unpatch_leaves_nothing", "test_report", "test_picture"),
}


@pytest.hookimpl(tryfirst=True)  # before pytest reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        family = getattr(item, "callspec", None) and item.callspec.params.get("family")
        name = family.name if isinstance(family, families.Family) else family
        if name in families.FAMILIES and name not in families.THREE and item.originalname not in EVERY_FAMILY:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the folder of a tiny LLaVA-1.5."""
    return processors.llava_folder(tmp_path_factory.mktemp("models") / "llava", "llava")


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Checks that no hook, option or attribute stays on a shared model, and no adapter in the registry. Also silences
    messages about tiny configurations."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    known = dict(ADAPTERS)
    with torch.no_grad():
        yield
    ADAPTERS.clear()
    ADAPTERS.update(known)
    for model in families.built.values():
        assert apet.options(model) is None
        assert families.hooks_of(model, "apet") == []
