"""Tensor parallelism: every rank encodes and compresses for itself, so all must keep the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import parallel
import pytest


def answer(folder: Path, ranks: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, Path(parallel.__file__), folder, str(ranks)],
        env=os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_two_ranks_keep_the_same_tokens(folder: Callable[[str], Path], name: str):
    """And answer as one does, to rounding: the sums over the ranks' parts are in another order."""
    one, two = (answer(folder(name), ranks) for ranks in (1, 2))
    assert len(two["kept"]) == 2
    assert two["kept"][0] == two["kept"][1] == one["kept"][0] != []
    assert two["ids"] == one["ids"]
    for ours, theirs in zip(two["scores"], one["scores"], strict=True):
        common = ours.keys() & theirs.keys()
        assert len(common) >= 6
        assert max(abs(ours[token] - theirs[token]) for token in common) < 2e-3
