"""The hooks in a whole model: time of prefill and answer against tokens kept, with the prediction from FLOPs.

python -m benchmarks.hooks     (options: benchmarks/lib/suite.py)

The model is that of benchmarks/lib/llava.py. A call generates an answer with one setting. The prefill lasts from the
call of generate() to the first token, including the vision encoder. The time of compression is measured inside these
calls: "op" is the time of the op, "hooks" that of all work of the hooks, the op included. "attainable" is the model's
own work without hooks: the vision encoder, then projector and decoder on as many tokens as are kept. The faster dtype
runs with every setting, the other only with the settings that have goals.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import apet
import torch
import transformers
from apet.hooks.engine import Engine
from apet.model_report import Prefill, clock, count_prefill, engine_of, unpatched
from torch import Tensor, nn

import apet_kernels
from benchmarks.lib import llava
from benchmarks.lib.ceilings import peak_gflops
from benchmarks.lib.compare import NOISE, Comparison, Row, Timed
from benchmarks.lib.device import Device
from benchmarks.lib.llava import PICTURE, REAL, SMOKE, TOKENS, Size
from benchmarks.lib.sheet import Sheet
from benchmarks.lib.suite import Results, Suite

HOOKS = [name for name in vars(Engine) if name.startswith(("before_", "after_"))]
IMAGE = 32000  # token id of the placeholder
PROMPT = 40  # tokens of a prompt besides the image's
OP_SHARE, SPEED_SHARE = 0.001, 0.85  # the goals, at the budgets of 64 tokens
KEEPS, NEW_TOKENS = (288, 192, 128, 64), 8


@dataclass(frozen=True)
class Setting:
    """The tokens to keep of an image: after the encoder, and after half of the decoder's layers. None: all."""

    keep: int | None
    llm_keep: int | None = None

    def __str__(self) -> str:
        return " → ".join(str(k) for k in (self.keep or TOKENS, self.llm_keep) if k)

    @property
    def name(self) -> str:
        """The name of the setting in a row: "uncompressed", or "apet 64"."""
        return "uncompressed" if self.keep is None else f"apet {self}"

    @property
    def mean(self) -> int:
        """The tokens that an image has on average over the decoder's layers."""
        first = self.keep or TOKENS
        return (first + (self.llm_keep or first)) // 2


