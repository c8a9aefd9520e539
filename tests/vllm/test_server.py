"""`vllm serve` with a real photo: budgets at the start and per request, and error messages for clients."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import skimage
import tiny

PHOTO = Path(skimage.__path__[0], "data", "astronaut.png")


@pytest.fixture(scope="module")
def address(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Starts a server that keeps 16 tokens of an image and accepts the options of requests; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--mm-processor-kwargs", json.dumps({"apet_keep": 16}), "--trust-request-mm-kwargs", "--port", str(port)]
    options += ["--enforce-eager", "--max-model-len", "1024", "--served-model-name", "tiny", "--host", "127.0.0.1"]
    log = tmp_path_factory.mktemp("server") / "log"
    with log.open("w") as out:
        server = subprocess.Popen(
            [Path(sys.executable).parent / "vllm", "serve", folder("llava"), *options],
            env={k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            end = time.monotonic() + 300
            while time.monotonic() < end and server.poll() is None:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise RuntimeError(f"the server did not start: {log.read_text()[-3000:]}")
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            server.terminate()
            server.wait(60)


def chat(address: str, kwargs: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
    """Returns status and answer to a question about the photo."""
    url = "data:image/png;base64," + base64.b64encode(PHOTO.read_bytes()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is this?"}]
    body: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": 8, "temperature": 0, "ignore_eos": True}
    if kwargs is not None:
        body["mm_processor_kwargs"] = kwargs
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_a_photo_in_a_chat(address):
    status, answer = chat(address)
    assert status == 200
    assert answer["usage"]["completion_tokens"] == 8
    counts = {}
    for kwargs in ({"apet_keep": 1.0}, {"apet_keep": 40}, {"apet_keep": 0.25}, {"apet_keep": 5}):
        status, told = chat(address, kwargs)
        assert status == 200
        counts[kwargs["apet_keep"]] = told["usage"]["prompt_tokens"]
    full, tile = counts[1.0], tiny.TILE
    assert counts == {1.0: full, 40: full - tile + 40, 0.25: full - tile + 16, 5: full - tile + 5}
    assert answer["usage"]["prompt_tokens"] == counts[0.25]


def test_metrics_tell_tokens_before_and_after(address):
    def counted(when: str) -> float:
        with urllib.request.urlopen(address.replace("/v1/chat/completions", "/metrics"), timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        name = f'apet:visual_tokens_{when}_total{{modality="image"}} '
        return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))

    before, after = counted("before"), counted("after")
    assert chat(address, {"apet_keep": 7})[0] == 200
    assert (counted("before"), counted("after")) == (before + tiny.TILE, after + 7)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"apet_keep": 0}, "apet_keep=0 is neither a count (an int from 1) nor a ratio (a float in (0, 1])"),
        ({"apet_keep": "many"}, "apet_keep='many' is neither a count"),
        ({"apet_keep": 8, "apet_layout": "overwrite", "apet_basis": 10}, "'overwrite' needs keep > basis, got keep=8"),
        ({"apet_kepe": 8}, "apet_kepe is not an option of ApET"),
    ],
)
def test_a_bad_budget_is_the_clients_fault(address, kwargs, message):
    """The client gets an error, and the server continues."""
    status, answer = chat(address, kwargs)
    assert 400 <= status < 500
    assert message in answer["error"]["message"]
    assert chat(address, {"apet_keep": 8})[0] == 200
