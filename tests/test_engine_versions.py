"""What the plugins check of an engine before they change anything."""

from __future__ import annotations

import sys
import types

import pytest
from apet.engines import versions


class Made:
    def work(self, one: int, two: int) -> None: ...


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("engine")
    module.Made, module.nothing = Made, None
    monkeypatch.setitem(sys.modules, "engine", module)


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        ("engine.Made.work", ("one", "three"), "engine.Made.work of this version of Engine has no three"),
        ("engine.Made.play", ("one",), "this version of Engine has no engine.Made.play"),
        ("engine.other", (), "this version of Engine has no engine.other"),
        ("machine.Made", (), "this version of Engine has no machine.Made"),
    ],
)
def test_the_first_name_that_is_missing_is_named(
    engine: None, name: str, wanted: tuple[str, ...], message: str
) -> None:
    versions.check("Engine", {"engine.Made.work": ("one", "two"), "engine.nothing": ()})
    with pytest.raises(RuntimeError, match=message):
        versions.check("Engine", {"engine.nothing": (), name: wanted})
