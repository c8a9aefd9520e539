"""The hooks in a whole model: time of prefill and answer against tokens kept, with the prediction from FLOPs.

    python -m benchmarks.hooks [--smoke] [--batch 1 4] [--rounds 3] [--json FILE] [--markdown]

The model is that of benchmarks/lib/llava.py. A round generates once with every setting, in turns; ratios are medians of
ratios within a round. The prefill lasts from the call of generate() to the first token, including the vision encoder.
The time of compression is measured inside these calls: "op" is the calls of the op, "hooks" all work of the hooks with
the op. "attainable" is the model's own work without hooks: the vision encoder, then projector and decoder on as many
tokens as are kept. The dtype that is faster here runs with every setting, the other only where there are goals.
--markdown writes the tables into docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import apet
import torch
import transformers
from apet.hooks.engine import Engine
from apet.model_report import Prefill, clock, count, engine_of, unpatched
from rich.console import Console
from torch import Tensor, nn

import apet_kernels
from benchmarks.lib import command, llava
from benchmarks.lib.ceilings import peak_gflops
from benchmarks.lib.compare import NOISE, THREADS, paired, rotated, spread
from benchmarks.lib.llava import PICTURE, TEXT, TOKENS, VISION
from benchmarks.lib.machine import describe
from benchmarks.lib.sheet import Sheet, document, replaced, show

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
BEGIN, END = "<!-- hooks:begin -->", "<!-- hooks:end -->"
HOOKS = [name for name in vars(Engine) if name.startswith(("before_", "after_"))]
IMAGE = 32000  # token id of the placeholder
PROMPT = 40  # tokens of a prompt besides the image's
OP_SHARE, SPEED_SHARE = 0.001, 0.85  # the goals, at the budgets of 64 tokens


@dataclass(frozen=True)
class Size:
    """Dimensions of a model, and the tokens that its answers have."""

    vision: dict[str, int]
    text: dict[str, int]
    keeps: tuple[int, ...]
    new_tokens: int


REAL = Size(VISION, TEXT, (288, 192, 128, 64), 8)
SMOKE = Size(
    {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    (288, 64),
    2,
)


@dataclass(frozen=True)
class Setting:
    """What to keep of an image's tokens: after the encoder, and after half of the decoder's layers. None: all."""

    keep: int | None
    llm_keep: int | None = None

    def __str__(self) -> str:
        return " → ".join(str(k) for k in (self.keep or TOKENS, self.llm_keep) if k)

    @property
    def mean(self) -> int:
        """Tokens that an image has on average over the decoder's layers."""
        first = self.keep or TOKENS
        return (first + (self.llm_keep or first)) // 2


@dataclass
class Row:
    """What was measured of one setting; seconds of every round."""

    dtype: str
    batch: int
    kept: str
    mean: int
    prefill: Prefill  # of one row of the batch
    predicted: float  # FLOPs without compression / with it
    prefill_seconds: list[float]
    total_seconds: list[float]
    op_seconds: list[float]
    hook_seconds: list[float]
    attainable_seconds: list[float]  # nothing where tokens are also dropped inside the decoder
    speedup: float  # of the prefill
    total_speedup: float
    op_share: float  # of the prefill without compression
    hook_share: float
    missed: list[str] | None = None

    def __post_init__(self) -> None:
        if self.mean != 64:
            return
        reached, noise = self.speedup / self.predicted, spread(self.prefill_seconds)
        self.missed = [f"op {self.op_share:.2%} of the prefill"] * (self.op_share >= OP_SHARE)
        self.missed += [f"{reached:.0%} of predicted, goal {SPEED_SHARE:.0%}"] * (reached < SPEED_SHARE)
        self.missed += [f"noise {noise:.0%}, measure again on an idle machine"] * (noise > NOISE)


