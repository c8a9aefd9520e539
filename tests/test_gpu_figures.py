"""The evaluation of results of benchmarks/gpu_quick.py: the last block, figures of the estimate, tables."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_figures
from benchmarks.quick import figures, report
from tests.command import ended

ROOT = Path(__file__).parents[1]


def test_the_block_has_40_lines_at_most():
    lines = [{"t": 1.0, "step": "paths", "item": str(n), "status": "failed", "said": "x" * 500} for n in range(100)]
    lines += shape_lines(9)
    block = report.block(lines)
    assert len(block) == report.MOST_LINES
    assert sum("keep" in line for line in block) == 9
    assert "... and" in "\n".join(block)
    assert max(map(len, block)) < 200


def shape_lines(shapes: int) -> list[report.Line]:
    lines = [{"t": 0.0, "step": "primitives", "item": "rates", "status": "ok", "rates": RATES}]
    for n in range(shapes):
        case = f"{n + 1}x576x1024 keep 64 bfloat16 inplace"
        common = {"t": 2.0, "step": "times", "status": "ok", "case": case}
        plan = {"path": "fused", "ctas_per_image": 16, "tile": 0, "estimated_us": 28.0}
        lines.append({**common, "item": f"{case} | plan", "plan": plan})
        for way, us in (("best any", 40.0), ("fused 16", 41.0), ("cluster 8 tile 64", 37.0)):
            lines.append({**common, "item": f"{case} | cuda {way}", "name": "cuda", "way": way, "us": us})
        lines += [{**common, "item": f"{case} | {name}", "name": name, "us": 55.0} for name in report.OTHERS]
    return lines


RATES = {"name": "X", "bandwidth": 3e12, "matrix": 8e14, "float32": 5e13, "memory": 8e10, "cache": 5e7}
RATES |= {"source": "s", "gap": 2e-6, "host": 5e-6}


def test_a_row_of_the_table():
    (row,) = report.table(shape_lines(1))
    assert row[:5] == ["1x576x1024 keep 64 bfloat16", "fused 16 tile 0", "40", "cluster 8 tile 64", "37"]
    assert row[5:9] == ["55", "55", "55", "28"]
    floor = report.floor_us("1x576x1024 keep 64 bfloat16 inplace", RATES)
    assert row[9] == f"{floor / 37:.0%}"


# ---- figures and documents


def primitive_lines(truth: figures.Figures, sms: int = 132) -> list[report.Line]:
    """Returns the lines that a run would write on a GPU with these figures."""
    lines: list[report.Line] = []

    def add(item: str, **found: Any) -> None:
        lines.append({"t": 0.0, "step": "primitives", "item": item, "status": "ok", **found})

    card = {"t": 0.0, "step": "card", "status": "ok"}
    lines.append({**card, "item": "device", "device": {"name": "NVIDIA X", "capability": [9, 0], "sms": sms}})
    lines[-1]["device"]["l2"] = truth["l2_bytes"]
    lines.append({**card, "item": "versions", "versions": {"commit": "abc", "torch": "2.11", "nvcc": "nvcc 13"}})
    add("rates", rates={**RATES, "gap": truth["launch_us"] / 1e6, "bandwidth": truth["memory_share"] * 1e6 * sms})
    for n in (4, 8, 16):
        add(f"step cluster {n}", step_us=truth["cluster_step_us"] * (1 + (n - 8) / 100), term_us=truth["term_us"])
    add(f"step cooperative {sms}", step_us=truth["cooperative_step_us"], term_us=1.0)
    for N in (576, 16384):
        add(f"s4 {N}", us=truth["lists_us"] + N * truth["s4_token_us"])
    add("picks cluster 8", pick_us=truth["pick_us"])
    for item, key, width in (
        ("sweep cluster 4 resident", "elements_per_sm", 1),
        ("sweep cluster 4 L2", "l2_per_sm", 2),
        (f"sweep cooperative {sms} L2", "l2_share", 2),
    ):
        add(item, rows=48, dim=1024, step_us=48 * 1024 * width / truth[key])
    for dtype, key in (("bfloat16", "flops_per_sm_16"), ("float32", "flops_per_sm_32")):
        for tile, slower in ((64, 1.5), (128, 1.0)):
            add(f"s5 9x9 keep 3 {dtype} tile {tile}", flops=1e9, us=slower * 1e9 / truth[key] / sms)
    for N, slower in ((9, 1.5), (90, 1.0)):
        add(f"triton s5 {N}x9 keep 3", flops_per_sm=1e7, us=slower * 1e7 / truth["triton_flops_per_sm_16"])
    return lines


def header() -> str:
    return (ROOT / gpu_figures.HEADER).read_text()


def test_figures_come_back():
    """The figures are those from which the run was made; figures that it did not measure are unchanged, and so are the
    rows of other models."""
    (_, before), *others = figures.read(header())
    truth = {name: value * (1 + n / 10) for n, (name, value) in enumerate(before.items())}
    text, kept = figures.updated(header(), primitive_lines(truth))
    assert kept == ["overlapped_launch_us", "group_us", "fill_us"]
    (comment, after), *rest = figures.read(text)
    assert rest == others
    assert f"NVIDIA X, measured at commit abc; left as it was: {', '.join(kept)}" in comment
    expected = truth | {name: before[name] for name in (*kept, "capability")}
    assert after == pytest.approx(expected, rel=2e-3)
    again, _ = figures.updated(text, primitive_lines(truth))
    assert again == text


def test_another_model_gets_a_row_of_its_own():
    there = figures.read(header())
    lines = primitive_lines(there[0][1])
    lines[0]["device"]["capability"] = [7, 9]
    text, _ = figures.updated(header(), lines)
    *first, (_, added) = figures.read(text)
    assert first == there
    assert added["capability"] == 79
    assert text.count("REHEARSED") == 0


def test_differences_that_noise_ate_are_not_figures():
    lines = primitive_lines(figures.read(header())[0][1])
    for line in lines:
        if "step_us" in line or "us" in line:
            line |= {name: -0.1 for name in ("step_us", "us") if name in line}
    text, kept = figures.updated(header(), lines)
    assert {"cluster_step_us", "elements_per_sm", "flops_per_sm_16", "triton_flops_per_sm_16"} <= set(kept)
    assert min(figures.read(text)[0][1].values()) > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_the_header_compiles_and_finds_the_row(tmp_path):
    lines = primitive_lines(figures.read(header())[0][1])
    lines[0]["device"]["capability"] = [7, 9]
    (tmp_path / "figures.cuh").write_text(figures.updated(header(), lines)[0])
    (tmp_path / "main.cpp").write_text(
        '#include <cstdio>\n#include "figures.cuh"\nusing namespace apet::cuda;\n'
        "static_assert(kFigures[0].capability == 90);\n"
        "int main() {\n"
        '  for (int n = 0; n < 130; n++) printf("%d\\n", figures_for(n).capability);\n'
        "}\n"
    )
    program = tmp_path / "main"
    subprocess.run(["g++", "-std=c++17", tmp_path / "main.cpp", "-o", program], check=True)
    done = subprocess.run([program], check=True, capture_output=True, text=True)
    found = [int(line) for line in done.stdout.split()]
    assert {n: found[n] for n in (12, 79, 80, 87, 90, 99, 100, 103, 110, 121)} == {
        **{12: 90, 79: 79, 80: 80, 87: 86, 90: 90, 99: 90},  # the first row where the generation has none
        **{100: 100, 103: 103, 110: 90, 121: 120},
    }
    rows = figures.read((tmp_path / "figures.cuh").read_text())
    assert found == [figures.row_of(rows, n)["capability"] for n in range(130)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Makes a copy of the files that gpu_figures writes, in place of the real ones."""
    root = tmp_path / "checkout"
    for name in (gpu_figures.HEADER, *gpu_figures.DOCUMENTS):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    monkeypatch.setattr(gpu_figures, "ROOT", root)
    return root


