"""Asking every question, with and without compression, and writing down what was answered and how long it took."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from os import getpid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import apet
from apet import Refused, hooks, media, models
from apet.encoders import first_line
from apet.evaluation.journal import Journal, Record, Records, merged
from apet.evaluation.processes import Processes
from apet.evaluation.questions import Question, Questions
from apet.hooks.adapter import adapter_for
from apet.model_report import GREEDY, Clock

if TYPE_CHECKING:
    from torch import nn

PLAIN = "uncompressed"
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a run is asked for.

    variants: the options of `apet.patch` by name, None for the model as it is; dtype, device: as in `apet.models.load`.
    """

    model: str
    variants: Mapping[str, Options | None]
    max_new_tokens: int
    dtype: str
    device: str | None


def evaluate(
    questions: Questions,
    out: Path,
    settings: Settings,
    processes: Processes,
    progress: Callable[[str, int, int], None],
) -> Records:
    """Asks whatever `out` does not hold yet, and returns all records of these questions and variants.

    The work is split by questions: of those that lack an answer, in the order of the file, process r of n does every
    n-th from the r-th on. What is lacking is agreed upon before anybody writes, so that every question has one process,
    however many there were before. progress is called with what is being done, and how many of how many questions.

    Raises: Refused, in every process, where the model or the folder cannot be used as asked, or processes were not
    asked the same.
    """
    made_with = {
        "model": settings.model,
        "questions": questions.digest,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"apet": apet.__version__},
    }
    asked = made_with, dict(settings.variants)
    for rank, other in enumerate(processes.gather(asked)):
        if other != asked:
            raise Refused(f"process {processes.rank} was asked {asked}, process {rank} {other}")
    journal = processes.together(lambda: Journal(out, processes.rank, made_with))
    try:
        done = merged(processes.gather(processes.together(journal.read)))
        missing = {question.id: _missing(done, question, settings.variants) for question in questions.items}
        mine = processes.share([question for question in questions.items if missing[question.id]])
        if any(missing.values()):
            progress("loading the model", 0, len(mine))
            trials = [options for options in settings.variants.values() if options is not None]
            device = processes.device(settings.device)
            model, processor = processes.together(lambda: models.load(settings.model, trials, settings.dtype, device))

            def ask() -> None:
                journal.start(_by(processes, model))
                for number, question in enumerate(mine):
                    progress("asking", number, len(mine))
                    for record in _ask(model, processor, question, missing[question.id], settings.max_new_tokens):
                        journal.add(record)
                progress("waiting for the others", len(mine), len(mine))

            processes.together(ask)
        done = merged(processes.gather(processes.together(journal.read)))
    finally:
        journal.close()
    return {(question.id, name): done[question.id, name] for question in questions.items for name in settings.variants}


def _missing(done: Records, question: Question, variants: Mapping[str, Options | None]) -> dict[str, Options | None]:
    """The variants that a question lacks. One that failed is asked again: the image may have been mended."""
    records = {name: done.get((question.id, name)) for name in variants}
    return {name: variants[name] for name, record in records.items() if record is None or "failed" in record}


def _by(processes: Processes, model: nn.Module) -> dict[str, Any]:
    """Who writes the lines that follow."""
    device = model.device
    name = platform.processor() if device.type == "cpu" else torch.get_device_module(device).get_device_name(device)
    return {
        "host": platform.node(),
        "pid": getpid(),
        "rank": processes.rank,
        "processes": processes.count,
        "device": f"{device} {name}".strip(),
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
    }


def _ask(
    model: nn.Module, processor: Any, question: Question, variants: Mapping[str, Options | None], max_new_tokens: int
) -> list[Record]:
    """One question with every variant; the image is read once. A failure is a record as well."""
    try:
        photo = media.read(question.image, 1)
        if photo.times:
            raise Refused(f"{question.image} is a clip, not a photo")
        inputs = models.question(model, processor, question.text, photo.frames, [])
    except Refused as error:
        return [_failed(question, name, error) for name in variants]
    records = []
    for name, options in variants.items():
        try:
            with nullcontext() if options is None else hooks.patched(model, **options):
                said = _answer(model, processor, inputs, max_new_tokens)
            records.append({"id": question.id, "variant": name, **said})
        except (ValueError, torch.OutOfMemoryError) as error:  # what compression refuses; an image too large
            records.append(_failed(question, name, error))
    return records


def _failed(question: Question, variant: str, error: Exception) -> Record:
    return {"id": question.id, "variant": variant, "failed": f"{question.where}: {first_line(error)}"}


def _answer(model: nn.Module, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Record:
    """The greedy answer, its length, the visual tokens (mean of decoder layers), seconds to the first and last token.

    Layers hold the prompt and all new tokens but the last, so what a layer holds less than that was dropped from the
    image.
    """
    clock = Clock()
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    begin = time.perf_counter()
    out = model.generate(
        **inputs, **GREEDY, max_new_tokens=max_new_tokens, streamer=clock, return_dict_in_generate=True
    )
    layers = range(len(out.past_key_values.layers))
    lengths = [int(out.past_key_values.get_seq_length(layer)) for layer in layers]
    visual, (sequence,) = _visual_tokens(model, inputs), out.sequences
    new = sequence[inputs["input_ids"].shape[1] :]
    dropped = len(sequence) - 1 - sum(lengths) / len(lengths)
    return {
        "answer": processor.tokenizer.decode(new, skip_special_tokens=True).strip(),
        "length": len(new),
        "visual tokens": visual - dropped,
        "prefill": clock.times[1] - begin,
        "total": clock.times[-1] - begin,
    }


def _visual_tokens(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Placeholders of images in the prompt."""
    adapter = adapter_for(model)
    token = getattr(adapter.core(model).config, adapter.tokens["image"])
    return int((inputs["input_ids"] == token).sum())
