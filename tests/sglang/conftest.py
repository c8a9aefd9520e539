"""The plugin in the real engine, on tiny models: `make test-sglang`, in a separate environment.

Without SGLang these tests are not collected.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

if importlib.util.find_spec("sglang") is None:
    collect_ignore_glob = ["*"]
else:
    sys.path += [str(HERE), str(HERE / "cpu"), str(HERE.parent / "vllm")]  # of the engine's processes as well
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    import tiny_models
    from served import Served

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
        """Returns the folder of the tiny model of that name."""

        @functools.cache
        def make(name: str) -> Path:
            made = tiny_models.save(name, tmp_path_factory.mktemp(name))
            config = json.loads((made / "config.json").read_text())
            config["vision_config"] |= {"in_chans": 3}  # as on the hub; SGLang reads it
            (made / "config.json").write_text(json.dumps(config))
            return made

        return make

    @pytest.fixture(scope="module", params=FAMILIES)
    def served(request: pytest.FixtureRequest, folder: Callable[[str], Path]) -> Iterator[Any]:
        """Returns the engine of a model, which ends with the module's tests of it."""
        engine = Served(request.param, folder(request.param))
        yield engine
        engine.close()
