"""The benchmark of serving: its own plugin, and all of it with tiny models."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engines import Served, picture, prompt

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("served", ["llava"], indirect=True)
def test_rows_drawn_at_random(served: Served, monkeypatch: pytest.MonkeyPatch):
    """With the benchmark's plugin, requests of a certain basis get rows of the image, unmerged, in order; others get
    what the kernel gives."""
    from apet.engines import batch

    spec = importlib.util.spec_from_file_location("apet_serving", ROOT / "benchmarks" / "lib" / "serving_plugin.py")
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    monkeypatch.setattr(batch, "compress", batch.compress)  # undone at the end
    plugin.draw_at_random()
    image = picture(112, 112)
    taken = {}
    for basis in (plugin.RANDOM, 10):
        _, seen, _, _ = served.read(prompt("llava", image, apet_keep=12, apet_basis=basis))
        ((given, _),) = seen.projector
        taken[basis] = given
        features = seen.tower[0].view(-1, given.shape[-1])
    where = (taken[plugin.RANDOM][:, None] == features).all(-1).int()
    assert where.sum(1).eq(1).all()
    assert where.argmax(1).diff().gt(0).all()
    assert torch.equal(taken[10], torch.ops.apet.compress(features[None], 12)[0][0])


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path):
    """Five servers in turns: without the plugin, with it, and EVS at one rate."""
    command = [sys.executable, "-m", "benchmarks.serving", "--smoke", "--budgets", "1", "1/4"]
    done = subprocess.run([*command, "--json", tmp_path / "rows.json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    image, video = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {"plain", "apet all", "apet 1/4", "random 1/4"} <= image["ms"].keys()
    assert {"evs 1/4", "evs 1/4 token"} <= video["ms"].keys()
    assert video["counts"]["apet 1/4 KV MiB"] < video["counts"]["plain KV MiB"]
