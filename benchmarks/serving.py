"""`vllm serve` with the plugin: requests a second and time to the first token, with and without compression.

    .build/vllm/bin/python -m benchmarks.serving     (options: benchmarks/lib/suite.py)

`make test-vllm` makes that environment. One server (benchmarks/lib/llava.py) answers chat requests of one photo and
some text; the budget is set per request. Every request has a different picture and prefix caching is off, so no cache
is hit. Each of the concurrent clients sends its next request when the last is answered. Times include everything: HTTP,
preprocessing, vision encoder, compression, language model.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import functools
import importlib.util
import io
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.lib import llava
from benchmarks.lib.compare import Comparison, Row, Timed
from benchmarks.lib.device import Cpu, Device
from benchmarks.lib.llava import REAL, SMOKE, TOKENS, Size
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite

NO_VLLM = "vLLM is not installed here: `make test-vllm` makes an environment that has it"
QUESTION = "What is to be seen in this picture?"
KEEPS = (TOKENS, 512, 64)  # the first keeps all tokens
ANSWER = 16  # tokens


@dataclass(frozen=True)
class Load:
    """The number of concurrent clients, and the least number of requests that each of them sends in a round."""

    concurrency: int

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds."""
        return {"concurrency": self.concurrency}

    @property
    def requests(self) -> int:
        """The number of requests of a round, of all clients together."""
        return max(3, self.concurrency)

    def __str__(self) -> str:
        return f"concurrency {self.concurrency}"


def name_of(keep: int) -> str:
    """Returns the name of a budget in a row."""
    return "uncompressed" if keep == TOKENS else f"apet {keep}"


class Server(Cpu):
    """A server, started, with an endless supply of pictures."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self._stack = contextlib.ExitStack()
        self.address = self._stack.enter_context(server(size))
        self.pictures = pictures()

    def close(self) -> None:
        """Ends the server."""
        self._stack.close()


def find(smoke: bool) -> Device:
    """Returns a server of the real or a tiny model. Raises RuntimeError if there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError(NO_VLLM)
    return Server(SMOKE if smoke else REAL)


@contextlib.contextmanager
def server(size: Size) -> Iterator[str]:
    """Starts a server, and yields its address once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        llava.save(Path(folder), size)
        options = ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager", "--no-enable-prefix-caching"]
        options += ["--max-model-len", "1024", "--max-num-seqs", "16", "--served-model-name", "model"]
        options += ["--mm-processor-kwargs", json.dumps({"apet_keep": 1.0}), "--trust-request-mm-kwargs"]
        options += ["--host", "127.0.0.1", "--port", str(port)]
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
        # By default vLLM reserves a core for the server, which would be half of two.
        settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count())}
        log = Path(folder, "log")
        serve = [Path(sys.executable).parent / "vllm", "serve", folder, *options]
        with log.open("w") as out:
            process = subprocess.Popen(serve, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT)
        try:
            address = f"http://127.0.0.1:{port}"
            while process.poll() is None:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"vllm serve ended: {log.read_text()[-3000:]}")
            yield f"{address}/v1/chat/completions"
        finally:
            process.terminate()
            process.wait(60)


def pictures() -> Iterator[str]:
    """Yields parts of a photo, no two alike, as data URLs."""
    import skimage
    from PIL import Image

    photo = Image.open(Path(skimage.__path__[0], "data", "astronaut.png"))
    for number in itertools.count():
        top, left = divmod(number, 172)
        file = io.BytesIO()
        photo.crop((left, top, left + 340, top + 340)).save(file, "JPEG", quality=90)
        yield "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def ask(address: str, keep: int, url: str) -> tuple[float, int]:
    """Returns the seconds to the first token, and the tokens of the prompt. Raises RuntimeError if the answer is cut
    short."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "allowed_token_ids": list(llava.LETTERS)}
    body |= {"stream": True, "stream_options": {"include_usage": True}, "mm_processor_kwargs": {"apet_keep": keep}}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    begin, first, usage = time.perf_counter(), None, {}
    with urllib.request.urlopen(request, timeout=600) as events:
        for line in events:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line.removeprefix(b"data: "))
            usage = event.get("usage") or usage
            said = any(choice["delta"].get("content") for choice in event["choices"])
            first = time.perf_counter() - begin if said and first is None else first
    if first is None or usage.get("completion_tokens") != ANSWER:
        raise RuntimeError(f"an answer of {ANSWER} tokens was asked for, and got {usage}")
    return first, usage["prompt_tokens"]


