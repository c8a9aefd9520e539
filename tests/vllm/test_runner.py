"""vLLM has two model runners. `make test-vllm` runs the tests of the plugin on both (runner_v2/sitecustomize.py)."""

from __future__ import annotations

import os
from collections.abc import Callable

from engines import Served


def test_the_model_runner_is_the_one_that_was_asked_for(serve: Callable[[str], Served]):
    second = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    module = "vllm.v1.worker.cpu.model_runner" if second else "vllm.v1.worker.cpu_model_runner"
    assert type(serve("qwen2_5_vl").runner).__module__ == module
