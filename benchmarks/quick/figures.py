"""Makes the figures of the estimate (csrc/cuda/figures.cuh) from a run of benchmarks/gpu_quick.py, and its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from benchmarks.quick.report import COLUMNS, Line, named, rehearsed, table

BEGIN, END = "    // figures:begin\n", "    // figures:end\n"
FIELD = re.compile(r"^  (?:int|double) (\w+);", re.MULTILINE)
ROW = re.compile(r"((?:    //.*\n)+)    \{(.*)\},\n")
Figures = dict[str, float]  # by the names of the members of `Figures`
S4_TOKENS = (576, 16384)  # the images from which both figures of s4 follow


def row_of(rows: list[tuple[str, Figures]], capability: int) -> Figures:
    """Returns the row that `figures_for` of figures.cuh takes for a capability."""
    same = [row for _, row in rows if row["capability"] // 10 == capability // 10 and row["capability"] <= capability]
    return max(same, key=lambda row: row["capability"], default=rows[0][1])


def parabola(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Returns a, b and c of the least-squares fit y = a + b x + c x^2."""
    import numpy as np

    c, b, a = np.polyfit(x, y, 2)
    return float(a), float(b), float(c)


def read(header: str) -> list[tuple[str, Figures]]:
    """Returns the rows of figures.cuh: comment and figures. Raises ValueError if one does not have all members."""
    names = FIELD.findall(header)
    body = header[header.index(BEGIN) + len(BEGIN) : header.index(END)]
    rows = []
    for comment, values in ROW.findall(body):
        numbers = [float(value) for value in values.split(",")]
        rows.append((comment, dict(zip(names, numbers, strict=True))))
    return rows


def write(header: str, rows: Iterable[tuple[str, Figures]]) -> str:
    """Returns the header with these rows."""
    body = ""
    for comment, row in rows:
        values = [f"{value:.4g}" for name, value in row.items() if name != "capability"]
        body += f"{comment}    {{{int(row['capability'])}, {', '.join(values)}}},\n"
    return header[: header.index(BEGIN) + len(BEGIN)] + body + header[header.index(END) :]


def measured(lines: list[Line]) -> Figures:
    """Returns the figures that a run has measured. A value that is not positive is left out: it is a difference smaller
    than the noise."""
    device = named(lines, "card", "device")["device"]
    sms = device["sms"]

    def item(name: str) -> Line:
        return named(lines, "primitives", name)

    found: dict[str, float | None] = {}
    if rates := item("rates").get("rates"):
        found["launch_us"] = 1e6 * rates["gap"]
        found["memory_share"] = rates["bandwidth"] / 1e6 / sms
    steps = [line for n in (4, 8, 16) if (line := item(f"step cluster {n}"))]
    found["cluster_step_us"] = middle(line["step_us"] for line in steps)
    found["term_us"] = middle(line["term_us"] for line in steps or [item(f"step cooperative {sms}")] if line)
    found["cooperative_step_us"] = item(f"step cooperative {sms}").get("step_us")
    few, many = (item(f"s4 {N}").get("us") for N in S4_TOKENS)
    if few and many:
        found["s4_token_us"] = (many - few) / (S4_TOKENS[1] - S4_TOKENS[0])
        found["lists_us"] = few - S4_TOKENS[0] * found["s4_token_us"]
    found["pick_us"] = (item("picks cluster 8") or item(f"picks cooperative {sms}")).get("pick_us")
    found["l2_bytes"] = device.get("l2")
    for name, key, width in (
        ("sweep {} 4 resident", "elements_per_sm", 1),
        ("sweep {} 4 L2", "l2_per_sm", 2),
        (f"sweep cooperative {sms} L2", "l2_share", 2),
    ):
        sweep = item(name.format("cluster")) or item(name.format("cooperative"))
        if sweep and sweep["step_us"] > 0:
            found[key] = sweep["rows"] * sweep["dim"] * width / sweep["step_us"]
    for dtype, key in (("bfloat16", "flops_per_sm_16"), ("float32", "flops_per_sm_32")):
        products = [x for x in lines if x["item"].startswith("s5 ") and x["status"] == "ok" and dtype in x["item"]]
        found[key] = max((x["flops"] / x["us"] / sms for x in products if x["us"] > 0), default=None)
    products = [x for x in lines if x["item"].startswith("triton s5 ") and x["status"] == "ok" and x["us"] > 0]
    found["triton_flops_per_sm_16"] = max((x["flops_per_sm"] / x["us"] for x in products), default=None)
    return {name: value for name, value in found.items() if value is not None and value > 0}


def middle(values: Iterable[float]) -> float | None:
    """Returns the lower median."""
    found = sorted(values)
    return found[(len(found) - 1) // 2] if found else None


def updated(header: str, lines: list[Line]) -> tuple[str, list[str]]:
    """Returns figures.cuh with a row for the run's GPU model, and the members that the run has not measured: these keep
    the value of the row that applied to it before."""
    device, rows = named(lines, "card", "device")["device"], read(header)
    capability = 10 * device["capability"][0] + device["capability"][1]
    before = row_of(rows, capability)
    found = measured(lines)
    kept = [name for name in before if name not in found and name != "capability"]
    comment = (
        f"    // {device['name']}, measured at commit {_commit(lines)}; left as it was: {', '.join(kept) or 'none'}\n"
    )
    comment = ("    // REHEARSED: no figure means anything\n" if rehearsed(lines) else "") + comment
    new = (comment, before | found | {"capability": capability})
    others = [(text, row) for text, row in rows if row["capability"] != capability]
    # The first row applies to every other device, so it stays the first, also if it is replaced.
    first = rows[0][1]["capability"] == capability
    return write(header, [new, *others] if first else [*others, new]), kept


def _commit(lines: list[Line]) -> str:
    versions: dict[str, Any] = named(lines, "card", "versions").get("versions", {})
    return str(versions.get("commit", "unknown"))


def wrong(lines: list[Line]) -> str | None:
    """Returns why a run must not be used, if a result of a kernel was not right; else None."""
    for line in lines:
        ours = line["step"] in ("selftest", "paths", "times") and not line["item"].endswith("| tuned")
        if ours and line["status"] in ("failed", "differs", "crashed", "hung"):
            return f"{line['step']}: {line['item']} {line['status']}: {line.get('said', '')}"
    return None


def section(runs: list[list[Line]]) -> str:
    """Returns the text between the markers of the documents: a table for each GPU model."""
    parts = []
    for lines in runs:
        device = named(lines, "card", "device").get("device", {})
        versions = named(lines, "card", "versions").get("versions", {})
        mark = "**REHEARSED: no GPU, and no figure means anything.** " if rehearsed(lines) else ""
        head = (
            f"{mark}{device.get('name', 'unknown')}, commit {_commit(lines)}, torch {versions.get('torch')}, Triton "
            f"{versions.get('triton')}, {versions.get('nvcc')}; `python -m benchmarks.gpu_quick`. Microseconds a call, "
            "replayed from a graph, M = 10, `inplace`. mix: selection by CUDA, merging by Triton. computed: the "
            "estimate of the path chosen. of ceiling: the floor's share of our best time."
        )
        rule = ["---"] * len(COLUMNS)
        rows = "\n".join("| " + " | ".join(row) + " |" for row in [list(COLUMNS), rule, *table(lines)])
        parts.append(f"{head}\n\n{rows}\n")
    return "\n".join(parts) if parts else "**No GPU kernel has run on a GPU yet.**\n"
