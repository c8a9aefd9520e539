"""`vllm serve` with the plugin: requests a second and time to the first token, with and without compression.

    .build/vllm/bin/python -m benchmarks.serving [--smoke] [--rounds 2] [--json FILE] [--markdown]

`make test-vllm` makes that environment. One server (benchmarks/lib/llava.py) answers chat requests of one photo and
some text, budgets per request. Every request has a different picture, so that no cache helps, and prefix caching is
off. Each of the concurrent clients sends its next request when the last is answered. Budgets alternate, and ratios are
medians of ratios within a round. Times include everything: HTTP, preprocessing, vision encoder, compression, language
model. --markdown writes the table into docs/engines.md.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
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

import skimage
from PIL import Image
from rich.console import Console

from benchmarks.lib import command, llava
from benchmarks.lib.compare import paired, rotated
from benchmarks.lib.llava import TEXT, TOKENS, VISION
from benchmarks.lib.machine import describe
from benchmarks.lib.sheet import Sheet, document, replaced, show

PAGE = Path(__file__).parents[1] / "docs" / "engines.md"
BEGIN, END = "<!-- serving:begin -->", "<!-- serving:end -->"
QUESTION = "What is to be seen in this picture?"


@dataclass(frozen=True)
class Size:
    """A model's dimensions, the budgets and concurrencies, requests of a client in a round, and tokens of an answer."""

    vision: dict[str, int]
    text: dict[str, int]
    keeps: tuple[int, ...]  # the first is everything
    concurrencies: tuple[int, ...]
    answer: int


