"""benchmarks/gpu_quick.py without a GPU: rehearsals with injected faults, and the parts that rehearsals do not run."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys
import time
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
from benchmarks.quick import items, primitives, proofs, rehearsal, report, steps
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
    """Returns the paths of one call in float32 that a rehearsal runs (proofs.every_path) and that float32 has."""
    every = itertools.product((testing.CudaPath(), *testing.cuda_paths()), paths.calls(tiny=True))
    rehearsed = [way for way, each in list(every)[:: proofs.REHEARSED] if str(each) == wanted]
    return [str(way) for way in rehearsed if way.tile != 256 and way.tile_rows != 128]


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


def test_lines_are_on_the_disk_soon(tmp_path, monkeypatch):
    """Not one by one, which takes a disk longer than the items of `paths` take a GPU; but none waits for the next."""
    synced: list[int] = []
    monkeypatch.setattr(gpu_quick.os, "fsync", synced.append)
    recorder = gpu_quick.Recorder(tmp_path)
    monkeypatch.setattr(gpu_quick, "SYNC", 60.0)
    for n in range(50):
        recorder.write(step="card", item=str(n), status="ok")
    assert len(synced) == 2, "both files, with the first line"
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 50
    monkeypatch.setattr(gpu_quick, "SYNC", 0.0)
    read, write = os.pipe()
    os.write(write, b'{"begin": "long"}\n')
    run = gpu_quick.Run(tmp_path, 9, True, "", [], {}, recorder)
    with os.fdopen(read, "rb", buffering=0) as pipe:
        assert run.follow("card", pipe, [], time.monotonic() + 0.2, 9.0) == ("long", "step")
    os.close(write)
    assert len(synced) == 4, "while an item runs, once"


# ---- parts


def test_a_run_that_is_cut_off_has_some_ways_of_every_call(tmp_path, monkeypatch):
    """The two shapes, the three dtypes and all ops come in turns, and tokens are made once, not for every way."""
    monkeypatch.setattr(proofs, "prepare", lambda options: None)
    monkeypatch.setattr(proofs, "usable", lambda options: ["cuda"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    whole = [item.name for item in proofs.every_path(Options(out=str(tmp_path)))]
    assert whole[0] == "placed | cooperative"
    names = [name for name in whole if not name.startswith("placed")]
    calls = [str(each) for each in paths.calls()]
    ways = [name.split(" | ") for name in names if not name.endswith("float64")]
    assert len(ways) == len(calls) * (1 + len(testing.cuda_paths()))
    assert [each for each, _ in ways[: len(calls)]] == calls
    assert {way for _, way in ways[: len(calls)]} == {"best any"}, "by which all others are judged"
    assert {each for each, _ in ways[: 2 * len(calls)]} == set(calls)
    one = paths.calls()[0]
    assert one.tokens() is one.tokens() is dataclasses.replace(one, op="score").tokens()
    options = Options(out=str(tmp_path), rehearse=True)
    names = [item.name for item in proofs.every_path(options)]
    assert names[:3] == [f"placed | {path}" for path in ("cooperative", "cluster", "fused")]
    rehearsed = [name.split(" | ") for name in names[3:] if not name.endswith("float64")]
    assert {each for each, _ in rehearsed} == {str(each) for each in paths.calls(tiny=True)}
    assert {way for _, way in rehearsed} == {way for _, way in ways}


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
        f"#!/bin/sh\necho $PYTORCH_NO_CUDA_MEMORY_CACHING $* >> {folder}/calls\n"
        f"echo '{said}'\nsleep {seconds}\nexit {code}\n"
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


def test_a_sanitizer_that_does_not_end(tmp_path, monkeypatch):
    """It shows nothing, so it is not right, and the line tells how far it came."""
    from benchmarks.quick import worker

    compute_sanitizer(tmp_path, monkeypatch, "self-test\ncluster 4 tile 64 x 64 torch.float16", 0, seconds=60)
    monkeypatch.setattr(proofs, "SHORTEST", 0.5)
    sent: list[dict[str, Any]] = []
    worker.run("sanitizers", Options(out=str(tmp_path), seconds=1, only=("memcheck",)), sent.append)
    assert sent[-1]["status"] == "not run"
    assert sent[-1]["status"] not in report.RIGHT
    assert sent[-1]["said"] == "it did not end in 0 s; then it ran: cluster 4 tile 64 x 64 torch.float16"


def test_sanitizers_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr(proofs.shutil, "which", lambda name: None)
    for item in proofs.sanitizers(Options(out=str(tmp_path))):
        with pytest.raises(NotPossible, match="there is no compute-sanitizer"):
            item.run()


@simulated
def test_what_the_sanitizers_run(monkeypatch):
    """It finds no fault on the simulated GPU, and reports wrong results, on every path."""
    binding.stand_in(call.H100, monkeypatch.setattr)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda t: t)
    right, ran = dispatch.run_cuda, []

    def noted(name: str, x: torch.Tensor, *args: Any, **kwargs: Any) -> object:
        options = {option: value for option, value in kwargs.items() if option != "weights"}
        plan = apet_kernels.plan(x, *args, **options) if name == "compress" else None
        tile = plan and (plan.details["tile"], plan.details["tile_rows"] if plan.details["tile"] == 64 else 0)
        ran.append((name, plan and (plan.details["path"], tile), kwargs.get("refine")))
        return right(name, x, *args, **kwargs)

    monkeypatch.setattr(dispatch, "run_cuda", noted)
    with apet_kernels.use_backend("cuda"):
        for n, way in enumerate(sanitized.PATHS):  # every way, one dtype each
            narrow = way.tile == 256 or way.tile_rows == 128
            dtype = (torch.float16, torch.bfloat16)[n % 2] if narrow else apet_kernels.ops.DTYPES[n % 3]
            assert sanitized.forced(way, dtype) == []
    assert {name for name, *_ in ran} == {"compress", "compress_varlen", "merge"}
    in_rounds = {(path, tile) for path in ("cluster", "cooperative") for tile in sanitized.TILES}
    assert {plan for _, plan, refine in ran if refine} == in_rounds

    def wrong(name: str, *args: object, **kwargs: object) -> object:
        return torch.utils._pytree.tree_map(lambda t: t + 1, right(name, *args, **kwargs))

    monkeypatch.setattr(dispatch, "run_cuda", wrong)
    faults = sanitized.forced(sanitized.PATHS[1], torch.float16)
    found = [fault.split(": ") for fault in faults]
    assert {way for way, _ in found} == {"cluster 4 tile 64 x 64"}
    assert [said.split()[0] for _, said in found] == [*["compress_varlen"] * 3, *["merge"] * 2, "compress"]


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


@simulated
def test_picks_are_of_rounds(monkeypatch):
    """All that differs between the calls is the number of picks."""
    binding.stand_in(call.H100, monkeypatch.setattr)
    right, asked = dispatch.run_cuda, []
    noted = lambda op, x, *args, **options: asked.append((op, *args)) or right(op, x, *args, **options)  # noqa: E731
    monkeypatch.setattr(dispatch, "run_cuda", noted)
    found = primitives._picks(rehearsal.FakeClock(), Options(out="", rehearse=True), "cluster", 8)
    assert list(dict.fromkeys(asked)) == [("compress", 74, m) for m in found["basis"]]
    assert min(found["basis"]) > apet_kernels.ops.MAX_BASIS, "so they are picked in rounds"


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
