"""The table of `apet eval`: accuracy, agreement with the uncompressed answers, tokens and time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.table import Table

from apet.evaluation.journal import Record, Records
from apet.evaluation.metrics import Metric, f1
from apet.evaluation.questions import Question

MEAN = "mean"


@dataclass(frozen=True)
class Row:
    """A variant on one group of questions, or the mean of its groups.

    accuracy, f1, agreement: shares; f1 is None unless answers are yes or no; visual_tokens: mean of questions and
    decoder layers; prefill, total: median seconds.
    """

    variant: str
    group: str
    questions: int
    accuracy: float
    f1: float | None
    agreement: float
    visual_tokens: float
    prefill: float
    total: float


@dataclass(frozen=True)
class Summary:
    """rows: by variant, then group; failed: the sentences of questions that failed, which count in no row."""

    metric: str
    rows: list[Row]
    failed: list[str]
    asked: int

    def table(self) -> Table:
        """For people."""
        grouped = any(row.group for row in self.rows)
        yes_no = any(row.f1 is not None for row in self.rows)
        headings = ["questions", self.metric, "of plain", "agreement", "visual tokens", "prefill ms", "total ms"]
        if yes_no:
            headings[1:2] = ["accuracy", "F1"]
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for heading in ("", "group")[: 1 + grouped]:
            table.add_column(heading, no_wrap=True)
        for heading in headings:
            table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
        plain = {row.group: row for row in self.rows if row.variant == self.rows[0].variant}
        for row in self.rows:
            before = plain[row.group]
            of, value = (before.f1, row.f1) if yes_no else (before.accuracy, row.accuracy)
            table.add_row(
                row.variant,
                *([row.group] if grouped else []),
                str(row.questions),
                f"{row.accuracy:.2%}",
                *([f"{row.f1:.2%}"] if yes_no else []),
                f"{value / of:.1%}" if of else "-",
                f"{row.agreement:.2%}",
                f"{row.visual_tokens:.1f}",
                f"{row.prefill * 1e3:.1f}",
                f"{row.total * 1e3:.1f}",
            )
        return table


def summarise(questions: Sequence[Question], variants: Sequence[str], records: Records, metric: Metric) -> Summary:
    """What the answers of all questions are worth. variants: the uncompressed one first.

    A question that failed with one variant counts with none, so that all are compared on the same questions.
    """
    failed = [record["failed"] for record in records.values() if "failed" in record]
    sound = [q for q in questions if not any("failed" in records[q.id, v] for v in variants)]
    rows: list[Row] = []
    for variant in variants:
        groups = [
            _row(variant, group, [q for q in sound if q.group == group], variants[0], records, metric)
            for group in dict.fromkeys(q.group for q in sound)
        ]
        rows += [*groups, _mean(groups)] if len(groups) > 1 else groups
    return Summary(metric.name, rows, list(dict.fromkeys(failed)), len(questions))


def _row(variant: str, group: str, questions: Sequence[Question], plain: str, records: Records, metric: Metric) -> Row:
    mine: list[Record] = [records[q.id, variant] for q in questions]
    read = [metric.read(record["answer"]) for record in mine]
    uncompressed = [metric.read(records[q.id, plain]["answer"]) for q in questions]
    worth = [metric.worth(record["answer"], q) for record, q in zip(mine, questions, strict=True)]
    right = [metric.read(q.answers[0]) for q in questions]
    return Row(
        variant,
        group,
        len(questions),
        statistics.fmean(worth),
        f1(read, right) if metric.only else None,
        statistics.fmean(a == b for a, b in zip(read, uncompressed, strict=True)),
        statistics.fmean(record["visual tokens"] for record in mine),
        statistics.median(record["prefill"] for record in mine),
        statistics.median(record["total"] for record in mine),
    )


def _mean(groups: Sequence[Row]) -> Row:
    """Of the groups, each counting the same, as POPE is reported."""
    means = {}
    for name in ("accuracy", "f1", "agreement", "visual_tokens", "prefill", "total"):
        values = [getattr(row, name) for row in groups]
        means[name] = None if None in values else statistics.fmean(values)
    return replace(groups[0], group=MEAN, questions=sum(row.questions for row in groups), **means)
