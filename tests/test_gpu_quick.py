"""benchmarks/gpu_quick.py without a GPU: rehearsals with planted faults, builds, and what is made of the results."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import apet_kernels
from apet_kernels import dispatch, testing
from benchmarks import gpu_carry, gpu_figures, gpu_quick, sanitized
from benchmarks.lib import mix, paths
from benchmarks.lib.cases import Case
from benchmarks.lib.check import judge
from benchmarks.quick import build, figures, items, primitives, proofs, report, steps
from benchmarks.quick.items import Item, NotPossible, Options
from tests.data import tokens
from tests.simt import binding, call
from tests.simt import build as simt_build
from tests.tools import sass

ROOT = Path(__file__).parents[1]
WHY_NOT_SIMULATED = simt_build.missing() or dispatch.why_not_cpu()
simulated = pytest.mark.skipif(WHY_NOT_SIMULATED is not None, reason=str(WHY_NOT_SIMULATED))
needs_triton = pytest.mark.skipif("triton" not in apet_kernels.available_backends(), reason="Triton is not installed")

# A machine has torch, Triton and numpy; transformers and pytest perhaps.
BLOCKED = ("rich", "typer", "pytest", "hypothesis", "skimage", "matplotlib", "PIL", "pybind11", "scipy", "av")
# As where they are not installed: they cannot be found, which is no error of who asks.
BLOCKER = f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED!r} else find(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
"""