REAL = Size(VISION, TEXT, (TOKENS, 512, 64), (1, 4, 16), 16)
SMOKE = dataclasses.replace(
    REAL,
    vision={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2},
    text={
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    keeps=(TOKENS, 64),
    answer=4,
)


@dataclass
class Row:
    """One budget at one concurrency: requests a second of each round, seconds to the first token of each request."""

    concurrency: int
    keep: int
    rates: list[float]
    first: list[list[float]]  # of each round
    faster: float = 1.0  # than all tokens, in requests a second
    sooner: float = 1.0  # in time to the first token


@contextlib.contextmanager
def server(size: Size) -> Iterator[str]:
    """Its address, once it is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        llava.save(Path(folder), size.vision, size.text)
        options = ["--load-format", "dummy", "--dtype", "bfloat16", "--enforce-eager", "--no-enable-prefix-caching"]
        options += ["--max-model-len", "1024", "--max-num-seqs", "16", "--served-model-name", "model"]
        options += ["--mm-processor-kwargs", json.dumps({"apet_keep": 1.0}), "--trust-request-mm-kwargs"]
        options += ["--host", "127.0.0.1", "--port", str(port)]
        settings = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "4"}
        # vLLM would keep a core for the server alone: of two that is half.
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
    """Parts of a photo, no two alike, as data URLs."""
    photo = Image.open(Path(skimage.__path__[0], "data", "astronaut.png"))
    for number in itertools.count():
        top, left = divmod(number, 172)
        file = io.BytesIO()
        photo.crop((left, top, left + 340, top + 340)).save(file, "JPEG", quality=90)
        yield "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def ask(address: str, url: str, keep: int, answer: int) -> tuple[float, int]:
    """Seconds to the first token, and tokens of the prompt. Raises RuntimeError where the answer is not whole."""
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    body: dict[str, Any] = {"model": "model", "messages": [{"role": "user", "content": content}]}
    body |= {"max_tokens": answer, "temperature": 0, "ignore_eos": True, "allowed_token_ids": list(llava.LETTERS)}
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
    if first is None or usage.get("completion_tokens") != answer:
        raise RuntimeError(f"an answer of {answer} tokens was asked for, and got {usage}")
    return first, usage["prompt_tokens"]


def run(
    address: str, urls: Iterator[str], keep: int, concurrency: int, requests: int, answer: int
) -> tuple[float, list[float], set[int]]:
    """Requests a second, seconds to each first token, and lengths of the prompts."""
    given = list(itertools.islice(urls, requests))
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(concurrency) as clients:
        told = list(clients.map(lambda url: ask(address, url, keep, answer), given))
    return requests / (time.perf_counter() - begin), [first for first, _ in told], {length for _, length in told}


def measure(size: Size, rounds: int, console: Console) -> list[Row]:
    """All budgets at all concurrencies; the lengths of prompts are checked before anything is timed."""
    urls, rows = pictures(), []
    with console.status("the server starts"), contextlib.ExitStack() as stack:
        address = stack.enter_context(server(size))
        lengths = {keep: run(address, urls, keep, 1, 1, size.answer)[2] for keep in size.keeps}
        (full,) = lengths[TOKENS]
        for keep, found in lengths.items():
            if found != {full - TOKENS + keep}:
                raise RuntimeError(f"apet_keep={keep}: prompts have {found} tokens, not {full - TOKENS + keep}")
        for concurrency in size.concurrencies:
            console.print(f"concurrency {concurrency} ...")
            requests = max(3, concurrency)
            some = [Row(concurrency, keep, [], []) for keep in size.keeps]
            for turn in range(rounds):
                for row in rotated(some, turn):
                    rate, first, _ = run(address, urls, row.keep, concurrency, requests, size.answer)
                    row.rates.append(rate)
                    row.first.append(first)
            for row in some:
                row.faster = paired(row.rates, some[0].rates)
                medians = ([statistics.median(f) for f in r.first] for r in (some[0], row))
                row.sooner = paired(*medians)
            rows += some
    return rows


def sheet(rows: list[Row]) -> Sheet:
    """The table, and below its title where compression does not pay."""
    lines = [
        [
            *(str(row.concurrency), str(row.keep)),
            *(f"{statistics.median(row.rates):.3f}", f"{row.faster:.2f}"),
            f"{statistics.median(itertools.chain(*row.first)):.2f}",
            *(f"{max(itertools.chain(*row.first)):.2f}", f"{row.sooner:.2f}"),
        ]
        for row in rows
    ]
    losing = [
        f"{row.keep} at concurrency {row.concurrency} ({row.faster:.2f} faster, {row.sooner:.2f} sooner)"
        for row in rows
        if row.keep < TOKENS and min(row.faster, row.sooner) <= 1.02
    ]
    note = (
        "kept: tokens of an image, of 576. requests/s: answered, everything included, median of the rounds. first "
        "token: seconds from sending a request, median and slowest. faster, sooner: against all tokens. Does not pay "
        f"(a gain of 2 % or less, or a loss): {'; '.join(losing) or 'nothing measured here'}."
    )
    columns = ["concurrency", "kept", "requests/s", "faster", "first token s", "slowest s", "sooner"]
    return Sheet("Serving LLaVA with vLLM", note, columns, lines)


def main() -> None:
    """Measures, prints, writes."""
    parser = command.parser("serving", __doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--rounds", type=int, default=2, help="times that every setting has its turn (2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", action="store_true", help=f"write the table into docs/{PAGE.name}")
    options = parser.parse_args()
    if options.markdown and options.smoke:
        parser.error("--markdown is of the real model")
    size, console = SMOKE if options.smoke else REAL, Console(width=None if sys.stdout.isatty() else 160)
    began, head = time.perf_counter(), describe()
    rows = measure(size, options.rounds, console)
    text = size.text
    head["model"] = (
        f"LLaVA shape, random bfloat16 weights: CLIP-L/14-336, decoder of {text['num_hidden_layers']} layers of "
        f"{text['hidden_size']}; answers of {size.answer} tokens; vLLM {version('vllm-cpu')} on the CPU"
    )
    if options.json:
        report = {"head": head, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(console, head, [sheet(rows)])
    console.print(f"{time.perf_counter() - began:.0f} s")
    if options.markdown:
        PAGE.write_text(replaced(PAGE.read_text(), BEGIN, END, document(head, [sheet(rows)])))


if __name__ == "__main__":
    main()
