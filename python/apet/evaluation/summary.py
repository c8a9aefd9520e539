"""The table of `apet eval`: accuracy, agreement with the uncompressed answers, tokens and time."""

from __future__ import annotations

import statistics
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table

from apet.evaluation.answers import Record, Records
from apet.evaluation.questions import Question


@dataclass(frozen=True)
class Row:
    """The results of one variant."""

    variant: str
    questions: int
    exact: float  # share of answers that equal a right answer
    contains: float  # share of answers that contain a right answer, as whole words
    agreement: float  # share of answers that equal the uncompressed model's
    visual_tokens: float  # mean over questions and decoder layers
    prefill: float  # median seconds to the first token
    total: float  # median seconds to the last token


@dataclass(frozen=True)
class Summary:
    """The results that `apet eval` prints."""

    rows: list[Row]  # the uncompressed model first
    failed: list[str]  # the errors of questions that failed, which count in no row
    notes: list[str]  # about images and clips of which a part was skipped
    asked: int
    answered: int  # questions that count: the others failed

    def table(self) -> Table:
        """Returns the rows as a printable table."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("", no_wrap=True)
        for heading in ("questions", "exact", "contains", "agreement", "visual tokens", "prefill ms", "total ms"):
            table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
        for row in self.rows:
            table.add_row(
                row.variant,
                str(row.questions),
                *(f"{share:.2%}" for share in (row.exact, row.contains, row.agreement)),
                *(f"{value:.1f}" for value in (row.visual_tokens, row.prefill * 1e3, row.total * 1e3)),
            )
        return table


def summarise(questions: Sequence[Question], variants: Sequence[str], records: Records) -> Summary:
    """Computes accuracy, tokens and time of every variant. variants: the uncompressed one first.

    A question that failed with one variant counts for none, so that all are compared on the same questions.
    """
    failed = [record["failed"] for record in records.values() if "failed" in record]
    sound = [q for q in questions if not any("failed" in records[q.id, v] for v in variants)]
    rows = [_row(variant, sound, variants[0], records) for variant in variants] if sound else []
    notes = [f"{q.where}: {note}" for q in sound for v in variants for note in records[q.id, v].get("notes", ())]
    return Summary(rows, list(dict.fromkeys(failed)), list(dict.fromkeys(notes)), len(questions), len(sound))


def _row(variant: str, questions: Sequence[Question], plain: str, records: Records) -> Row:
    mine: list[Record] = [records[q.id, variant] for q in questions]
    answers = [words(record["answer"]) for record in mine]
    before = [words(records[q.id, plain]["answer"]) for q in questions]
    right = [[words(answer) for answer in q.answers] for q in questions]
    return Row(
        variant,
        len(questions),
        statistics.fmean(a in given for a, given in zip(answers, right, strict=True)),
        statistics.fmean(any(f" {g} " in f" {a} " for g in given) for a, given in zip(answers, right, strict=True)),
        statistics.fmean(a == b for a, b in zip(answers, before, strict=True)),
        statistics.fmean(record["visual tokens"] for record in mine),
        statistics.median(record["prefill"] for record in mine),
        statistics.median(record["total"] for record in mine),
    )


def words(text: str) -> str:
    """Normalises an answer: composed small letters, single spaces, no punctuation at the ends of words, in any script.
    Marks that change the meaning of a word stay: 50%, C#, -5. So does a text without words."""
    given = unicodedata.normalize("NFC", text).casefold().split()
    return " ".join(filter(None, map(_stripped, given))) or " ".join(given)


def _stripped(word: str) -> str:
    def is_mark(character: str) -> bool:
        return character == "`" or (unicodedata.category(character)[0] == "P" and character not in "%‰#&@-/\\")

    first = next((i for i, character in enumerate(word) if not is_mark(character)), len(word))
    last = next((i for i in range(len(word), first, -1) if not is_mark(word[i - 1])), first)
    return word[first:last]
