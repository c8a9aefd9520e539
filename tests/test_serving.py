"""benchmarks/serving.py against a server that answers at once: what is asked, what is timed, what is reported."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots, report, serving
from benchmarks.lib import server, suite
from benchmarks.lib.serving_plugin import RANDOM

TOKENS = 576
PAUSE = 0.002  # seconds between two tokens of an answer
METRICS = """vllm:kv_cache_usage_perc{engine="0",model_name="model"} 0.125
vllm:cache_config_info{block_size="16",cache_dtype="auto",engine="0",num_gpu_blocks="1000"} 1.0
"""


class Answering(BaseHTTPRequestHandler):
    """Answers as vLLM does, with prompts of as many tokens as it would make; the path begins with the server's name."""

    asked: list[tuple[str, dict[str, Any]]]
    short = 0  # tokens that answers lack

    def do_GET(self) -> None:
        self._send(METRICS.encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name = self.path.split("/")[1]
        self.asked.append((name, body))
        share = float(Fraction(name.replace("-", "/"))) if name[0].isdigit() else 1.0
        share = body.get("mm_processor_kwargs", {}).get("apet_keep", share)
        length = len(body["messages"][0]["content"][1]["text"]) + round(TOKENS * share)
        tokens = body["max_tokens"] - self.short
        events = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        events += [{"choices": [{"delta": {"content": "!"}}]}] * tokens
        events += [{"choices": [], "usage": {"completion_tokens": tokens, "prompt_tokens": length}}]
        self.send_response(200)
        self.end_headers()
        for event in events:
            time.sleep(PAUSE)
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def _send(self, data: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Answering.asked = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Answering) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


@pytest.fixture
def fleet(address: str, monkeypatch: pytest.MonkeyPatch) -> serving.Fleet:
    """Returns servers that are paths of the one that answers at once: EVS has its share in its name."""

    class Ready(serving.Fleet):
        def servers(self, media: str) -> dict[str, server.Server]:
            names = {way.server: str(way.budget).replace("/", "-") for way in self.setup.ways(media)}
            return {
                name: server.Server(f"{address}/{share if name.startswith('evs') else name}", 16000)
                for name, share in names.items()
            }

    monkeypatch.setattr(serving.Fleet, "describe", lambda self: {"image model": "none"})
    return Ready(serving.Setup(answer=4, long=100), smoke=True)


def test_an_answer(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its times, the tokens of its prompt, and the cache in use; an answer that is cut short raises."""
    one = server.Server(f"{address}/plain", 16000)
    content = [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text", "text": "What?"}]
    answer = one.ask(content, 8, allowed_token_ids=[4])
    assert (answer.prompt, answer.used) == (TOKENS + 5, 0.125)
    assert answer.first >= 2 * PAUSE
    assert answer.each > PAUSE / 2
    ((_, body),) = Answering.asked
    assert (body["max_tokens"], body["ignore_eos"], body["allowed_token_ids"]) == (8, True, [4])
    monkeypatch.setattr(Answering, "short", 1)
    with pytest.raises(RuntimeError, match="an answer of 8 tokens was asked for, and got"):
        one.ask(content, 8)


def test_metrics_of_another_version_raise() -> None:
    with pytest.raises(RuntimeError, match="the server's metrics have no"):
        server._found(server.USED, "vllm:another 1")


def test_requests_of_every_way(fleet: serving.Fleet) -> None:
    """Each method asks its server, with its options, and its row has times, lengths and bytes."""
    row = serving.compare(serving.Load("video", "long", 2), fleet).run(1)
    ways = fleet.setup.ways("video")
    assert next(iter(row.checked)) == "plain"
    assert set(row.checked) == {way.name for way in ways}
    kwargs = {(name, json.dumps(body.get("mm_processor_kwargs"))) for name, body in Answering.asked}
    assert kwargs == {
        *(("plain", "null"), ("1-2", "null"), ("1-4", "null"), ("1-9", "null")),
        *(("apet", json.dumps({"apet_keep": float(budget)})) for budget in serving.BUDGETS),
        *(("apet", json.dumps({"apet_keep": float(b), "apet_basis": RANDOM})) for b in serving.BUDGETS[1:]),
    }
    assert {body["messages"][0]["content"][0]["type"] for _, body in Answering.asked} == {"video_url"}
    urls = [body["messages"][0]["content"][0]["video_url"]["url"] for _, body in Answering.asked]
    assert len(set(urls)) == len(urls) == len(ways) * (1 + 3)
    assert {len(url.split(",")) for url in urls} == {1 + 18}
    assert (row.counts["plain prompt"], row.counts["evs 1/9 prompt"]) == (TOKENS + 100, 64 + 100)
    text = serving.qwen.SMOKE.text  # a token's key and value in every layer
    token = 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * 32 * 2
    assert row.counts["apet 1/4 KV MiB"] == pytest.approx(0.125 * 16000 * token / 2**20)
    assert row.ms["apet 1/4 token"] == pytest.approx(1e3 * PAUSE, rel=5)


def test_wrong_lengths_are_found() -> None:
    ways = serving.Setup().ways("image")
    right = {way.name: 100 + round(TOKENS * way.budget) for way in ways}
    serving.check(ways, right, TOKENS)
    for wrong, said in (
        ({"apet all": 600}, "apet all: other prompts"),
        ({"random 1/4": 300}, "random 1/4: 300 tokens, not 244"),
        ({"apet 1/9": 200, "random 1/9": 200}, "apet 1/9: 200 tokens, not 164"),
    ):
        with pytest.raises(AssertionError, match=said):
            serving.check(ways, right | wrong, TOKENS)
    serving.check(ways, right | {"apet 1/9": 200, "random 1/9": 200}, None)


def test_the_report(fleet: serving.Fleet, tmp_path: Path) -> None:
    """A line for each budget of each load, the cases that do not pay, the conclusions and the picture."""
    rows = [serving.compare(serving.Load(media, "short", 1), fleet).run(1) for media in serving.MEDIA]
    for row in rows:
        for name in row.faster:
            row.faster[name] = {"apet 1/4": 0.5, "apet 1/4 first token": 0.25, "evs 1/4": 0.8}.get(name, 1.0)
    results = suite.Results("serving", {}, {}, rows)
    image, video = serving.sheets(results)
    assert [line[2] for line in image.lines] == ["all, plain", "all", "1/2", "1/4", "1/9"]
    assert all(len(line) == len(sheet.columns) for sheet in (image, video) for line in sheet.lines)
    quarter = dict(zip(video.columns, video.lines[3], strict=True))
    assert (quarter["faster"], quarter["sooner"], quarter["evs faster"]) == ("2.00", "4.00", "1.25")
    assert "1/2 at image, short text, concurrency 1 (1.00 times" in image.note
    assert "1/4" not in image.note.partition("Does not pay")[2]
    said = report.serving_conclusions(results)
    assert len(said) == 6
    assert "video, 1/4 kept: 2.00 to 2.00 times the requests/s of all tokens, first tokens 4.00 to 4.00" in said[4]
    assert "1.60 to 1.60 times the requests/s with EVS" in said[4]
    plots.draw_serving(results, tmp_path / "serving.png")
    assert (tmp_path / "serving.png").read_bytes()[:4] == b"\x89PNG"


def test_the_command(fleet: serving.Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The options choose cases and sizes; with no time left, what is left out is said in the file."""
    made: list[serving.Setup] = []

    def find(setup: serving.Setup, smoke: bool) -> serving.Fleet:
        made.append(setup)
        fleet.setup = setup
        return fleet

    monkeypatch.setattr(serving, "find", find)
    file = tmp_path / "serving.json"
    words = ["--budgets", "1", "1/4", "--media", "image", "--texts", "short", "--concurrencies", "1", "4"]
    words += ["--layers", "2", "--answer", "3", "--rounds", "1", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", *words])
    serving.main()
    found = suite.load(file)
    assert [row.case["concurrency"] for row in found.rows] == [1, 4]
    assert set(found.rows[0].checked) == {
        "plain",
        "apet all",
        "apet 1/4",
        "random 1/4",
    }
    assert made[0].size("image", False).text["num_hidden_layers"] == 2
    assert made[0].size("image", False).vision == serving.llava.REAL.vision
    monkeypatch.setattr(sys, "argv", ["benchmarks/serving.py", *words, "--minutes", "0"])
    serving.main()
    found = suite.load(file)
    assert (found.rows, found.head["left out"]) == ([], "2 of 2 cases, for lack of time")
