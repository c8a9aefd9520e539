"""Tensor parallelism: every rank runs the compression, so all must keep the same tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import parallel
import pytest
from apet.engines import batch


@pytest.mark.parametrize("served", [pytest.param("llava", marks=pytest.mark.slow), "qwen2_5_vl"], indirect=True)
def test_two_ranks_keep_the_same_tokens(served, folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    """Two ranks answer as one does, to within rounding, since sums over the ranks have another order."""
    done = subprocess.run(
        [sys.executable, Path(parallel.__file__), served.name, folder(served.name)],
        env=os.environ | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(next(line for line in done.stdout.splitlines()[::-1] if line.startswith("{")))

    kept, kernel = [], batch.apet_kernels.compress_packed

    def noting(*args, **kwargs):
        tokens, indices = kernel(*args, **kwargs)
        kept.append(indices.tolist())
        return tokens, indices

    monkeypatch.setattr(batch.apet_kernels, "compress_packed", noting)
    one = parallel.answer(served)

    assert two["kept"] == [kept, kept]
    assert kept
    assert two["ids"] == one["ids"]
    for ours, theirs in zip(two["scores"], one["scores"], strict=True):
        common = ours.keys() & theirs.keys()
        assert len(common) >= 6
        assert max(abs(ours[token] - theirs[token]) for token in common) < 2e-3
