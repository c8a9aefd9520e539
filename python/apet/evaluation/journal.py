"""The answers so far, in a folder: one file per process, to which lines are appended and never changed.

A line is written and synced before the next question is asked, so a run that dies loses the question that it
was at, and no more. Every file begins, and after every start goes on, with a header:

    {"made with": {...}, "by": {"host": ..., "pid": ..., "rank": ..., "processes": ..., "device": ...}}
    {"id": "7", "variant": "keep=64", "answer": "yes", ...}
    {"id": "8", "variant": "keep=64", "failed": "questions.jsonl, line 8: no such file: ..."}
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from apet import Refused

Record = dict[str, Any]
Records = dict[tuple[str, str], Record]  # by id and variant
HEADER = "made with"


class Journal:
    """The file of one process, which nobody else may write while it is open.

    folder: where the files of all processes are, made if need be; rank: of this process; made_with: what must be the
    same in every run that adds to the folder.

    Raises: Refused where the folder cannot be written, or is in use.
    """

    def __init__(self, folder: Path, rank: int, made_with: Mapping[str, Any]):
        self.folder, self.made_with = folder, dict(made_with)
        self.path = folder / f"answers-{rank:05}.jsonl"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file = self.path.open("ab", buffering=0)
        except OSError as error:
            raise Refused(f"cannot write {self.path}: {error.strerror}") from error
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise Refused(f"another run is writing {self.path}; wait for it, or give another --out") from error
        self._drop_torn_line()

    def _drop_torn_line(self) -> None:
        """Nothing may be appended to a line that was cut short."""
        data = self.path.read_bytes()
        if data and not data.endswith(b"\n"):
            self.file.truncate(data.rfind(b"\n") + 1)

    def start(self, by: Mapping[str, Any]) -> None:
        """A header: from here on lines are written by this process."""
        self._write({HEADER: self.made_with, "by": dict(by)})

    def add(self, record: Record) -> None:
        """A line; on disk when this returns. Raises: Refused where the disk is full."""
        self._write(record)

    def close(self) -> None:
        """Lets others write."""
        self.file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self.file.fileno())
        except OSError as error:
            raise Refused(f"cannot write {self.path}: {error.strerror}") from error

    def read(self) -> Records:
        """Everything in the folder that was made with the same, whichever process wrote it.

        Raises: Refused where something was made otherwise, is damaged, or was answered twice.
        """
        records: Records = {}
        for path in sorted(self.folder.glob("answers-*.jsonl")):
            for where, line in _lines(path):
                if HEADER in line:
                    self._check(line[HEADER])
                elif "id" not in line or "variant" not in line:
                    raise Refused(f"{where}: this is no line of a run")
                else:
                    add(records, line, where)
        return records

    def _check(self, made_with: Mapping[str, Any]) -> None:
        for name, value in self.made_with.items():
            if made_with.get(name) != value:
                raise Refused(
                    f"{self.folder} was made with {name}={made_with.get(name)!r}, this run has {value!r}: "
                    "give another --out"
                )


def add(records: Records, record: Record, where: str) -> None:
    """An answer replaces a failure, and a failure nothing. Raises: Refused where there is another answer."""
    key = record["id"], record["variant"]
    before = records.get(key)
    if before is None or "failed" in before:
        records[key] = record
    elif "failed" not in record:
        raise Refused(f"{where}: question {key[0]!r} was answered before with {key[1]}")


def merged(parts: list[Records]) -> Records:
    """What several processes have read: the same files, or on machines without a common folder each its own."""
    records: Records = {}
    for part in parts:
        for key, record in part.items():
            if key not in records or "failed" in records[key]:
                records[key] = record
    return records


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """File and line number with each line; a last one that was cut short is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        if number == len(lines) and not line.endswith(b"\n"):
            return
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise Refused(f"{where}: this line is damaged") from error
        if not isinstance(record, dict):
            raise Refused(f"{where}: this line is damaged")
        yield where, record
