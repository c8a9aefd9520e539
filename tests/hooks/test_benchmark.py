"""`python -m benchmarks.hooks`: runs on a tiny model, and judges what it measured by the goals."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from apet.model_report import Prefill
from PIL import Image

from benchmarks import hooks
from benchmarks.lib import llava


def test_smoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hooks, "peak_gflops", lambda dtype: dtype.itemsize)  # float32 is the faster one
    words = ["--smoke", "--batch", "1", "--rounds", "1", "--json", str(tmp_path / "rows.json")]
    monkeypatch.setattr(sys, "argv", ["benchmarks/hooks.py", *words])
    before = torch.get_num_threads()
    hooks.main()
    torch.set_num_threads(before)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    *rows, other, goal, both = rows
    assert [(row["dtype"], row["kept"]) for row in (other, goal, both)] == [
        *(("bfloat16", "576"), ("bfloat16", "64"), ("bfloat16", "96 → 32"))
    ]
    assert {row["dtype"] for row in rows} == {"float32"}
    assert [row["kept"] for row in rows] == ["576", "288", "64", "96 → 32"]
    lengths = {row["kept"]: row["prefill"]["lengths"] for row in rows}
    assert lengths == {"576": [616] * 4, "288": [328] * 4, "64": [104] * 4, "96 → 32": [136] * 2 + [72] * 2}
    whole, *compressed = rows
    assert whole["speedup"] == whole["predicted"] == 1
    assert whole["op_seconds"] == whole["hook_seconds"] == [0]
    for row in compressed:
        assert row["predicted"] > 1
        assert 0 < row["op_seconds"][0] < row["hook_seconds"][0] < row["prefill_seconds"][0]
        assert row["prefill_seconds"][0] < row["total_seconds"][0]
        assert (row["missed"] is None) == (row["kept"] == "288")
        assert all(s > 0 for s in row["attainable_seconds"])
        assert len(row["attainable_seconds"]) == (row["kept"] != "96 → 32")
    text = capsys.readouterr().out
    for word in ("float32, batch 1", "bfloat16, batch 1", "96 → 32", "of predicted"):
        assert word in text


def row(**more: object) -> hooks.Row:
    """96 → 32 of a benchmark where all is well."""
    good = {
        "dtype": "float32", "batch": 1, "kept": "96 → 32", "mean": 64,
        "prefill": Prefill([136, 72], 10**9, 10**9, 10**6, 10**6),
        "predicted": 2.5, "prefill_seconds": [1.0, 1.1, 1.0], "total_seconds": [2.0] * 3, "op_seconds": [0.001] * 3,
        "hook_seconds": [0.003] * 3, "attainable_seconds": [], "speedup": 2.4, "total_speedup": 1.5,
        "op_share": 0.0004, "hook_share": 0.0012,
    }  # fmt: skip
    return hooks.Row(**(good | more))


def test_goals() -> None:
    assert row().missed == []
    assert row(mean=128, speedup=0.1).missed is None
    assert row(op_share=0.002).missed == ["op 0.20% of the prefill"]
    assert row(speedup=2.0).missed == ["80% of predicted, goal 85%"]
    assert row(prefill_seconds=[1.0, 2.0, 1.5, 0.5]).missed == ["noise 100%, measure again on an idle machine"]


def test_sheet() -> None:
    rows = [row(kept="576", mean=576, op_seconds=[], hook_seconds=[]), row(), row(batch=4)]
    rows[0].op_seconds = rows[0].hook_seconds = [0.0]
    one, four = hooks.sheets(rows, hooks.REAL)
    assert (one.title, four.title) == ("float32, batch 1", "float32, batch 4")
    assert [line[0] for line in one.lines] == ["576", "96 → 32"]
    assert all(len(line) == len(one.columns) for line in (*one.lines, *four.lines))
    assert one.lines[1] == [
        *("96 → 32", "2.001", "1000", "2.40", "2.50", "96%", "-", "2000", "1.50"),
        *("1.00", "0.040%", "3.0", "0.12%", "10%", "met"),
    ]


def test_the_page_has_a_place_for_the_tables() -> None:
    text = hooks.replaced(hooks.PAGE.read_text(), hooks.BEGIN, hooks.END, "figures\n")
    assert f"{hooks.BEGIN}\nfigures\n{hooks.END}" in text


def test_the_model_that_is_served(tmp_path: Path) -> None:
    """As vLLM reads it: an image is 576 placeholders, every letter a token that decodes to one sign."""
    llava.save(tmp_path, hooks.SMOKE.vision, hooks.SMOKE.text)
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


def test_the_model_has_about_a_billion_parameters() -> None:
    with torch.device("meta"):
        parameters = sum(p.numel() for p in hooks.build(hooks.REAL, torch.float32).parameters())
    assert 1.0e9 < parameters < 1.3e9
