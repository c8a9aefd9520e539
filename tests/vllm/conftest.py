"""The plugin in the real engine, on tiny models: `make test-vllm`, in a separate environment.

Without vLLM these tests are not collected.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# This folder has the same name, so the check requires a package.
if not any(Path(place, "vllm", "__init__.py").exists() for place in sys.path):
    collect_ignore_glob = ["*"]
else:
    import tiny_models
    import torch
    from engines import MODELS, MROPE, SETTINGS, Served
    from xdist.scheduler import LoadScopeScheduling

    os.environ |= SETTINGS
    torch.set_num_threads(1)

    # An engine takes most of a minute to start. These differ in what matters: compressed before the projector; tiles;
    # after it; M-RoPE; deepstack. `make test-vllm-all` runs the others.
    FIVE = ("llava", "llava_next", "internvl", "qwen2_5_vl", "qwen3_vl")

    @pytest.hookimpl(tryfirst=True)  # before the marks are looked at
    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        for item in items:
            params = item.callspec.params if hasattr(item, "callspec") else {}
            if params.get("served", FIVE[0]) not in FIVE:
                item.add_marker(pytest.mark.slow)

    class ByModel(LoadScopeScheduling):
        """Runs all tests of a model in one process, which starts its engine once, and the others by their files."""

        def _split_scope(self, nodeid: str) -> str:
            file, _, name = nodeid.partition("::")
            parts = re.split(r"[][-]", name)
            return next((model for model in MODELS if model in parts), file)

    def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
        return ByModel(config, log)

    @pytest.fixture(scope="session")
    def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
        """Returns the folder of the tiny model of that name."""
        return functools.cache(lambda name: tiny_models.save(name, tmp_path_factory.mktemp(name)))

    @pytest.fixture(scope="session")
    def serve(folder: Callable[[str], Path]) -> Callable[[str], Served]:
        """Returns the engine of that model, started once in this process."""
        running: dict[str, Served] = {}

        def start(name: str) -> Served:
            if name not in running:
                running[name] = Served(name, folder(name), {"apet_keep": 1.0} if name in MROPE else None)
            return running[name]

        return start

    @pytest.fixture
    def served(request: pytest.FixtureRequest, serve: Callable[[str], Served]) -> Served:
        """Returns the engine that the test is parametrised with, its caches empty."""
        engine = serve(request.param)
        engine.forget()
        return engine
