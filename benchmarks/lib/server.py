"""A `vllm serve` that a benchmark starts: questions to it, the times of its answers, and how much cache they use."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PLUGIN = Path(__file__).with_name("serving_plugin.py")
STARTS_WITHIN = 1800.0  # seconds; loading a large model takes minutes
USED = re.compile(r"^vllm:kv_cache_usage_perc\{.*\} (\S+)$", re.MULTILINE)
BLOCKS = re.compile(r'^vllm:cache_config_info\{.*\bblock_size="(\d+)".*\bnum_gpu_blocks="(\d+)"', re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """The times of one answer in seconds, the tokens of its prompt, and the share of the KV cache that was in use, by
    all requests, when its first token came."""

    first: float  # from sending the request to its first token
    each: float  # per token after the first
    prompt: int
    used: float


@dataclass(frozen=True)
class Server:
    """A running server. `tokens`: the number that its KV cache can hold."""

    address: str
    tokens: int

    def ask(self, content: list[dict[str, Any]], answer: int, **more: Any) -> Answer:
        """Asks for `answer` tokens; `more` are fields of the request. Raises RuntimeError if they are not all given."""
        body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content}], **more}
        body |= {"max_tokens": answer, "temperature": 0, "ignore_eos": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        told = json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.address}/v1/chat/completions", told, {"Content-Type": "application/json"}
        )
        times: list[float] = []
        usage: dict[str, int] = {}
        begin, used = time.perf_counter(), None
        with (
            concurrent.futures.ThreadPoolExecutor(1) as aside,  # reading metrics must not delay the next tokens
            urllib.request.urlopen(request, timeout=3600) as events,
        ):
            for line in events:
                if not line.startswith(b"data: {"):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                usage = event.get("usage") or usage
                if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                    times.append(time.perf_counter() - begin)
                    used = used or aside.submit(self.used)
        if used is None or usage.get("completion_tokens") != answer:
            raise RuntimeError(f"an answer of {answer} tokens was asked for, and got {usage}")
        return Answer(times[0], (times[-1] - times[0]) / max(1, answer - 1), usage["prompt_tokens"], used.result())

    def used(self) -> float:
        """Returns the share of the KV cache that is in use."""
        return float(_found(USED, metrics(self.address))[1])


def metrics(address: str) -> str:
    """Returns the metrics of the server at that address."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as answer:
        return answer.read().decode()


@contextlib.contextmanager
def start(model: str, options: Sequence[str], plugins: Sequence[str]) -> Iterator[Server]:
    """Starts a server with these plugins only, and yields it once it is ready. `plugins` are vLLM's names of them;
    "apet_serving" is the benchmark's own (benchmarks/lib/serving_plugin.py)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        given = ["--served-model-name", "model", "--no-enable-prefix-caching", "--host", "127.0.0.1"]
        serve = [str(Path(sys.executable).parent / "vllm"), "serve", model, *given, "--port", str(port), *options]
        offer(Path(folder))
        settings = {"VLLM_NO_USAGE_STATS": "1", "VLLM_PLUGINS": ",".join(plugins), "PYTHONPATH": folder}
        if Path(model).exists():
            settings |= {"HF_HUB_OFFLINE": "1"}
        if not torch.cuda.is_available():
            # By default vLLM reserves a core for the server, which would be half of two.
            settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(os.cpu_count())}
            settings |= {"VLLM_CPU_KVCACHE_SPACE": "1"}  # GiB, of each of up to five servers
        log = Path(folder, "log")
        with log.open("w") as out:
            process = subprocess.Popen(serve, env=os.environ | settings, stdout=out, stderr=subprocess.STDOUT)
        try:
            address, end = f"http://127.0.0.1:{port}", time.monotonic() + STARTS_WITHIN
            while process.poll() is None and time.monotonic() < end:
                with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
                time.sleep(0.5)
            else:
                raise RuntimeError(f"vllm serve did not start: {log.read_text()[-3000:]}")
            size, blocks = _found(BLOCKS, metrics(address)).groups()
            yield Server(address, int(size) * int(blocks))
        finally:
            process.terminate()
            process.wait(60)


def offer(folder: Path) -> None:
    """Puts the benchmark's own plugin into a folder, as a package is installed: vLLM finds plugins by entry points. It
    is copied, because this folder of sources must not come before the installed package on the server's path."""
    shutil.copy(PLUGIN, folder / "apet_serving.py")
    about = folder / "apet_serving-0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: apet-serving\nVersion: 0\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\napet_serving = apet_serving:register\n")


def _found(pattern: re.Pattern[str], text: str) -> re.Match[str]:
    found = pattern.search(text)
    if found is None:
        raise RuntimeError(f"the server's metrics have no {pattern.pattern}")
    return found