def answers(server: Server, keep: int, load: Load, _: None = None) -> Timed:
    """Returns the seconds per request of one round, and to the first tokens: their median, and the slowest."""
    given = list(itertools.islice(server.pictures, load.requests))
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(load.concurrency) as clients:
        first = [seconds for seconds, _ in clients.map(functools.partial(ask, server.address, keep), given)]
    each, name = (time.perf_counter() - begin) / load.requests, name_of(keep)
    return Timed({name: each, f"{name} first token": statistics.median(first), f"{name} slowest": max(first)})


def compare(load: Load, device: Device) -> Comparison:
    """Checks the lengths of prompts, and times all budgets."""
    assert isinstance(device, Server)
    lengths = {keep: ask(device.address, keep, next(device.pictures))[1] for keep in KEEPS}
    for keep, found in lengths.items():
        wanted = lengths[TOKENS] - TOKENS + keep
        assert found == wanted, f"apet_keep={keep}: a prompt has {found} tokens, not {wanted}"
    calls = {name_of(keep): functools.partial(answers, device, keep, load) for keep in KEEPS}
    shares = dict.fromkeys(calls, 1.0)
    return Comparison(device, load.fields(), calls, [None], shares, base=name_of(TOKENS), sums={})


def gains(row: Row, keep: int) -> tuple[float, float]:
    """Returns the ratio of requests per second to that with all tokens, and how many times sooner the first token
    comes."""
    name, all_tokens = name_of(keep), name_of(TOKENS)
    first = row.faster[f"{all_tokens} first token"] / row.faster[f"{name} first token"]
    return 1 / row.faster.get(name, 1.0), first


def sheets(results: Results) -> list[Sheet]:
    """Returns the table, with a note of the cases in which compression does not pay."""
    lines, losing = [], []
    for row, keep in itertools.product(results.rows, KEEPS):
        name, (faster, sooner) = name_of(keep), gains(row, keep)
        seconds = {part: row.ms[f"{name} {part}"] / 1e3 for part in ("first token", "slowest")}
        lines.append(
            [
                *(str(row.case["concurrency"]), str(keep), f"{1e3 / row.ms[name]:.3f}", f"{faster:.2f}"),
                *(f"{seconds['first token']:.2f}", f"{seconds['slowest']:.2f}", f"{sooner:.2f}"),
            ]
        )
        if keep < TOKENS and min(faster, sooner) <= 1.02:
            losing.append(f"{keep} at {Load(row.case['concurrency'])} ({faster:.2f} faster, {sooner:.2f} sooner)")
    note = (
        "kept: tokens of an image, of 576. requests/s: answered, everything included. first token: seconds from "
        "sending a request, median and slowest of a round. All are medians over the rounds. faster, sooner: against "
        "all tokens. Does not pay (a gain of 2 % or less, or a loss): "
        f"{'; '.join(losing) or 'nothing measured here'}."
    )
    columns = ["concurrency", "kept", "requests/s", "faster", "first token s", "slowest s", "sooner"]
    return [Sheet("Serving LLaVA with vLLM", note, columns, lines)]


def head(rates: dict[str, float]) -> dict[str, str]:
    """Returns a description of the model."""
    text = REAL.text
    return {
        "model": f"LLaVA shape, random bfloat16 weights: CLIP-L/14-336, decoder of {text['num_hidden_layers']} layers "
        f"of {text['hidden_size']}; answers of {ANSWER} tokens; vLLM {version('vllm-cpu')} on the CPU"
    }


SUITE = Suite(
    "serving",
    "`vllm serve` with the plugin: requests a second and time to the first token, with and without compression.",
    lambda smoke: [Load(concurrency) for concurrency in (1, 4, 16)],
    compare,
    sheets,
    rounds=2,
    device=find,
    rates=lambda device: {},
    head=head,
)

if __name__ == "__main__":
    SUITE.main()
