"""The file of answers: a run appends lines to it and never changes one.

A line is written before the next question is asked, so an interrupted run loses at most one answer. The first line
records the settings:

    {"made with": {"model": ..., "questions": ..., ...}}
    {"id": "7", "variant": "keep=64", "answer": "yes", ...}
    {"id": "8", "variant": "keep=64", "failed": "questions.jsonl, line 8: cannot read ..."}
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apet import ApetError, Notice

Record = dict[str, Any]
Records = dict[tuple[str, str], Record]  # by id and variant
HEADER = "made with"
START = json.dumps({HEADER: {}}).encode()[:-3]  # the first bytes of every such file


class Answers:
    """The open file of answers, locked against other runs; a context manager.

    path: created if missing, with its folder. made_with: settings that must be the same in every run that adds to the
    file. records: its contents.

    Raises: ApetError, if the file cannot be written, is in use, is damaged, or was made with other settings.
    """

    def __init__(self, path: Path, made_with: Mapping[str, Any]):
        self.path, self.made_with, self.records = path, dict(made_with), Records()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.file = path.open("ab", buffering=0)
        except OSError as error:
            raise ApetError(f"cannot write {path}: {error.strerror}") from error
        try:
            self._lock()
            self._read()
        except ApetError:
            self.file.close()
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def add(self, record: Record) -> None:
        """Appends a line and passes it to the operating system at once. Raises: ApetError, if the disk is full."""
        if not self.records:
            self._write({HEADER: self.made_with})
        self._write(record)
        self._note(record, str(self.path))

    def _lock(self) -> None:
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ApetError(f"another run is writing {self.path}; wait for it, or give another --out") from error
            # ENOSYS, ENOTSUP, ENOLCK, ...: Lustre without -o flock, some network file systems
            message = (
                f"the file system of {self.path} has no locks ({error.strerror}): let no other run write this file"
            )
            warnings.warn(Notice(message), stacklevel=4)

    def _write(self, line: Mapping[str, Any]) -> None:
        data = json.dumps(line).encode() + b"\n"
        try:
            if self.file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise ApetError(f"cannot write {self.path}: {error.strerror}") from error

    def _read(self) -> None:
        """Reads the records. A last line that was cut short is removed, so that nothing is appended to it."""
        data = self.path.read_bytes()
        if not START.startswith(data[: len(START)]):
            raise ApetError(f"{self.path} is not a file of `apet eval` answers: give another --out")
        whole = data.rfind(b"\n") + 1
        self.file.truncate(whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            where = f"{self.path}, line {number}"
            record = _parse(line, where)
            if number == 1:
                made_with = record[HEADER]
            elif "id" not in record or "variant" not in record:
                raise ApetError(f"{where}: this is not an answer of a run")
            else:
                self._note(record, where)
        if self.records:
            self._check(made_with)
        else:
            self.file.truncate(0)  # without answers, the settings may change

    def _check(self, before: Mapping[str, Any]) -> None:
        for name, value in self.made_with.items():
            if before.get(name) != value:
                raise ApetError(
                    f"{self.path} was made with {name}={before.get(name)!r}, this run has {value!r}: give another --out"
                )

    def _note(self, record: Record, where: str) -> None:
        """Adds a record. An answer replaces a failure; a failure replaces nothing."""
        key = record["id"], record["variant"]
        before = self.records.get(key)
        if before is None or "failed" in before:
            self.records[key] = record
        elif "failed" not in record:
            raise ApetError(f"{where}: question {key[0]!r} was answered before with {key[1]}")


def _parse(line: bytes, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ApetError(f"{where}: this line is damaged") from error
    if not isinstance(record, dict):
        raise ApetError(f"{where}: this line is damaged")
    return record
