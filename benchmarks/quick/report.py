"""The report of a run of benchmarks/gpu_quick.py: a line for each item, and at most 40 lines at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RIGHT = ("ok", "not possible")
MOST_LINES = 40
OTHERS = ("triton", "mix", "tuned")
Line = dict[str, Any]


def readable(line: Line) -> str:
    """Returns one line of log.txt."""
    shown = [f"{line['t']:7.2f} {line['status']:>12}  {line['step']}: {line['item']}"]
    if "us" in line and isinstance(line["us"], float):
        shown.append(f"{line['us']:.2f} us")
    for name in ("versions", "device", "built", "rates"):
        if name in line:
            shown.append(json.dumps(line[name]))
    if "said" in line:
        shown.append(str(line["said"]))
    return "  ".join(shown).replace("\n", " ")


def load(folder: Path) -> list[Line]:
    """Returns the lines of a run; if it was cut off, only its complete lines."""
    lines = []
    for text in (folder / "results.jsonl").read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def rehearsed(lines: list[Line]) -> bool:
    return any(line.get("rehearsed") for line in lines)


def named(lines: list[Line], step: str, item: str) -> Line:
    """Returns the line of an item that is right; empty if there is none."""
    return next((x for x in lines if (x["step"], x["item"], x["status"]) == (step, item, "ok")), {})


@dataclass
class Measured:
    """The times of one shape, in microseconds."""

    shape: str  # str() of the case
    plan: dict[str, Any] = field(default_factory=dict)
    cuda: dict[str, float] = field(default_factory=dict)  # by path; "best any" is the estimate's choice
    others: dict[str, float] = field(default_factory=dict)  # "triton", "mix", "tuned"

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest forced path, and its time."""
        forced = {way: us for way, us in self.cuda.items() if not way.startswith("best")}
        return min(forced.items(), key=lambda item: item[1]) if forced else None

    @property
    def chosen(self) -> float | None:
        return next((us for way, us in self.cuda.items() if way.startswith("best")), None)


def measured(lines: list[Line]) -> list[Measured]:
    """Returns the times shape by shape, in the order of the run."""
    found: dict[str, Measured] = {}
    for line in lines:
        if line["step"] != "times" or line["status"] != "ok":
            continue
        row = found.setdefault(line["case"], Measured(line["case"]))
        if "plan" in line:
            row.plan = line["plan"]
        elif line["name"] == "cuda":
            row.cuda[line["way"]] = line["us"]
        else:
            row.others[line["name"]] = line["us"]
    return list(found.values())


def floor_us(shape: str, rates: dict[str, Any]) -> float | None:
    """Returns the lower bound of any implementation at the rates that the run measured."""
    if not rates:
        return None
    import torch

    from benchmarks import floors
    from benchmarks.lib.cases import Case

    sizes, _, keep, dtype, layout = shape.split()[:5]
    case = Case(*map(int, sizes.split("x")), int(keep), getattr(torch, dtype), layout)  # type: ignore[arg-type]
    return 1e6 * floors.graphed(floors.floor(case), floors.Rates(**rates))


COLUMNS = ("shape", "path chosen", "us", "best path measured", "us", *OTHERS, "computed", "of ceiling")


def table(lines: list[Line]) -> list[list[str]]:
    """Returns a row for every shape. computed: the estimate of the chosen path; of ceiling: the floor's share of our
    best time."""
    rates = named(lines, "primitives", "rates").get("rates", {})
    rows = []
    for row in measured(lines):
        best, floor = row.best, floor_us(row.shape, rates)
        ours = [us for us in (best and best[1], row.chosen, row.others.get("triton"), row.others.get("mix")) if us]
        chosen = "{path} {ctas_per_image} tile {tile}".format(**row.plan) if row.plan else "-"
        share = f"{floor / min(ours):.0%}" if floor and ours else "-"
        estimate = row.plan.get("estimated_us")
        rows.append(
            [
                *(row.shape.removesuffix(" inplace"), chosen, us(row.chosen), best[0] if best else "-"),
                *(us(best[1] if best else None), *(us(row.others.get(name)) for name in OTHERS), us(estimate), share),
            ]
        )
    return rows


def us(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def block(lines: list[Line]) -> list[str]:
    """Returns the last lines: failures, counts, and the table. At most 40."""
    head = []
    if rehearsed(lines):
        head.append("REHEARSED: no GPU, and no figure means anything")
    device = named(lines, "card", "device").get("device", {})
    head.append(f"device: {device.get('name', 'unknown')}")
    counts: dict[str, int] = {}
    for line in lines:
        counts[line["status"]] = counts.get(line["status"], 0) + 1
    head.append("items: " + ", ".join(f"{n} {status}" for status, n in counts.items()))
    rows = aligned([list(COLUMNS), *table(lines)]) if measured(lines) else ["no times were measured"]
    wrong = [readable(line)[:160] for line in lines if line["status"] not in RIGHT]
    room = MOST_LINES - len(head) - len(rows)
    if len(wrong) > room:
        wrong = [*wrong[: room - 1], f"... and {len(wrong) - room + 1} more lines that are not right: log.txt"]
    return [*head, *wrong, *rows]


def aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return [" | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
