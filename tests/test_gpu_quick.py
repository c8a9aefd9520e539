"""benchmarks/gpu_quick.py without a GPU: rehearsals with injected faults, and the parts that rehearsals do not run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import apet_kernels
from apet_kernels import available, dispatch, testing
from benchmarks import gpu_figures, gpu_quick, sanitized
from benchmarks.lib import mix, paths
from benchmarks.lib.cases import Case
from benchmarks.lib.check import judge
from benchmarks.quick import items, primitives, proofs, report, steps
from benchmarks.quick.items import Item, NotPossible, Options
from tests.command import ended
from tests.data import tokens
from tests.simt import binding, call
from tests.simt import build as simt_build

ROOT = Path(__file__).parents[1]
WHY_NOT_SIMULATED = simt_build.missing() or available.why_not_cpu()
simulated = pytest.mark.skipif(WHY_NOT_SIMULATED is not None, reason=str(WHY_NOT_SIMULATED))
needs_triton = pytest.mark.skipif("triton" not in apet_kernels.available_backends(), reason="Triton is not installed")

# Packages that a machine with a GPU may lack. It has torch, Triton and numpy, and perhaps transformers and pytest.
BLOCKED = ("rich", "typer", "pytest", "hypothesis", "skimage", "matplotlib", "PIL", "pybind11", "scipy", "av")
# Code that makes these packages look not installed: importlib does not find them.
BLOCKER = f"""
import importlib.machinery
find = importlib.machinery.PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED!r} else find(name, path, target)

importlib.machinery.PathFinder.find_spec = find_spec
"""


def rehearse(out: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a rehearsal on a machine without the packages above."""
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
def test_injected_faults(tmp_path):
    """Each fault is one line, the run continues, and the exit code counts it."""
    wanted = "1x30x13 keep 17 float32 inplace"
    injected = {"card: versions": "raise", "card: device": "crash", "card: nvidia-smi": "hang"}
    bits = [f"paths: {wanted} | {way}" for way in ways_rehearsed(wanted)]
    injected[bits[-1]] = "differ"
    only = ["card: ", "libraries: ", "paths: " + wanted + " |"]
    done = rehearse(
        tmp_path / "out",
        *("--seconds", "3000", "--only", *only),
        *("--inject", *(f"{item}={kind}" for item, kind in injected.items())),
        CUDACXX="/nowhere/nvcc",
    )
    lines = report.load(tmp_path / "out")
    found = {f"{line['step']}: {line['item']}": line for line in lines}
    status = {item: line["status"] for item, line in found.items()}
    assert status["card: versions"] == "failed"
    assert found["card: versions"]["said"] == "RuntimeError: injected"
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
    assert sum(line.lstrip()[:1].isdigit() for line in block) == 5  # one line for each fault


def ways_rehearsed(wanted: str) -> list[str]:
    """Returns the paths of one call that a rehearsal runs, one in twelve (proofs.every_path)."""
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
    assert ran >= {*steps.STEPS} - {"tests", "sanitizers"}  # these need pytest, and compute-sanitizer on a GPU
    block = (tmp_path / "out/summary.txt").read_text().splitlines()
    assert len(block) <= report.MOST_LINES
    assert sum("keep" in line for line in block) == 2
    assert block[-1].count("|") == len(report.COLUMNS) - 1
    elsewhere = tmp_path / "elsewhere"
    command = [sys.executable, "-m", "benchmarks.gpu_figures", str(tmp_path / "out"), "--rehearsed", str(elsewhere)]
    subprocess.run(command, cwd=ROOT, check=True)
    for name in (gpu_figures.HEADER, *gpu_figures.DOCUMENTS):
        assert "REHEARSED" in (elsewhere / name).read_text()


def test_command_lines_that_make_no_sense(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text("")
    for words, said in (
        (["--out", str(tmp_path)], "holds the results of another run"),
        (["--out", str(tmp_path / "new"), "--inject", "x=raise"], "--inject needs --rehearse"),
        (["--out", str(tmp_path / "new"), "--rehearse", "--inject", "x=burn"], "the kind 'burn' is none of raise"),
    ):
        assert ended(gpu_quick, *words, monkeypatch=monkeypatch) == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(tmp_path, monkeypatch, capsys):
    """After the step `card` no other step runs."""
    assert ended(gpu_quick, "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 2
    lines = report.load(tmp_path / "out")
    assert [(x["step"], x["item"], x["status"]) for x in lines if x["status"] not in report.RIGHT] == [
        ("card", "device", "failed"),
        ("run", "the rest", "not run"),
    ]
    assert "torch finds no GPU here" in capsys.readouterr().out


def test_time_that_is_over(tmp_path):
    """No step begins, and each is recorded as not run."""
    (tmp_path / "out").mkdir()
    recorder = gpu_quick.Recorder(tmp_path / "out")
    run = gpu_quick.Run(tmp_path / "out", 0, True, "", [], {}, recorder)
    for name in gpu_quick.LIMITS:
        run.step(name)
    assert [(line["step"], line["status"]) for line in report.load(tmp_path / "out")] == [
        (name, "not run") for name in steps.STEPS
    ]
    assert list(gpu_quick.LIMITS) == list(steps.STEPS)


# ---- parts


@simulated
@needs_triton
@pytest.mark.parametrize("layout", ["inplace", "overwrite"])
def test_the_mix_is_right(monkeypatch, layout):
    binding.stand_in(call.H100, monkeypatch.setattr)
    case = Case(2, 40, 16, 20, torch.float32, layout)
    x = tokens(2, 40, 16, kind="clustered", seed=3)
    with torch.inference_mode():
        assert judge(case, "mix", x, mix.compress(x, **case.arguments)) > 0.5


def compute_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, said: str, code: int, seconds: int = 0) -> None:
    """Makes a program with the name compute-sanitizer that records its arguments."""
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
    """It finds no fault on the simulated GPU, and reports wrong results."""
    binding.stand_in(call.H100, monkeypatch.setattr)
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
    """After an illegal access every later call of the process fails, so another process runs the remaining items."""
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


@needs_triton
def test_the_work_of_a_product(monkeypatch):
    """The operations of one multiprocessor, by the kernel's tiles: 28 dropped tokens make two of 16, 12 targets one."""
    options = Options(out="", rehearse=True)
    found = primitives._triton_s5_alone(options, 4096, 3584, 1229)
    assert found == {"flops_per_sm": 2 * 16 * 16 * 24, "us": 10.0}
    monkeypatch.setattr(primitives, "_sms", lambda options: 1)
    assert primitives._triton_s5_alone(options, 4096, 3584, 1229)["flops_per_sm"] == 2 * 2 * 16 * 16 * 24


def test_the_profiler(monkeypatch):
    """It returns the time of each kernel by name, per call, or an error if it records no kernel."""
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
