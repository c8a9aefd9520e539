"""Measures what compression saves a model on given inputs: tokens, operations, cache and time, with and without it."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import Cache
from transformers.generation.streamers import BaseStreamer

import apet_kernels  # noqa: F401, registers the op
from apet.calls import Recorder
from apet.hooks import Options, caches
from apet.hooks.engine import Engine
from apet.hooks.patching import drop_compiled
from apet.hooks.results import ENGINE
from apet.hooks.target import plain

GREEDY = {"do_sample": False, "num_beams": 1, "use_cache": True, "temperature": None, "top_p": None, "top_k": None}


@dataclass(frozen=True)
class Prefill:
    """The size and cost of one prefill."""

    lengths: list[int]  # of the sequence in each decoder layer, padding included
    vision_flops: int  # vision encoder and projector
    language_flops: int  # decoder and its head
    compression_flops: int  # the op
    cache_bytes: int  # keys and values, and recurrent states

    @property
    def flops(self) -> int:
        """The sum of all operations."""
        return self.vision_flops + self.language_flops + self.compression_flops


@dataclass(frozen=True)
class Report:
    """Measurements of the same inputs with and without compression; seconds are medians. It prints as a table."""

    model: str
    options: Options
    batch: int
    visual_tokens: int
    new_tokens: int
    without: Prefill
    compressed: Prefill
    prefill_seconds: tuple[float, float]  # without, compressed
    total_seconds: tuple[float, float]

    def __rich__(self) -> Group:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("")
        for heading in ("without", "compressed", "ratio"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, before, after, unit in self.rows():
            ratio = f"{before / after:.2f}" if before and after else ""
            table.add_row(name, *(_amount(value, unit) if value else "-" for value in (before, after)), ratio)
        rows = f"{self.batch} rows" if self.batch > 1 else "1 row"
        title = f"{self.model}: {self.visual_tokens} visual tokens in {rows}\n{self.options}"
        return Group(Text(title, style="bold"), table)

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as text:
            console.print(self)
        return text.get()

    def rows(self) -> Iterator[tuple[str, float, float, str]]:
        """Yields the rows of the table: name, without, compressed, unit ("" for counts, "FLOP", "B" or "s")."""
        before, after = self.without, self.compressed
        first = 1
        for (long, short), run in itertools.groupby(zip(before.lengths, after.lengths, strict=True)):
            last = first + len(list(run)) - 1
            yield f"tokens of a row, layers {first} to {last}", long, short, ""
            first = last + 1
        yield "prefill", before.flops, after.flops, "FLOP"
        yield "  vision encoder and projector", before.vision_flops, after.vision_flops, "FLOP"
        yield "  language model", before.language_flops, after.language_flops, "FLOP"
        yield "  compression", before.compression_flops, after.compression_flops, "FLOP"
        yield "key-value cache after it", before.cache_bytes, after.cache_bytes, "B"
        yield "time to the first token", *self.prefill_seconds, "s"
        yield f"time to {self.new_tokens} tokens", *self.total_seconds, "s"


def report(model: nn.Module, inputs: Mapping[str, Any], *, max_new_tokens: int = 32, rounds: int = 3) -> Report:
    """Measures what compression saves a patched model on these inputs, by generating with and without it.

    Args:
        model: a model that `apet.patch` has patched; it stays patched.
        inputs: arguments of `model.generate(**inputs)`, with images or videos.
        max_new_tokens: length of both answers, generated greedily, for the total time.
        rounds: number of timings of each, alternately; the report holds medians.

    FLOPs are counted in one prefill each, by torch's counter: 2 m n k for every matrix product and convolution; 4 B H
    L^2 d for attention in every layer (scores and weighted sum of L tokens, the masked half included; d per head); and
    `RecordedCall.flops` for the compression. So a decoder layer with P weights in matrices takes 2 B L P + 4 B H L^2 d.
    Norms, activations and other work that grows only linearly with L are not counted. In that prefill other attention
    implementations are replaced by sdpa, which the counter knows. The cache is the one that generate() makes; a static
    cache has the same size with and without compression.

    Returns:
        The measurements with and without compression; they print as a table.

    Raises:
        ValueError: the model is not patched or does not generate, or the inputs hold nothing to compress or a cache.

    Example:
        >>> apet.patch(model, keep=64)
        >>> print(apet.report(model, inputs))
    """
    engine = generating(model, inputs)
    if not engine.adapter.modalities(inputs):
        raise ValueError(f"inputs contain no image or video, only {', '.join(inputs)}: there is nothing to compress")
    for name, value in (("max_new_tokens", max_new_tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}={value} is less than 1")
    with unpatched(engine):
        without = count_prefill(engine, inputs)
    compressed = count_prefill(engine, inputs)
    seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for _ in range(rounds):
        with unpatched(engine):
            seconds[False].append(clock(model, inputs, max_new_tokens))
        seconds[True].append(clock(model, inputs, max_new_tokens))
    prefill, total = (
        (statistics.median(t[which] for t in seconds[False]), statistics.median(t[which] for t in seconds[True]))
        for which in (0, 1)
    )
    trace = engine.trace
    assert trace is not None  # the inputs have images or videos
    return Report(
        type(engine.model).__name__,
        engine.options,
        next(len(inputs[name]) for name in ("input_ids", "inputs", "inputs_embeds") if inputs.get(name) is not None),
        sum(tokens for _, _, tokens in trace.visuals),
        max_new_tokens,
        without,
        compressed,
        prefill,
        total,
    )


def engine_of(model: nn.Module) -> Engine:
    """Returns the engine of a patched model. Raises ValueError if the model is not patched."""
    engine: Engine | None = vars(plain(model)).get(ENGINE)
    if engine is None:
        raise ValueError(f"this {type(model).__name__} is not patched: call apet.patch(model, keep=...) first")
    return engine


def generating(model: nn.Module, inputs: Mapping[str, Any]) -> Engine:
    """Returns the engine of a patched model that will generate from these inputs. Raises ValueError if the model is not
    patched or does not generate, or for a cache, which would be changed."""
    engine = engine_of(model)
    if not hasattr(engine.model, "generate"):
        raise ValueError(f"{type(engine.model).__name__} has no generate(), by which this is measured")
    for name, value in inputs.items():
        if isinstance(value, Cache):
            raise ValueError(f"inputs contain {name}, a cache, which this would change; leave it out")
    return engine


@contextmanager
def unpatched(engine: Engine) -> Iterator[None]:
    """Removes the patch for the length of a with block."""
    engine.remove()
    drop_compiled()
    try:
        yield
    finally:
        engine.install()
        drop_compiled()


def count_prefill(engine: Engine, inputs: Mapping[str, Any]) -> Prefill:
    """Counts FLOPs, lengths and cache size of one prefill of the model as it is, patched or not."""
    sdpa = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}
    counter = FlopCounterMode(display=False, custom_mapping=sdpa)
    at_decoder: list[int] = []
    seen = engine.language_model.register_forward_pre_hook(lambda *_: at_decoder.append(counter.get_total_flops()))
    with seen, _torch_attention(engine.model), Recorder() as recorder, counter:
        out = engine.model.generate(**inputs, **GREEDY, max_new_tokens=1, return_dict_in_generate=True)
    cache = next(value for value in out.values() if isinstance(value, Cache))
    return Prefill(
        lengths=caches.lengths(cache, engine.options.llm_layer),
        vision_flops=at_decoder[0],
        language_flops=counter.get_total_flops() - at_decoder[0],
        compression_flops=sum(call.flops for call in recorder.calls),
        cache_bytes=sum(_bytes(layer) for layer in cache.layers),
    )


def _bytes(layer: Any) -> int:
    """Returns the bytes of keys and values in the cache of a layer, and of its recurrent states."""
    held = [getattr(layer, name, None) for name in ("keys", "values")]
    for name in ("conv_states", "recurrent_states"):
        held += (getattr(layer, name, None) or {}).values()
    return sum(x.nbytes for x in held if isinstance(x, torch.Tensor))


def clock(model: nn.Module, inputs: Mapping[str, Any], new_tokens: int) -> tuple[float, float]:
    """Returns the seconds from the call of generate() to the first token, and to the last of `new_tokens`."""
    streamer = Clock()
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    begin = time.perf_counter()
    model.generate(**inputs, **GREEDY, max_new_tokens=new_tokens, min_new_tokens=new_tokens, streamer=streamer)
    return streamer.times[1] - begin, streamer.times[-1] - begin


class Clock(BaseStreamer):  # type: ignore[misc]  # the checker does not read transformers
    """Records the time at which the prompt and each token have arrived on the CPU."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Counts FLOPs of attention for CPUs, which torch's counter lacks; shapes [B, H, L, d], [B, .., S, d], [B, .., S,
    d2]."""
    batch, heads, length, d = query
    flops: int = 2 * batch * heads * length * key[2] * (d + value[3])
    return flops


@contextmanager
def _torch_attention(model: nn.Module) -> Iterator[None]:
    """Switches modules whose attention is not torch's own to sdpa, for the length of a with block."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        for config, name in before:
            if name not in ("eager", "sdpa"):
                config._attn_implementation = "sdpa"
        yield
    finally:
        for config, name in before:
            config._attn_implementation = name


def _amount(value: float, unit: str) -> str:
    """Formats a value with a unit prefix: 1.3e12, "FLOP" -> '1.30 TFLOP'."""
    if not unit:
        return f"{value:g}"
    scales = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6}
    prefix = next((p for p, scale in scales.items() if value >= scale), "u")
    return f"{f'{value / scales[prefix]:#.3g}'.rstrip('.')} {prefix}{unit}"
