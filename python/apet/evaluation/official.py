"""The official files of GQA, POPE and TextVQA, turned into `questions.jsonl` with the prompts of LLaVA-1.5."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet import Refused
from apet.evaluation.questions import FILE

SHORT = "\nAnswer the question using a single word or phrase."


@dataclass(frozen=True)
class Converted:
    """How many questions were written, and how many of their images are not there."""

    questions: int
    without_image: int


def convert(kind: str, files: Sequence[Path], folder: Path, images: str, prompts: Path | None) -> Converted:
    """Writes `questions.jsonl` into a folder.

    Args:
        kind: a key of KINDS.
        files: the official files with the questions.
        folder: where `questions.jsonl` goes; images: where the pictures are, seen from there.
        prompts: TextVQA only: LLaVA's file of prompts with what OCR has read.

    Raises: Refused, in one sentence, where a file is not what it should be, or there are questions in the folder.
    """
    if kind not in KINDS:
        raise Refused(f"kind={kind!r} is none of {', '.join(KINDS)}")
    if prompts is not None and kind != "textvqa":
        raise Refused(f"--prompts is for textvqa, not for {kind}")
    target = folder / FILE
    if target.exists():
        raise Refused(f"{target} is there already; move it away first")
    records: list[dict[str, Any]] = []
    for path in files:
        try:
            records += KINDS[kind](path, images, prompts)
        except OSError as error:
            raise Refused(f"cannot read {error.filename}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(f"{path} is no file of {kind}: {type(error).__name__} {error}") from error
    if not records:
        raise Refused(f"{', '.join(map(str, files))} hold no question")
    unfinished = folder / f"{FILE}.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), "utf-8")
        unfinished.rename(target)
    except OSError as error:
        raise Refused(f"cannot write {target}: {error.strerror}") from error
    return Converted(len(records), sum(not (folder / record["image"]).is_file() for record in records))


def _gqa(path: Path, images: str, _: Path | None) -> Iterator[dict[str, Any]]:
    """testdev_balanced_questions.json: {id: {"imageId", "question", "answer", ...}}."""
    for name, entry in json.loads(path.read_text("utf-8")).items():
        yield {
            "id": name,
            "image": f"{images}/{entry['imageId']}.jpg",
            "question": entry["question"] + SHORT,
            "answers": [entry["answer"]],
        }


def _pope(path: Path, images: str, _: Path | None) -> Iterator[dict[str, Any]]:
    """coco_pope_random.json and its sisters: lines {"question_id", "image", "text", "label"}; a group each."""
    group = path.stem.rpartition("_")[2]
    for entry in _lines(path):
        yield {
            "id": f"{group}-{entry['question_id']}",
            "image": f"{images}/{entry['image']}",
            "question": entry["text"] + SHORT,
            "answers": [entry["label"]],
            "group": group,
        }


def _textvqa(path: Path, images: str, prompts: Path | None) -> Iterator[dict[str, Any]]:
    """TextVQA_0.5.1_val.json: {"data": [{"question_id", "image_id", "question", "answers", ...}]}. prompts: LLaVA's
    llava_textvqa_val_v051_ocr.jsonl, lines {"question_id": the image's, "text": question, OCR and instruction}."""
    written = {}
    for entry in _lines(prompts) if prompts else ():
        written[entry["question_id"], _key(entry["text"].partition("\n")[0])] = entry["text"]
    for entry in json.loads(path.read_text("utf-8"))["data"]:
        text = entry["question"] + SHORT
        if prompts:
            key = entry["image_id"], _key(entry["question"])
            if key not in written:
                raise Refused(f"{prompts} has no prompt for question {entry['question_id']} of {path}")
            text = written[key]
        yield {
            "id": entry["question_id"],
            "image": f"{images}/{entry['image_id']}.jpg",
            "question": text,
            "answers": entry["answers"],
        }


KINDS: dict[str, Callable[[Path, str, Path | None], Iterator[dict[str, Any]]]] = {
    "gqa": _gqa,
    "pope": _pope,
    "textvqa": _textvqa,
}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip())


def _key(question: str) -> str:
    return question.strip().lower()