def build(size: Size, dtype: torch.dtype) -> nn.Module:
    """The model, with random weights."""
    torch.manual_seed(0)
    config = llava.config(size.vision, size.text, vocabulary=32064, image=IMAGE)
    model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def inputs(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """A batch of prompts of one image and some text each."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (batch, PROMPT + TOKENS), generator=random)
    ids[:, PROMPT // 2 : PROMPT // 2 + TOKENS] = IMAGE
    side = PICTURE["image_size"]
    pixels = torch.randn(batch, 3, side, side, generator=random).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def settings(size: Size, all_of_them: bool) -> list[Setting]:
    """All tokens; the first stage alone; and both, with a third of what the first keeps, as the paper has it. Or only
    those that have goals."""
    both = [Setting(k, k // 3) for k in (288, 192, 96) if size is REAL or k == 96]
    chosen = [*(Setting(k) for k in size.keeps), *both]
    return [Setting(None), *(setting for setting in chosen if all_of_them or setting.mean == 64)]


def operations(model: nn.Module, chosen: list[Setting], dtype: torch.dtype) -> dict[Setting, Prefill]:
    """What a prefill of one row takes, by setting; a batch takes so much for each of its rows."""
    given, counts = inputs(1, dtype), {}
    for setting in chosen:
        with running(model, setting):
            counts[setting] = count(engine_of(model), given)
    return counts


def measure(
    model: nn.Module, batch: int, counts: dict[Setting, Prefill], size: Size, rounds: int, dtype: torch.dtype
) -> list[Row]:
    """All rounds of one batch size."""
    given, chosen = inputs(batch, dtype), list(counts)
    seconds: dict[Setting, list[tuple[float, ...]]] = {setting: [] for setting in chosen}
    with spent(apet_kernels, ["compress_packed"]) as op, spent(Engine, HOOKS) as hooks:
        with running(model, chosen[0]):
            clock(model, given, 1)  # to warm up
        for turn in range(rounds):
            for setting in rotated(chosen, turn):
                with running(model, setting):
                    begin = time.perf_counter()
                    prefill, total = clock(model, given, size.new_tokens)
                inside = [sum(s for at, s in some if begin <= at < begin + prefill) for some in (op, hooks)]
                least = attainable(model, given, setting.keep or TOKENS) if setting.llm_keep is None else math.nan
                seconds[setting].append((prefill, total, *inside, least))
    rows, base = [], [list(column) for column in zip(*seconds[chosen[0]], strict=True)]
    for setting in chosen:
        prefill, total, op_seconds, hook_seconds, least = (
            list(column) for column in zip(*seconds[setting], strict=True)
        )
        rows.append(
            Row(
                _name(dtype),
                batch,
                str(setting),
                setting.mean,
                counts[setting],
                counts[chosen[0]].flops / counts[setting].flops,
                *(prefill, total, op_seconds, hook_seconds),
                attainable_seconds=least if setting.llm_keep is None else [],
                speedup=paired(base[0], prefill),
                total_speedup=paired(base[1], total),
                op_share=paired(op_seconds, base[0]),
                hook_share=paired(hook_seconds, base[0]),
            )
        )
    return rows


def attainable(model: nn.Module, given: dict[str, Tensor], keep: int) -> float:
    """Seconds that the parts of an unpatched model take for a prefill of `keep` tokens an image, one after another."""
    rows, hidden = len(given["input_ids"]), model.config.text_config.hidden_size
    text = torch.zeros(rows, PROMPT, hidden, dtype=given["pixel_values"].dtype)
    begin = time.perf_counter()
    features = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2]
    image = model.model.multi_modal_projector(features[:, 1 : 1 + keep])
    out = model.model.language_model(inputs_embeds=torch.cat([image, text], 1), use_cache=True)
    model.lm_head(out.last_hidden_state[:, -1:])
    return time.perf_counter() - begin


@contextlib.contextmanager
def running(model: nn.Module, setting: Setting) -> Iterator[None]:
    """The model with one setting, for the length of a with block."""
    llm_layer = None if setting.llm_keep is None else model.config.text_config.num_hidden_layers // 2
    everything = setting == Setting(None)
    keep = 64 if everything else setting.keep
    with contextlib.ExitStack() as stack:
        stack.enter_context(apet.patched(model, keep, llm_layer=llm_layer, llm_keep=setting.llm_keep))
        if everything:
            stack.enter_context(unpatched(engine_of(model)))
        yield


@contextlib.contextmanager
def spent(owner: Any, names: list[str]) -> Iterator[list[tuple[float, float]]]:
    """When each call of these functions or methods began, and how long it took, as they happen."""
    calls: list[tuple[float, float]] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            calls.append((begin, time.perf_counter() - begin))
            return result

        return run

    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name))))
        yield calls


def sheets(rows: list[Row], size: Size) -> list[Sheet]:
    """A table for each dtype and batch size."""
    answer = f"{size.new_tokens} tokens ms"
    columns = [
        *("kept", "GFLOP a row", "prefill ms", "speed-up", "predicted", "of predicted", "attainable ms", answer),
        "speed-up of all",
        *("op ms", "op share", "hooks ms", "hooks share", "noise", "goals"),
    ]
    note = (
        "kept: tokens of an image after the encoder → after half of the decoder's layers. Times are medians. "
        "predicted: FLOPs of the uncompressed prefill / FLOPs with compression, the vision encoder in both. "
        "attainable: the same number of tokens through the model's parts, without hooks. op, hooks: what the "
        "compression takes inside the prefill; share: of the uncompressed prefill. noise: interquartile range over "
        f"median. goals, for 64 tokens: op below {OP_SHARE:.1%}, speed-up {SPEED_SHARE:.0%} of predicted."
    )
    return [
        Sheet(f"{dtype}, batch {batch}", note, columns, [_line(row) for row in some], ("kept", "goals"))
        for (dtype, batch), some in itertools.groupby(rows, lambda row: (row.dtype, row.batch))
    ]


def _line(row: Row) -> list[str]:
    prefill, total, op, hooks = (
        1e3 * statistics.median(some)
        for some in (row.prefill_seconds, row.total_seconds, row.op_seconds, row.hook_seconds)
    )
    compressed, least = bool(op), row.attainable_seconds
    return [
        *(row.kept, f"{row.prefill.flops / 1e9:.4g}", f"{prefill:.0f}"),
        *(f"{row.speedup:.2f}", f"{row.predicted:.2f}", f"{row.speedup / row.predicted:.0%}"),
        f"{1e3 * statistics.median(least):.0f}" if least else "-",
        *(f"{total:.0f}", f"{row.total_speedup:.2f}"),
        *((f"{op:.2f}", f"{row.op_share:.3%}", f"{hooks:.1f}", f"{row.hook_share:.2%}") if compressed else "-" * 4),
        f"{spread(row.prefill_seconds):.0%}",
        "none" if row.missed is None else "; ".join(row.missed) or "met",
    ]


def main() -> None:
    """Measures, prints, writes."""
    parser = command.parser("hooks", __doc__)
    parser.add_argument("--smoke", action="store_true", help="a tiny model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4], help="batch sizes (1 4)")
    parser.add_argument("--rounds", type=int, default=3, help="answers with each setting (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    parser.add_argument("--markdown", action="store_true", help=f"write the tables into docs/{PAGE.name}")
    options = parser.parse_args()
    if options.markdown and options.smoke:
        parser.error("--markdown is of the real model")
    torch.set_num_threads(THREADS)
    transformers.logging.set_verbosity_error()
    size, console = SMOKE if options.smoke else REAL, Console(width=None if sys.stdout.isatty() else 220)
    peaks = {dtype: peak_gflops(dtype) for dtype in (torch.float32, torch.bfloat16)}
    dtypes = sorted(peaks, key=peaks.__getitem__, reverse=True)
    began = time.perf_counter()
    head = {**describe(), "torch.mm 2048^3": ", ".join(f"{_name(d)} {rate:.0f} GFLOP/s" for d, rate in peaks.items())}
    with torch.no_grad():
        rows: list[Row] = []
        for dtype in dtypes:
            model = build(size, dtype)
            with console.status("counting operations"):
                counts = operations(model, settings(size, dtype is dtypes[0]), dtype)
            for batch in options.batch:
                with console.status(f"{_name(dtype)}, batch {batch}"):
                    rows += measure(model, batch, counts, size, options.rounds, dtype)
        parameters = sum(p.numel() for p in model.parameters()) / 1e9
        head["model"] = (
            f"LLaVA-shaped, {parameters:.3g}B random parameters, sdpa; "
            f"{PROMPT} text tokens and {TOKENS} of an image in a row; transformers {transformers.__version__}"
        )
    if options.json:
        report = {"head": head, "rows": [dataclasses.asdict(row) for row in rows]}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    show(console, head, sheets(rows, size))
    console.print(f"{time.perf_counter() - began:.0f} s")
    if options.markdown:
        PAGE.write_text(replaced(PAGE.read_text(), BEGIN, END, document(head, sheets(rows, size))))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
