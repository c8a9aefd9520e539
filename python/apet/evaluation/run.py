"""Asks every question with and without compression, and records answers and times."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

import apet
from apet import ApetError, hooks, media, models
from apet.evaluation.answers import Answers, Record, Records
from apet.evaluation.questions import Question, Questions
from apet.hooks import caches, parts
from apet.hooks.adapters import adapter_for
from apet.hub import first_line
from apet.model_report import GREEDY, Clock

if TYPE_CHECKING:
    from torch import nn

PLAIN = "uncompressed"
# What fails a question alone: it cannot be read, compression rejects it, or it is too large for memory.
FAILURES = (ApetError, ValueError, RuntimeError, MemoryError)
PatchOptions = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """The settings of a run."""

    model: str
    variants: Mapping[str, PatchOptions | None]  # the options of `apet.patch` by name, None for the model as it is
    max_new_tokens: int
    dtype: str  # as in `apet.models.load`
    device: str | None  # as in `apet.models.load`
    frames: int = 8  # of each clip


def evaluate(questions: Questions, out: Path, settings: Settings, progress: Callable[[str, int, int], None]) -> Records:
    """Asks the questions that the file `out` does not hold yet; returns all records of these questions and variants.

    progress is called with the current step, the number of questions done, and the number of questions to ask.

    Raises: ApetError, if the model or the file cannot be used.
    """
    made_with = {
        "model": settings.model,
        "questions": questions.digest,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": settings.dtype,
        "device": models.describe_device(settings.device),
        "weights": models.digest(settings.model),
        "versions": {name: version(name) for name in ("torch", "transformers")} | {"apet": apet.__version__},
    }
    if any(question.is_clip for question in questions.items):
        made_with["frames"] = settings.frames
    with Answers(out, made_with) as answers:
        missing = {q: _missing(answers.records, q, settings.variants, out) for q in questions.items}
        todo = [(question, variants) for question, variants in missing.items() if variants]
        if todo:
            progress("loading the model", 0, len(todo))
            trials = [options for options in settings.variants.values() if options is not None]
            model, processor = models.load(settings.model, trials, settings.dtype, settings.device)
            for number, (question, variants) in enumerate(todo):
                progress("asking", number, len(todo))
                before = [record for (name, _), record in answers.records.items() if name == question.id]
                for record in _ask(model, processor, question, variants, settings, before, out):
                    answers.add(record)
    return {(q.id, name): answers.records[q.id, name] for q in questions.items for name in settings.variants}


def _missing(
    done: Records, question: Question, variants: Mapping[str, PatchOptions | None], out: Path
) -> dict[str, PatchOptions | None]:
    """Returns the variants without an answer to a question. A failed one is asked again: the image may have been
    repaired. Raises ApetError if the image has changed since it was asked about."""
    records = {name: done.get((question.id, name)) for name in variants}
    _check_same(question, _file(question), [record for record in records.values() if record is not None], out)
    return {name: variants[name] for name, record in records.items() if record is None or "failed" in record}


def _ask(
    model: nn.Module,
    processor: Any,
    question: Question,
    variants: Mapping[str, PatchOptions | None],
    settings: Settings,
    before: Sequence[Record],
    out: Path,
) -> list[Record]:
    """Asks one question with every variant; the image or clip is read once. A failure is returned as a record, too.

    before: its records in the file `out`. Raises: ApetError, if another image is now at its address.
    """
    file = _file(question)
    try:
        if os.path.exists(question.source) and not os.path.isfile(question.source):
            raise ApetError(f"cannot read {question.source}: it is not a file")
        item = media.read(question.source, settings.frames)
        if item.is_clip != question.is_clip:
            raise ApetError(f"{item.name} is a {'clip, not a photo' if item.is_clip else 'photo, not a clip'}")
        images, clip = ([], item) if item.is_clip else (item.frames, None)
        inputs = models.question(model, processor, question.text, images, clip)
    except FAILURES as error:
        return [_failed(question, name, error) for name in variants]
    if file is None:
        file = _frames(item)
        _check_same(question, file, before, out)
    known = {"file": file} | ({"notes": item.notes} if item.notes else {})
    records = []
    for name, options in variants.items():
        try:
            with nullcontext() if options is None else hooks.patched(model, **options):
                result = _answer(model, processor, inputs, settings.max_new_tokens)
            records.append({"id": question.id, "variant": name, **result, **known})
        except FAILURES as error:
            records.append(_failed(question, name, error))
    return records


def _file(question: Question) -> str | None:
    """Returns size and time of change of a question's image or clip; None if it is no local file, or is missing."""
    if not os.path.isfile(question.source):
        return None
    known = os.stat(question.source)
    return f"{known.st_size} bytes, {known.st_mtime_ns}"


def _frames(item: media.Media) -> str:
    """Returns a digest of the pixels of an image or clip."""
    pixels = hashlib.sha256(repr(item.times).encode())
    for frame in item.frames:
        pixels.update(repr(frame.size).encode() + frame.tobytes())
    return f"sha256 {pixels.hexdigest()}"


def _check_same(question: Question, file: str | None, before: Sequence[Record], out: Path) -> None:
    """Raises ApetError if the records of a question are about another image or clip than `file` says; None: unknown."""
    if file is not None and any(record.get("file", file) != file for record in before):
        raise ApetError(
            f"{question.where}: {question.source} has changed since the answers in {out}: give another --out"
        )


def _failed(question: Question, variant: str, error: Exception) -> Record:
    return {"id": question.id, "variant": variant, "failed": f"{question.where}: {first_line(error)}"}


def _answer(model: nn.Module, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int) -> Record:
    """Returns the greedy answer, its length, the number of visual tokens (mean of decoder layers), and the seconds to
    its first and last token.

    Without compression a layer's cache holds the prompt and all new tokens except the last. The difference from that
    number is the number of visual tokens that were dropped.
    """
    clock = Clock()
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    begin = time.perf_counter()
    out = model.generate(
        **inputs, **GREEDY, max_new_tokens=max_new_tokens, streamer=clock, return_dict_in_generate=True
    )
    cache = next(value for value in out.values() if isinstance(value, Cache))
    patched = hooks.options(model)
    lengths = caches.lengths(cache, None if patched is None else patched.llm_layer)
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
    """Counts the placeholders of images and clips in the prompt."""
    adapter = adapter_for(model)
    core = adapter.core(model)
    tokens = {parts.of(core, name) for name in adapter.fitted(core).tokens.values()} - {None}
    return sum(int((inputs["input_ids"] == token).sum()) for token in tokens)
