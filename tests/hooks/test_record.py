"""`python -m apet.hooks.record`: a version is recorded only if the self-check passes for every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from apet.hooks import record, selfcheck, sources, state, versions


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the file that is written in these tests. LLaVA alone is checked, with two decoders."""
    path = tmp_path / "tested.json"
    path.write_text(json.dumps({"4.57.6": {"one.py": "0" * 16}}))
    monkeypatch.setattr(record, "FILE", path)
    monkeypatch.setattr(record, "digests", lambda: json.loads(path.read_text()))
    monkeypatch.setattr(record, "DECODERS", ("llama", "qwen2"))
    monkeypatch.setattr(selfcheck, "families", lambda: ["llava"])
    return path


def test_records_the_files_of_every_model(file: Path) -> None:
    record.main()
    known = json.loads(file.read_text())
    assert list(known) == sorted({"4.57.6", transformers.__version__}, key=lambda v: [*map(int, v.split("."))])
    found = known[transformers.__version__]
    assert {"models/llama/modeling_llama.py", "models/qwen2/modeling_qwen2.py"} <= {*found}
    recorded = versions.digests().get(transformers.__version__)
    assert recorded is None or found.items() <= recorded.items()
    assert found["models/llava/modeling_llava.py"] == sources._digest(
        Path(transformers.__file__).parent / "models/llava/modeling_llava.py"
    )


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
def test_a_failed_check_records_nothing(decoder: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before, check = file.read_text(), selfcheck.check

    def planted(model: transformers.PreTrainedModel) -> selfcheck.Result:
        if model.config.get_text_config().model_type != decoder:
            return check(model)
        right = state.Part.positions
        with pytest.MonkeyPatch.context() as wrong:
            wrong.setattr(state.Part, "positions", lambda *args: right(*args) + 1)
            return check(model)

    monkeypatch.setattr(selfcheck, "check", planted)
    with pytest.raises(
        SystemExit, match=r"the self-check failed for model_type='llava'.*differs from the reference by"
    ):
        record.main()
    assert file.read_text() == before


def test_a_version_without_families_records_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_text()
    monkeypatch.setattr(selfcheck, "families", list)
    with pytest.raises(SystemExit, match="has none of the families"):
        record.main()
    assert file.read_text() == before
