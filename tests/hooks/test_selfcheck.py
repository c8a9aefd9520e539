"""The self-check that `patch` runs if transformers, torch or the code of a model differ from the tested ones."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import apet
import families
import pytest
import torch
import transformers
from apet.hooks import find, selfcheck, sources, state, tiny, versions
from families import FAMILIES, Family, build
from running import BOTH, FIRST
from torch.torch_version import TorchVersion


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the folder of the records of passed checks in these tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "apet-kernels" / "selfcheck"


@pytest.fixture
def untested(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes all versions of transformers count as untested."""
    monkeypatch.setattr(sources, "digests", dict)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the families that were checked."""
    seen: list[str] = []
    check = selfcheck.check

    def counted(model: torch.nn.Module, *args: Any) -> selfcheck.Result:
        seen.append(model.config.model_type)
        return check(model, *args)

    monkeypatch.setattr(selfcheck, "check", counted)
    return seen


@pytest.mark.parametrize("stage", selfcheck.STAGES)
def test_passes(family: Family, stage: str) -> None:
    result = selfcheck.check(build(family.name), stage)
    assert result.error is None
    assert 0 < result.difference < selfcheck.TOLERANCE


def positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    right = state.Part.positions
    monkeypatch.setattr(state.Part, "positions", lambda *args: right(*args) + 1)


def padding_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = state.Part.columns
    monkeypatch.setattr(state.Part, "columns", lambda *args: torch.ones_like(right(*args)))


@pytest.mark.parametrize("plant", [positions_off_by_one, padding_seen])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_fails_with_an_error_in_the_hooks(name: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    result = selfcheck.check(build(name), "both")
    assert result.error is not None
    assert "with a cache that grows, the decoder's output differs from the reference by" in result.error
    assert transformers.__version__ in result.message()
    assert versions.TESTED[0] in result.message()
    assert "check=False" in result.message()


def test_patch_raises_where_it_fails(
    untested: None, folder: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    model = build("llava")
    with monkeypatch.context() as planted:
        positions_off_by_one(planted)
        with pytest.raises(ValueError, match=r"the self-check failed for model_type='llava' with transformers"):
            apet.patch(model, **FIRST)
        assert apet.options(model) is None
        assert not families.hooks_of(model, "apet")
        assert not folder.exists()
        apet.patch(model, **FIRST, check=False)
    assert apet.options(model) is not None
    assert calls == ["llava"]


def test_record(untested: None, folder: Path, calls: list[str]) -> None:
    """A passed check is recorded for each stage, and a later patch of the same code runs no check."""
    model = build("llava")
    for options in (FIRST, FIRST, BOTH, FIRST, BOTH):
        apet.patch(model, **options)
    assert calls == ["llava", "llava"]
    records = [json.loads(path.read_text()) for path in folder.iterdir()]
    assert len(records) == 2
    assert all(transformers.__version__ in record["key"] and torch.__version__ in record["key"] for record in records)


def test_folder_that_cannot_be_written(untested: None, folder: Path, calls: list[str]) -> None:
    folder.parent.parent.joinpath("apet-kernels").write_text("a file, where a folder should be")
    model = build("llava")
    for _ in range(2):
        apet.patch(model, **FIRST)
    assert calls == ["llava", "llava"]


def test_code_as_tested_is_not_checked(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llava")
    files, unchanged = selfcheck.code(selfcheck.classes_of(find(model, FIRST)))
    assert unchanged
    assert "models/llama/modeling_llama.py" in files
    monkeypatch.setattr(sources, "digests", lambda: {transformers.__version__: files})
    monkeypatch.setattr(sources, "TORCH", (".".join(torch.__version__.split(".")[:2]),))
    apet.patch(model, **FIRST)
    assert calls == []
    assert not folder.exists()
    changed = files | {"models/llama/modeling_llama.py": "0" * 16}
    monkeypatch.setattr(sources, "digests", lambda: {transformers.__version__: changed})
    apet.patch(model, **FIRST)
    assert calls == ["llava"]


def test_an_untested_torch_is_checked(folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, although the code of transformers is as tested."""
    model = build("llava")
    files, _ = selfcheck.code(selfcheck.classes_of(find(model, FIRST)))
    monkeypatch.setattr(sources, "digests", lambda: {transformers.__version__: files})
    monkeypatch.setattr(torch, "__version__", TorchVersion("2.99.1+cpu"))
    selfcheck._versions.cache_clear()
    try:
        for _ in range(2):
            apet.patch(model, **FIRST)
    finally:
        selfcheck._versions.cache_clear()
    assert calls == ["llava"]
    (record,) = folder.iterdir()
    assert "2.99.1+cpu" in json.loads(record.read_text())["key"]
    monkeypatch.setattr(torch, "__version__", TorchVersion(f"{versions.TORCH[-1]}.7+cu999"))
    apet.patch(build("llava"), **BOTH)  # another patch release of a tested minor version
    assert calls == ["llava"]


@pytest.mark.parametrize("method", ["forward", "__init__"])
def test_functions_replaced_in_memory_are_checked_each_time(
    method: str, folder: Path, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Libraries of faster kernels replace functions in other modules than those that the hooks use."""
    attention = type(build("llava").model.language_model.layers[0].self_attn)
    right = getattr(attention, method)
    monkeypatch.setattr(attention, method, lambda self, *args, **kwargs: right(self, *args, **kwargs))
    model = build("llava")
    for _ in range(2):
        apet.patch(model, **FIRST)
    assert calls == ["llava", "llava"]
    assert not folder.exists()


@pytest.mark.parametrize("stage", [FIRST, BOTH], ids=["first", "both"])
def test_family_without_a_tiny_model(
    stage: dict[str, Any], untested: None, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family of this package is not patched without its check."""
    model = build("llava")
    monkeypatch.setattr(tiny, "config", lambda *_: 1 // 0)
    with pytest.raises(ValueError, match="no tiny model of model_type='llava'") as error:
        apet.patch(model, **stage)
    for word in ("ZeroDivisionError", transformers.__version__, versions.TESTED[0], "check=False"):
        assert word in str(error.value)
    assert apet.options(model) is None
    apet.patch(model, **stage, check=False)
    assert apet.options(model) is not None
    assert calls == []


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_adapter_of_a_user_without_a_tiny_model(
    name: str, untested: None, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    apet.register_adapter(name, apet.Adapter())
    monkeypatch.setattr(tiny, "config", lambda *_: 1 // 0)
    monkeypatch.setattr(selfcheck, "_WARNED", set())
    with pytest.warns(UserWarning, match=f"no tiny model of model_type='{name}'"):
        apet.patch(model, **FIRST)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        apet.patch(model, **FIRST)
    assert calls == []


def test_an_adapter_of_a_user_is_not_among_the_families_that_the_doctor_checks() -> None:
    before = selfcheck.families()
    apet.register_adapter("aya_vision", apet.Adapter())
    assert selfcheck.families() == before
    assert {*FAMILIES} <= {*before}
    assert "aya_vision" not in before