@dataclass(frozen=True)
class Batch:
    """A model in one dtype, called with a number of prompts of one image and some text each."""

    batch: int
    dtype: torch.dtype
    size: Size
    everything: bool  # False: only the settings that have goals

    def fields(self) -> dict[str, Any]:
        """Returns the fields that JSON holds."""
        return {"batch": self.batch, "dtype": name_of(self.dtype)}

    def __str__(self) -> str:
        return f"batch {self.batch} {name_of(self.dtype)}"

    def settings(self) -> list[Setting]:
        """Returns the settings: all tokens; the first stage alone; and both, the second with a third of the first, as
        in the paper."""
        keeps, both = ((288, 64), (96,)) if self.size is SMOKE else (KEEPS, (288, 192, 96))
        chosen = [*(Setting(k) for k in keeps), *(Setting(k, k // 3) for k in both)]
        return [Setting(None), *(setting for setting in chosen if self.everything or setting.mean == 64)]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases(smoke: bool) -> list[Batch]:
    """Returns both dtypes, the one that is faster on this machine first."""
    dtypes = sorted((torch.float32, torch.bfloat16), key=peak_gflops, reverse=True)
    size, batches = (SMOKE, (1,)) if smoke else (REAL, (1, 4))
    return [Batch(batch, dtype, size, dtype is dtypes[0]) for dtype in dtypes for batch in batches]


@functools.lru_cache(maxsize=1)
def build(size: Size, dtype: torch.dtype) -> nn.Module:
    """Builds the model, with random weights."""
    torch.manual_seed(0)
    config = llava.config(size, vocabulary=32064, image=IMAGE)
    model = transformers.LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def inputs(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns a batch of prompts of one image and some text each."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (batch, PROMPT + TOKENS), generator=random)
    ids[:, PROMPT // 2 : PROMPT // 2 + TOKENS] = IMAGE
    side = PICTURE["image_size"]
    pixels = torch.randn(batch, 3, side, side, generator=random).to(dtype)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def compare(case: Batch, device: Device) -> Comparison:
    """Counts the operations of a prefill of one row with every setting, and checks the lengths of its layers."""
    transformers.logging.set_verbosity_error()
    model, chosen = build(case.size, case.dtype), case.settings()
    counts: dict[str, float] = {"answer": NEW_TOKENS}
    calls: dict[str, Callable[[dict[str, Tensor]], object]] = {}
    for setting in chosen:
        with torch.no_grad(), running(model, setting):
            prefill = count_prefill(engine_of(model), inputs(1, case.dtype))
        check(setting, prefill)
        counts[str(setting)] = prefill.flops / 1e9
        calls[setting.name] = functools.partial(answer, model, setting)
        if setting.llm_keep is None:
            calls[f"attainable {setting}"] = functools.partial(attainable, model, setting.keep or TOKENS)
    shares = {setting.name: 1.0 for setting in chosen[1:]}
    ring = [inputs(case.batch, case.dtype)]
    return Comparison(device, case.fields(), calls, ring, shares, base="uncompressed", sums={}, counts=counts)


def check(setting: Setting, prefill: Prefill) -> None:
    """Raises AssertionError if a layer does not have the number of tokens of the setting."""
    layers, first = len(prefill.lengths), setting.keep or TOKENS
    wanted = [PROMPT + (first if n < layers // 2 else setting.llm_keep or first) for n in range(layers)]
    assert prefill.lengths == wanted, f"{setting}: the layers have {prefill.lengths} tokens, not {wanted}"


def answer(model: nn.Module, setting: Setting, given: dict[str, Tensor]) -> Timed:
    """Generates an answer. Returns the seconds of the prefill, of the whole answer, and of the op and the hooks in the
    prefill."""
    with spent(apet_kernels, ["compress_packed"]) as op, spent(Engine, HOOKS) as hooks, running(model, setting):
        begin = time.perf_counter()
        prefill, total = clock(model, given, NEW_TOKENS)
    found = {setting.name: prefill, f"{setting.name} answer": total}
    if setting.keep is not None:
        for part, calls in (("op", op), ("hooks", hooks)):
            found[f"{setting.name} {part}"] = sum(s for at, s in calls if begin <= at < begin + prefill)
    return Timed(found)


def attainable(model: nn.Module, keep: int, given: dict[str, Tensor]) -> None:
    """Runs the parts of an unpatched model in a prefill of `keep` tokens an image, one after another."""
    rows, hidden = len(given["input_ids"]), model.config.text_config.hidden_size
    text = torch.zeros(rows, PROMPT, hidden, dtype=given["pixel_values"].dtype)
    features = model.model.vision_tower(given["pixel_values"], output_hidden_states=True).hidden_states[-2]
    image = model.model.multi_modal_projector(features[:, 1 : 1 + keep])
    out = model.model.language_model(inputs_embeds=torch.cat([image, text], 1), use_cache=True)
    model.lm_head(out.last_hidden_state[:, -1:])


@contextlib.contextmanager
def running(model: nn.Module, setting: Setting) -> Iterator[None]:
    """Applies a setting to the model in a with block."""
    llm_layer = None if setting.llm_keep is None else model.config.text_config.num_hidden_layers // 2
    with contextlib.ExitStack() as stack:
        keep = setting.keep or 64
        stack.enter_context(apet.patched(model, keep, llm_layer=llm_layer, llm_keep=setting.llm_keep))
        if setting.keep is None:
            stack.enter_context(unpatched(engine_of(model)))
        yield


@contextlib.contextmanager
def spent(owner: Any, names: list[str]) -> Iterator[list[tuple[float, float]]]:
    """Records when each call of these functions or methods began, and how long it took."""
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


def settings_of(row: Row) -> list[Setting]:
    """Returns the settings of a row."""
    found = []
    for name in row.counts:
        if name != "answer":
            keep, *llm_keep = map(int, name.split(" → "))
            found.append(Setting(None if keep == TOKENS else keep, *llm_keep))
    return found


def predicted(row: Row, setting: Setting) -> float:
    """Returns FLOPs of the prefill without compression / FLOPs with it."""
    return row.counts[str(TOKENS)] / row.counts[str(setting)]


def speedup(row: Row, name: str, of: str = "uncompressed") -> float:
    """Returns how many times faster `name` is than `of`."""
    return row.faster.get(of, 1.0) / row.faster.get(name, 1.0)


def missed_with(row: Row, setting: Setting) -> list[str] | None:
    """Returns the goals that are missed with a setting; None if it has none."""
    if setting.mean != 64:
        return None
    share, reached = row.faster[f"{setting.name} op"], speedup(row, setting.name) / predicted(row, setting)
    noise = max(row.noise[setting.name], row.noise[row.base])
    found = [f"op {share:.2%} of the prefill"] * (share >= OP_SHARE)
    found += [f"{reached:.0%} of predicted, goal {SPEED_SHARE:.0%}"] * (reached < SPEED_SHARE)
    return found + [f"noise {noise:.0%}, measure again on an idle machine"] * (noise > NOISE)


def missed(row: Row) -> list[str]:
    """Returns the goals that are missed, with every setting."""
    return [f"{setting}: {goal}" for setting in settings_of(row) for goal in missed_with(row, setting) or []]


def sheets(results: Results) -> list[Sheet]:
    """Returns a table for each dtype and batch size."""
    note = (
        "kept: tokens of an image after the encoder → after half of the decoder's layers. Times are medians. "
        "predicted: FLOPs of the uncompressed prefill / FLOPs with compression, the vision encoder in both. "
        "attainable: the same number of tokens through the model's parts, without hooks. 8 tokens: a whole answer of 8 "
        "tokens; speed-up of all: of its time. op, hooks: what the compression takes inside the prefill; share: of the "
        "uncompressed prefill. noise: interquartile range over median. goals, for 64 tokens: op below "
        f"{OP_SHARE:.1%}, speed-up {SPEED_SHARE:.0%} of predicted."
    )
    return [
        Sheet(
            f"{row.case['dtype']}, batch {row.case['batch']}",
            note,
            [
                *("kept", "GFLOP a row", "prefill ms", "speed-up", "predicted", "of predicted", "attainable ms"),
                *(f"{row.counts['answer']:g} tokens ms", "speed-up of all"),
                *("op ms", "op share", "hooks ms", "hooks share", "noise", "goals"),
            ],
            [_line(row, setting) for setting in settings_of(row)],
            ("kept", "goals"),
        )
        for row in results.rows
    ]


def _line(row: Row, setting: Setting) -> list[str]:
    name, goals = setting.name, missed_with(row, setting)
    reached, wanted = speedup(row, name), predicted(row, setting)
    least = row.ms.get(f"attainable {setting}")
    inside = [f"{name} op", f"{name} hooks"]
    op, hooks = inside
    return [
        *(str(setting), f"{row.counts[str(setting)]:.4g}", f"{row.ms[name]:.0f}"),
        *(f"{reached:.2f}", f"{wanted:.2f}", f"{reached / wanted:.0%}", "-" if least is None else f"{least:.0f}"),
        *(f"{row.ms[f'{name} answer']:.0f}", f"{speedup(row, f'{name} answer', 'uncompressed answer'):.2f}"),
        *(
            (f"{row.ms[op]:.2f}", f"{row.faster[op]:.3%}", f"{row.ms[hooks]:.1f}", f"{row.faster[hooks]:.2%}")
            if op in row.ms
            else "-" * 4
        ),
        f"{row.noise[name]:.0%}",
        "none" if goals is None else "; ".join(goals) or "met",
    ]


def head(rates: dict[str, float]) -> dict[str, str]:
    """Returns a description of the model."""
    products = (f"{name.split()[0]} {rate:.0f} GFLOP/s" for name, rate in rates.items())
    return {
        "torch.mm 2048^3": ", ".join(products),
        "model": f"LLaVA-shaped, {llava.PARAMETERS} random parameters, sdpa; "
        f"{PROMPT} text tokens and {TOKENS} of an image in a row; transformers {transformers.__version__}",
    }


SUITE = Suite(
    "hooks",
    "The hooks in a whole model: time of prefill and answer against tokens kept, with the prediction from FLOPs.",
    cases,
    compare,
    sheets,
    rounds=3,
    missed=missed,
    rates=lambda device: {f"{name_of(d)} GFLOP/s": peak_gflops(d) for d in (torch.float32, torch.bfloat16)},
    head=head,
)

if __name__ == "__main__":
    SUITE.main()
