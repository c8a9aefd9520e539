"""`python -m benchmarks.hooks` runs on a tiny model, and compares its results with the goals."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import transformers
from apet.model_report import Prefill
from PIL import Image

from benchmarks import hooks
from benchmarks.lib import llava, suite
from benchmarks.lib.compare import Row
from benchmarks.lib.suite import Results


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hooks, "peak_gflops", lambda dtype: dtype.itemsize)  # float32 is the faster one
    monkeypatch.setattr(suite, "THREADS", 1)  # two would wait for each other when other tests use the cores
    monkeypatch.setattr(suite, "SMOKE_ROUNDS", 1)
    monkeypatch.setattr(sys, "argv", ["benchmarks/hooks.py", "--smoke", "--json", str(tmp_path / "rows.json")])
    before = torch.get_num_threads()
    hooks.SUITE.main()
    torch.set_num_threads(before)
    found = suite.load(tmp_path / "rows.json")
    whole, goals = found.rows
    assert [row.case for row in found.rows] == [{"batch": 1, "dtype": name} for name in ("float32", "bfloat16")]
    assert [str(setting) for setting in hooks.settings_of(whole)] == ["576", "288", "64", "96 → 32"]
    assert [str(setting) for setting in hooks.settings_of(goals)] == ["576", "64", "96 → 32"]
    for row in found.rows:
        assert row.counts["answer"] == hooks.NEW_TOKENS
        compressed = [setting for setting in hooks.settings_of(row) if setting.keep is not None]
        for setting in compressed:
            assert hooks.predicted(row, setting) > 1
            op, all_hooks, prefill, answer = (
                row.seconds[f"{setting.name}{part}"][0] for part in (" op", " hooks", "", " answer")
            )
            assert 0 < op < all_hooks < prefill < answer
            assert (hooks.missed_with(row, setting) is None) == (str(setting) == "288")
        assert {name for name in row.ms if name.startswith("attainable")} == {
            f"attainable {setting}" for setting in hooks.settings_of(row) if setting.llm_keep is None
        }
        assert "uncompressed op" not in row.ms
    text = capsys.readouterr().out
    for word in ("float32, batch 1", "bfloat16, batch 1", "96 → 32", "of predicted"):
        assert word in text


def test_the_lengths_of_the_layers_are_checked() -> None:
    lengths = {hooks.Setting(None): [616] * 4, hooks.Setting(64): [104] * 4, hooks.Setting(96, 32): [136, 136, 72, 72]}
    for setting, right in lengths.items():
        hooks.check(setting, Prefill(right, 1, 1, 1, 1))
        with pytest.raises(AssertionError, match=f"{setting}: the layers have"):
            hooks.check(setting, Prefill([*right[:-1], right[-1] + 1], 1, 1, 1, 1))


BOTH = hooks.Setting(96, 32)


def row(batch: int = 1, speedup: float = 2.4, op: float = 0.0004, noise: float = 0.1) -> Row:
    """Returns the row of a good benchmark: all tokens, and 96 → 32."""
    ms = {"uncompressed": 2400.0, "uncompressed answer": 3000.0, "attainable 576": 2300.0}
    ms |= {"apet 96 → 32": 1000.0, "apet 96 → 32 answer": 2000.0, "apet 96 → 32 op": 1.0, "apet 96 → 32 hooks": 3.0}
    faster = {name: value / 2400 for name, value in ms.items() if name != "uncompressed"}
    faster |= {"apet 96 → 32": 1 / speedup, "apet 96 → 32 op": op, "apet 96 → 32 hooks": 0.0012}
    counts = {"answer": 8.0, "576": 5.0, "96 → 32": 2.0}
    every = dict.fromkeys(ms, 3)
    return Row(
        {"batch": batch, "dtype": "float32"},
        ms,
        every,
        faster,
        dict.fromkeys(ms, noise),
        {},
        {},
        base="uncompressed",
        counts=counts,
    )


def test_goals() -> None:
    assert hooks.missed(row()) == []
    assert hooks.missed_with(row(), BOTH) == []
    assert hooks.missed_with(row(), hooks.Setting(128)) is None
    assert hooks.missed_with(row(op=0.002), BOTH) == ["op 0.20% of the prefill"]
    assert hooks.missed(row(speedup=2.0)) == ["96 → 32: 80% of predicted, goal 85%"]
    assert hooks.missed_with(row(noise=1.0), BOTH) == ["noise 100%, measure again on an idle machine"]


def test_sheet() -> None:
    one, four = hooks.sheets(Results("hooks", {}, {}, [row(), row(batch=4)]))
    assert (one.title, four.title) == ("float32, batch 1", "float32, batch 4")
    assert [line[0] for line in one.lines] == ["576", "96 → 32"]
    assert all(len(line) == len(one.columns) for line in (*one.lines, *four.lines))
    assert one.lines[0] == [
        *("576", "5", "2400", "1.00", "1.00", "100%", "2300", "3000", "1.00", "-", "-", "-", "-", "10%", "none"),
    ]
    assert one.lines[1] == [
        *("96 → 32", "2", "1000", "2.40", "2.50", "96%", "-", "2000", "1.50"),
        *("1.00", "0.040%", "3.0", "0.12%", "10%", "met"),
    ]


def test_the_model_that_is_served(tmp_path: Path) -> None:
    """As vLLM reads it, an image has 576 placeholders, and every letter is a token that decodes to one character."""
    llava.save(tmp_path, llava.SMOKE)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    processor = transformers.AutoProcessor.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "<image>\nWhat?"}]
    prompt = processor.apply_chat_template(chat, tokenize=False)
    assert prompt == "user: <image>\nWhat?\nassistant:"
    ids = processor(images=[Image.new("RGB", (500, 400))], text=[prompt], return_tensors="pt")["input_ids"][0]
    assert int((ids == config.image_token_index).sum()) == llava.TOKENS
    assert len(ids) == llava.TOKENS + len(prompt) - len("<image>")
    signs = [processor.tokenizer.decode([token]) for token in llava.LETTERS]
    assert signs == [chr(code) for code in range(ord("!"), ord("~") + 1)]


def test_the_model_has_the_parameters_that_the_tables_say() -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in hooks.build(llava.REAL, torch.float32).parameters())
    hooks.build.cache_clear()
    assert f"{parameters / 1e9:.3g}B" == llava.PARAMETERS