def rehearse(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A rehearsal on a machine without the packages above."""
    blocker = out.parent / "blocker"
    blocker.mkdir(exist_ok=True)
    (blocker / "sitecustomize.py").write_text(BLOCKER)
    python_path = os.pathsep.join([str(blocker), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.gpu_quick", "--rehearse", "--out", str(out), *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- rehearsals


@pytest.mark.slow
@simulated
def test_planted_faults(tmp_path):
    """Each is a line, the run goes on, and its exit code counts it."""
    wanted = "1x30x13 keep 17 float32 inplace"
    planted = {"card: versions": "raise", "card: device": "crash", "card: nvidia-smi": "hang"}
    bits = [f"paths: {wanted} | {way}" for way in ways_rehearsed(wanted)]
    planted[bits[-1]] = "differ"
    only = ["card: ", "libraries: ", "paths: " + wanted + " |"]
    done = rehearse(
        tmp_path / "out",
        *("--seconds", "3000", "--only", *only),
        *("--plant", *(f"{item}={kind}" for item, kind in planted.items())),
        CUDACXX="/nowhere/nvcc",
    )
    lines = report.load(tmp_path / "out")
    found = {f"{line['step']}: {line['item']}": line for line in lines}
    status = {item: line["status"] for item, line in found.items()}
    assert status["card: versions"] == "failed"
    assert found["card: versions"]["said"] == "RuntimeError: planted"
    assert status["card: device"] == "crashed"
    assert found["card: device"]["said"] == "killed by SIGSEGV"
    assert status["card: nvidia-smi"] == "hung"
    assert status["libraries: CUDA"] == "failed"
    assert "there is no nvcc" in found["libraries: CUDA"]["said"]
    assert status["libraries: package"] == "ok"
    assert status[bits[-1]] == "differs"
    assert found[bits[-1]]["said"] == f"its bits are not those of {bits[0].removeprefix('paths: ')}"
    assert [status[item] for item in bits[:-1]] == ["ok"] * (len(bits) - 1)
    assert done.returncode == 5, done.stdout + done.stderr
    block = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert done.stdout.splitlines()[-len(block) :] == block
    assert len(block) <= report.MOST_LINES
    assert block[0].startswith("REHEARSED")
    assert sum(line.lstrip()[:1].isdigit() for line in block) == 5  # what was wrong, a line each


def ways_rehearsed(wanted: str) -> list[str]:
    """Of one call, those of which a rehearsal takes one in twelve (proofs.every_path)."""
    found, number = [], 0
    for each in paths.calls(tiny=True):
        for way in (testing.CudaPath(), *testing.cuda_paths()):
            number += 1
            if str(each) == wanted and number % 12 == 0:
                found.append(str(way))
    return found


@simulated
@needs_triton
@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path):
    done = rehearse(tmp_path / "out", "--seconds", "20000")
    lines = report.load(tmp_path / "out")
    wrong = [report.readable(line) for line in lines if line["status"] not in report.RIGHT]
    assert wrong == []
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line["step"] for line in lines} == {"run", *steps.STEPS}
    ran = {line["step"] for line in lines if line["status"] == "ok"}
    assert ran >= {*steps.STEPS} - {"tests", "sanitizers"}  # which need pytest, and compute-sanitizer on a GPU
    block = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert len(block) <= report.MOST_LINES
    assert sum("keep" in line for line in block) == 2
    assert block[-1].count("|") == len(report.COLUMNS) - 1
    elsewhere = tmp_path / "elsewhere"
    command = [sys.executable, "-m", "benchmarks.gpu_figures", str(tmp_path / "out"), "--rehearsed", str(elsewhere)]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in (gpu_figures.HEADER, *gpu_figures.DOCUMENTS):
        assert "REHEARSED" in (elsewhere / name).read_text()


def main(module: Any, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of its main()."""
    monkeypatch.setattr(sys, "argv", ["it", *arguments])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    return exit_.value.code


def test_command_lines_that_make_no_sense(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text("")
    for words, said in (
        (["--out", str(tmp_path)], "holds the results of another run"),
        (["--out", str(tmp_path / "new"), "--plant", "x=raise"], "--plant needs --rehearse"),
        (["--out", str(tmp_path / "new"), "--rehearse", "--plant", "x=burn"], "the kind 'burn' is none of raise"),
    ):
        assert main(gpu_quick, *words, monkeypatch=monkeypatch) == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    """After the card nothing else is tried."""
    assert main(gpu_quick, "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    lines = report.load(tmp_path / "out")
    assert [(x["step"], x["item"], x["status"]) for x in lines if x["status"] not in report.RIGHT] == [
        ("card", "device", "failed"),
        ("run", "the rest", "not run"),
    ]
    assert "torch finds no GPU here" in capsys.readouterr().out


def test_time_that_is_over(tmp_path):
    """Nothing more is begun, and each step says so."""
    (tmp_path / "out").mkdir()
    recorder = gpu_quick.Recorder(tmp_path / "out")
    run = gpu_quick.Run(tmp_path / "out", 0, True, "", [], {}, recorder)
    for name in gpu_quick.LIMITS:
        run.step(name)
    assert [(line["step"], line["status"]) for line in report.load(tmp_path / "out")] == [
        (name, "not run") for name in steps.STEPS
    ]
    assert list(gpu_quick.LIMITS) == list(steps.STEPS)


# ---- the last block


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
    """What a run would write on a card whose figures are these."""
    lines: list[report.Line] = []

    def add(item: str, **found: Any) -> None:
        lines.append({"t": 0.0, "step": "primitives", "item": item, "status": "ok", **found})

    card = {"t": 0.0, "step": "card", "status": "ok"}
    lines.append({**card, "item": "device", "device": {"name": "NVIDIA X", "capability": [9, 0], "sms": sms}})
    lines.append({**card, "item": "versions", "versions": {"commit": "abc", "torch": "2.11", "nvcc": "nvcc 13"}})
    add("rates", rates={**RATES, "gap": truth["launch_us"] / 1e6, "bandwidth": truth["memory_share"] * 1e6 * sms})
    for n in (4, 8, 16):
        add(f"step cluster {n}", step_us=truth["cluster_step_us"] * (1 + (n - 8) / 100), term_us=truth["term_us"])
    add(f"step cooperative {sms}", step_us=truth["cooperative_step_us"], term_us=1.0)
    add("s4 576", us=truth["lists_us"])
    for item, key, width in (
        ("sweep cluster 4 resident", "elements_per_sm", 1),
        ("sweep cluster 4 L2", "l2_per_sm", 2),
        (f"sweep cooperative {sms} L2", "l2_share", 2),
    ):
        add(item, rows=48, dim=1024, step_us=48 * 1024 * width / truth[key])
    for dtype, key in (("bfloat16", "flops_per_sm_16"), ("float32", "flops_per_sm_32")):
        for tile, slower in ((64, 1.5), (128, 1.0)):
            add(f"s5 9x9 keep 3 {dtype} tile {tile}", flops=1e9, us=slower * 1e9 / truth[key] / sms)
    return lines


def header() -> str:
    return (ROOT / gpu_figures.HEADER).read_text()


def test_figures_come_back():
    """The figures that a run was made of; what it did not measure stays."""
    ((_, before),) = figures.read(header())
    truth = {name: value * (1 + n / 10) for n, (name, value) in enumerate(before.items())}
    text, kept = figures.updated(header(), primitive_lines(truth))
    assert kept == ["overlapped_launch_us", "fill_us"]
    ((comment, after),) = figures.read(text)
    assert "NVIDIA X, measured at commit abc; left as it was: overlapped_launch_us, fill_us" in comment
    expected = truth | {name: before[name] for name in (*kept, "capability")}
    assert after == pytest.approx(expected, rel=2e-3)
    again, _ = figures.updated(text, primitive_lines(truth))
    assert again == text


def test_another_card_gets_a_row_of_its_own():
    ((comment, before),) = figures.read(header())
    lines = primitive_lines(before)
    lines[0]["device"]["capability"] = [10, 0]
    text, _ = figures.updated(header(), lines)
    (first, second) = figures.read(text)
    assert first == (comment, before)
    assert second[1]["capability"] == 100
    assert text.count("REHEARSED") == 0


def test_differences_that_noise_ate_are_not_figures():
    ((_, before),) = figures.read(header())
    lines = primitive_lines(before)
    for line in lines:
        if "step_us" in line or "us" in line:
            line |= {name: -0.1 for name in ("step_us", "us") if name in line}
    text, kept = figures.updated(header(), lines)
    assert {"cluster_step_us", "elements_per_sm", "flops_per_sm_16"} <= set(kept)
    ((_, after),) = figures.read(text)
    assert min(after.values()) > 0


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no g++")
def test_the_header_compiles_and_finds_the_row(tmp_path):
    ((_, before),) = figures.read(header())
    lines = primitive_lines(before)
    lines[0]["device"]["capability"] = [8, 0]
    (tmp_path / "figures.cuh").write_text(figures.updated(header(), lines)[0])
    (tmp_path / "main.cpp").write_text(
        '#include "figures.cuh"\nusing namespace apet::cuda;\n'
        "static_assert(kFigures[1].capability == 80);\n"
        "int main() { return figures_for(80).capability == 80 && figures_for(121).capability == 90 ? 0 : 1; }\n"
    )
    program = tmp_path / "main"
    subprocess.run(["g++", "-std=c++17", tmp_path / "main.cpp", "-o", program], check=True)
    subprocess.run([program], check=True)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files that gpu_figures writes, in the place of the real ones."""
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
    ((_, before),) = figures.read(header())
    return [{"t": 0.0, "step": "run", "item": "command", "status": "ok"}, *primitive_lines(before), *shape_lines(3)]


def test_a_run_goes_into_the_header_and_the_documents(checkout, tmp_path, monkeypatch, capsys):
    folder = written(tmp_path / "run", run_lines())
    monkeypatch.setattr(sys, "argv", ["it", str(folder)])
    gpu_figures.main()
    assert "a row for nvidia-x" in capsys.readouterr().out
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
    assert main(gpu_figures, str(folder), monkeypatch=monkeypatch) == 2
    assert "is a rehearsal, whose figures mean nothing: give --rehearsed" in capsys.readouterr().err
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
    assert main(gpu_figures, str(folder), monkeypatch=monkeypatch) == 2
    assert f"{step}: {item} differs: other bits" in capsys.readouterr().err


def test_the_documents_hold_what_is_checked_in():
    body = figures.section(gpu_figures.runs(ROOT))
    for name in gpu_figures.DOCUMENTS:
        between = (ROOT / name).read_text().partition(gpu_figures.BEGIN)[2].partition(gpu_figures.END)[0]
        assert between == f"\n{body}", name


# ---- libraries


def test_libraries_of_other_sources_are_not_taken(tmp_path):
    (tmp_path / "carried").mkdir()
    with pytest.raises(RuntimeError, match="holds no manifest"):
        build.take(tmp_path / "carried", tmp_path / "into")
    manifest = build.Built("CMake and ninja", "90a-real", "0123456789abcdef", list(build.CUDA))
    for name in build.CUDA:
        (tmp_path / "carried" / name).write_text("not really")
    for sources, fine in ((manifest.sources, False), (build.sources(), True)):
        kept = dataclasses.replace(manifest, sources=sources)
        (tmp_path / "carried" / build.MANIFEST).write_text(json.dumps(vars(kept)))
        archive = tmp_path / "carried.tar"
        with tarfile.open(archive, "w") as packed:
            for path in (tmp_path / "carried").iterdir():
                packed.add(path, path.name)
        for place in (tmp_path / "carried", archive):
            into = tmp_path / f"into-{fine}-{place.suffix}"
            if fine:
                assert build.take(place, into).how == "carried; built by CMake and ninja"
                assert {p.name for p in into.iterdir()} == {*build.CUDA, build.MANIFEST}
            else:
                with pytest.raises(RuntimeError, match="are of other sources"):
                    build.take(place, into)


def test_what_nvcc_is_told():
    assert build.gencode("80-real;90") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


def test_the_package_has_no_libraries_of_the_checkout(tmp_path):
    build.make_package(tmp_path / "package")
    copied = {p.relative_to(tmp_path / "package").as_posix() for p in (tmp_path / "package").rglob("*.*")}
    assert "apet_kernels/triton_kernels/s5_mean.py" in copied
    assert not any(name.endswith(".so") for name in copied)


needs_nvcc = pytest.mark.skipif(sass.nvcc() is None, reason="there is no nvcc")


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["cmake", "direct"])
def test_libraries_are_built_and_bind_to_torch_alone(tmp_path, monkeypatch, direct):
    """Every symbol that the binding lacks is torch's, the CUDA library's, or the system's."""
    if direct:
        monkeypatch.setattr(build, "missing_for_cmake", lambda: "cmake")
    elif lacks := build.missing_for_cmake():
        pytest.skip(f"there is no {lacks}")
    archive, into = tmp_path / "carried.tar", tmp_path / "into"
    monkeypatch.setattr(sys, "argv", ["it", "--out", str(archive), "--archs", "90-real"])
    gpu_carry.main()
    built = build.take(archive, into)
    assert ("directly" in built.how) == direct
    assert set(built.libraries) == {*build.CUDA, *(() if direct else build.CPU)}
    assert not list(into.glob("*objects*"))

    def symbols(path: Path, kind: str) -> set[str]:
        said = subprocess.check_output(["nm", "-D", kind, path], text=True)
        return {line.split()[-1].partition("@")[0] for line in said.splitlines() if " w " not in line}

    torch_libraries = [Path(torch.__file__).parent / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    ours = [into / name for name in built.libraries if name != "libapet_cuda_torch.so"]
    there = set().union(*(symbols(path, "--defined-only") for path in (*torch_libraries, *ours)))
    lacks = {
        n for n in symbols(into / "libapet_cuda_torch.so", "--undefined-only") if re.match(r"apet|_ZN4apet|aoti", n)
    }
    # A torch without CUDA has neither of the two.
    assert lacks - there <= {"aoti_torch_get_current_cuda_stream", "aoti_torch_create_cuda_guard"}
    assert "apet_cuda_run" in lacks


# ---- parts


@simulated
@needs_triton
@pytest.mark.parametrize("layout", ["inplace", "overwrite"])
def test_the_mix_is_right(monkeypatch, layout):
    for name, stand_in in binding.stand_ins(call.H100).items():
        monkeypatch.setattr(dispatch, name, stand_in)
    case = Case(2, 40, 16, 20, torch.float32, layout)
    x = tokens(2, 40, 16, kind="clustered", seed=3)
    with torch.inference_mode():
        assert judge(case, "mix", x, mix.compress(x, **case.arguments)) > 0.5


def compute_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, seconds: int = 0) -> None:
    """A program of that name that notes what it is called with."""
    program = folder / "compute-sanitizer"
    program.write_text(
        f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $* >> {folder}/calls\nsleep {seconds}\n"
        f"echo '{said}'\nexit {code}\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize(
    ("said", "code", "outcome"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "ERROR SUMMARY: 0 errors"),
        ("========= RACECHECK SUMMARY: 1 hazard displayed", 99, RuntimeError("RACECHECK SUMMARY: 1 hazard displayed")),
        ("killed", 1, NotPossible("ended with 1 and no summary: killed")),
        ("Error: Device not supported\n========= ERROR SUMMARY: 1 error", 1, NotPossible("Device not supported")),
    ],
)
def test_sanitizers(tmp_path, monkeypatch, said, code, outcome):
    compute_sanitizer(tmp_path, monkeypatch, said, code)
    found = list(proofs.sanitizers(Options(out=str(tmp_path))))
    assert [item.name for item in found] == list(proofs.SANITIZERS)
    if isinstance(outcome, str):
        assert found[0].run() == {"said": outcome}
    else:
        with pytest.raises(type(outcome), match=str(outcome)):
            found[0].run()
    program = f"--error-exitcode 99 {sys.executable} -m benchmarks.sanitized"
    assert (tmp_path / "calls").read_text() == f"1 --tool memcheck {program}\n"


def test_sanitizers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs.shutil, "which", lambda name: None)
    for item in proofs.sanitizers(Options(out=str(tmp_path))):
        with pytest.raises(NotPossible, match="there is no compute-sanitizer"):
            item.run()


@simulated
def test_what_the_sanitizers_run(monkeypatch):
    """On the simulated GPU, right; and a wrong result is said."""
    for name, stand_in in binding.stand_ins(call.H100).items():
        monkeypatch.setattr(dispatch, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda t: t)
    for dtype in apet_kernels.ops.DTYPES:
        assert sanitized.ragged_and_given(dtype) == []
    right = dispatch.run_cuda

    def wrong(name: str, *args: object, **kwargs: object) -> object:
        return torch.utils._pytree.tree_map(lambda t: t + 1, right(name, *args, **kwargs))

    monkeypatch.setattr(dispatch, "run_cuda", wrong)
    faults = sanitized.ragged_and_given(torch.float16)
    assert [fault.split()[0] for fault in faults] == ["compress_varlen"] * 3 + ["merge"] * 2


def test_after_a_fault_of_the_device_the_process_ends(tmp_path, monkeypatch):
    """After an illegal access every later call of the process fails: the items that are left get another process."""
    from benchmarks.quick import worker

    def three(options: Options) -> Iterator[Item]:
        yield Item("first", lambda: None)
        yield Item("second", lambda: 1 / 0)
        yield Item("third", lambda: None)

    monkeypatch.setitem(steps.STEPS, "card", three)
    sent: list[dict[str, Any]] = []
    worker.run("card", Options(out=str(tmp_path)), sent.append)
    assert [line["status"] for line in sent if "end" in line] == ["ok", "failed", "ok"]
    monkeypatch.setattr(items, "device_works", lambda options: False)
    sent.clear()
    with pytest.raises(SystemExit, match="does not answer any more"):
        worker.run("card", Options(out=str(tmp_path)), sent.append)
    assert [line["status"] for line in sent if "end" in line] == ["ok", "failed"]
    worker.run("card", Options(out=str(tmp_path), done=("first", "second")), sent.append)
    assert sent[-1]["end"] == "third"


def test_the_profiler(monkeypatch):
    """Kernels by their names, a call; where it sees none, that is said."""
    events: list[SimpleNamespace] = []
    found = SimpleNamespace(key_averages=lambda: events)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Profile:
        def __init__(self, activities: object) -> None: ...
        def __enter__(self) -> SimpleNamespace:
            return found

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    with pytest.raises(NotPossible, match="sees no kernel"):
        primitives._kernels_us(Options(out=""), lambda: None)
    total = 50.0 * items.ROUNDS
    events += [SimpleNamespace(key="void s5_merge<half>", device_time_total=total)] * 2
    events += [SimpleNamespace(key="memset", device_time_total=total)]
    assert primitives._kernels_us(Options(out=""), lambda: None) == {"s5_merge": 100.0}
