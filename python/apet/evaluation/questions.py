"""Reads a folder of images and clips with their questions in `questions.jsonl`, and checks it before any work is
done."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apet import ApetError
from apet.media import is_address

FILE = "questions.jsonl"
KINDS = {"id": (str, int), "image": str, "video": str, "question": str, "answers": list}
NEEDED = ("id", "question", "answers")


@dataclass(frozen=True)
class Question:
    """One question: a line of `questions.jsonl`."""

    id: str  # unique in the file
    source: str | Path  # the path or address of a photo or clip
    is_clip: bool
    text: str  # the whole prompt, without the image
    answers: tuple[str, ...]  # the right answers, at least one
    where: str  # file and line, for errors


@dataclass(frozen=True)
class Questions:
    """All questions of a folder."""

    items: list[Question]  # in the order of the file
    digest: str  # SHA-256 of the file's bytes


def read(folder: Path) -> Questions:
    """Reads the questions of a folder, but not its images.

    Raises: ApetError, with file and line, if a line does not have the format of docs/evaluation.md.
    """
    path = folder / FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ApetError(f"cannot read {path}: {error.strerror}") from error
    items: list[Question] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        record = _record(line, where)
        name = str(record["id"])
        if name in lines:
            raise ApetError(f"{where}: the id {name!r} is that of line {lines[name]}, too")
        lines[name] = number
        given = record.get("image") or record["video"]
        source = given if is_address(given) else folder / given
        answers = tuple(record["answers"])
        items.append(Question(name, source, "video" in record, record["question"], answers, where))
    if not items:
        raise ApetError(f"{path} holds no question")
    return Questions(items, hashlib.sha256(data).hexdigest())


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # no JSON, or no UTF-8
        raise ApetError(f"{where}: this is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ApetError(f"{where}: {record!r} is not a JSON object")
    for key in NEEDED:
        if key not in record:
            raise ApetError(f"{where}: the key {key!r} is missing")
    if ("image" in record) == ("video" in record):
        raise ApetError(f"{where}: give one of the keys 'image' and 'video'")
    for key, value in record.items():
        if key not in KINDS:
            raise ApetError(f"{where}: the key {key!r} is none of {', '.join(KINDS)}")
        if not isinstance(value, KINDS[key]) or isinstance(value, bool):
            raise ApetError(f"{where}: {key}={value!r} is of the wrong kind")
        if value in ("", []):
            raise ApetError(f"{where}: {key} is empty")
    for answer in record["answers"]:
        if not isinstance(answer, str) or not answer.strip():
            raise ApetError(f"{where}: {answer!r} among the answers is empty or not text")
    return record