def written(folder: Path, lines: list[report.Line]) -> Path:
    folder.mkdir()
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"t": 1, "cut o')
    return folder


def run_lines() -> list[report.Line]:
    before = figures.read(header())[0][1]
    return [{"t": 0.0, "step": "run", "item": "command", "status": "ok"}, *primitive_lines(before), *shape_lines(3)]


def test_a_run_goes_into_the_header_and_the_documents(checkout, tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "run", run_lines())
    readme = checkout / "README.md"
    readme.write_text(f"By hand: never run on a GPU.\n{readme.read_text()}")
    monkeypatch.setattr(sys, "argv", ["it", str(folder)])
    gpu_figures.main()
    said = capsys.readouterr().out
    assert "a row for nvidia-x" in said
    assert "README.md:1: By hand: never run on a GPU.\n" in said
    assert "No GPU kernel has run on a GPU yet" not in said, "that line is between the markers, and replaced"
    assert "NVIDIA X, measured at commit abc" in (checkout / gpu_figures.HEADER).read_text()
    for name in gpu_figures.DOCUMENTS:
        text = (checkout / name).read_text()
        assert "NVIDIA X, commit abc, torch 2.11" in text
        assert text.count("| cluster 8 tile 64 | 37 |") == 3
        assert "REHEARSED" not in text
    before = {name: (checkout / name).read_text() for name in gpu_figures.DOCUMENTS}
    monkeypatch.setattr(sys, "argv", ["it"])
    gpu_figures.main()
    assert before == {name: (checkout / name).read_text() for name in gpu_figures.DOCUMENTS}


def test_a_rehearsal_never_enters_the_documents(checkout, tmp_path, monkeypatch, capsys):
    lines = run_lines()
    lines[0]["rehearsed"] = True
    folder, before = written(tmp_path / "run", lines), header()
    files = {p: p.read_text() for p in checkout.rglob("*") if p.is_file()}
    assert ended(gpu_figures, str(folder), monkeypatch=monkeypatch) == 2
    assert "is a rehearsal, whose figures have no meaning: give --rehearsed" in capsys.readouterr().err
    elsewhere = tmp_path / "elsewhere"
    monkeypatch.setattr(sys, "argv", ["it", str(folder), "--rehearsed", str(elsewhere)])
    gpu_figures.main()
    assert files == {p: p.read_text() for p in checkout.rglob("*") if p.is_file()}
    assert header() == before
    for name in (gpu_figures.HEADER, *gpu_figures.DOCUMENTS):
        assert "REHEARSED" in (elsewhere / name).read_text()


@pytest.mark.parametrize(("step", "item"), [("paths", "x | fused 4"), ("selftest", "cuda"), ("times", "x | triton")])
def test_a_run_with_a_wrong_result_is_rejected(checkout, tmp_path, monkeypatch, capsys, step, item):
    bad = {"t": 3.0, "step": step, "item": item, "status": "differs", "said": "other bits"}
    folder = written(tmp_path / "run", [*run_lines(), bad])
    assert ended(gpu_figures, str(folder), monkeypatch=monkeypatch) == 2
    assert f"{step}: {item} differs: other bits" in capsys.readouterr().err


def test_the_documents_hold_what_is_checked_in():
    body = figures.section(gpu_figures.runs(ROOT))
    for name in gpu_figures.DOCUMENTS:
        between = (ROOT / name).read_text().partition(gpu_figures.BEGIN)[2].partition(gpu_figures.END)[0]
        assert between == f"\n{body}", name
