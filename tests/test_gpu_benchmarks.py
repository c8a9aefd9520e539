"""benchmarks/gpu.py and benchmarks/tune.py without a GPU: errors, choices, and dry runs of everything."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import apet_kernels
from apet_kernels import available, dispatch, reference
from benchmarks import floors, gpu, tune
from benchmarks.lib import baselines, check, suite
from benchmarks.lib import device as devices
from benchmarks.lib.cases import BASIS, RIDGE, Case, gpu_cases
from benchmarks.lib.suite import Results, failures, load, save

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif("triton" not in apet_kernels.available_backends(), reason="Triton is not installed")


@pytest.mark.parametrize("main", [gpu.SUITE.main, tune.main], ids=["gpu", "tune"])
def test_without_a_gpu(main, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["it"])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "torch finds no GPU here" in said.err
    assert not said.out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["overwrite", "inplace"])
@pytest.mark.parametrize("baseline", [baselines.eager, baselines.tuned], ids=lambda baseline: baseline.__name__)
def test_baselines_run_where_the_tokens_lie(baseline, layout, dtype):
    """On another device than the CPU: an operation that mixes the two would raise an error."""
    with FakeTensorMode():
        x = torch.empty(2, 60, 32, dtype=dtype, device="meta")
        for start in (-1, 0):
            rows, indices = baseline(x, 24, BASIS, layout, start, RIDGE)
            assert (rows.shape, rows.dtype, rows.device) == ((2, 24, 32), dtype, x.device)
            assert (indices.shape, indices.device) == ((2, 24), x.device)


class FakeCuda:
    """The functions of torch.cuda that benchmarks.lib.device calls, in the order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        event = SimpleNamespace(
            record=lambda: self.log.append("record"),
            synchronize=lambda: self.log.append("synchronize"),
            elapsed_time=lambda end: 2.5,  # milliseconds
        )
        stream = SimpleNamespace(wait_stream=lambda other: self.log.append("wait"))
        properties = SimpleNamespace(
            name="Fake 1", L2_cache_size=2**25, total_memory=2**34, major=9, minor=0, multi_processor_count=7
        )
        fakes = {
            "is_available": lambda: True,
            "current_device": lambda: 0,
            "get_device_properties": lambda device: properties,
            "Event": lambda enable_timing: event,
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": lambda s: self.within("stream"),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.log.append("replay")),
            "graph": lambda g: self.within("capture"),
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        self.log.append(f"{name} begins")
        yield
        self.log.append(f"{name} ends")


@needs_triton
def test_the_clock_of_a_gpu(monkeypatch):
    """The clock calls the right functions of torch, which can be tested without a GPU."""
    cuda = FakeCuda(monkeypatch)
    gpu_device = devices.gpu()
    head = gpu_device.describe()
    assert head["device"] == "Fake 1 (sm_90a), 7 processors, 16 GiB, L2 32 MiB"
    assert "CUDA" in head["driver"] or "ROCm" in head["driver"]
    assert gpu_device.seconds(lambda: cuda.log.append("call")) == 2.5e-3
    assert cuda.log == ["record", "call", "record", "synchronize"]

    cuda.log.clear()
    replay = gpu_device.graphed(lambda: cuda.log.append("call") or "result")
    warm = ["wait", "stream begins", "call", "stream ends", "wait"]
    assert cuda.log == [*warm, "capture begins", "call", "capture ends"]
    assert replay() == "result"
    assert cuda.log[-1] == "replay"


def test_a_dry_run_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(apet_kernels, "available_backends", lambda: ("cpu",))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        devices.gpu(smoke=True)


def right(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.compress(x, 20, BASIS, layout="overwrite", select="fps", start=0, ridge=RIDGE)


def wrong(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, indices = right(x)
    return rows + 1, indices


def broken(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    raise RuntimeError("out of something\nand more")


def test_what_is_wrong_or_broken_is_named_and_not_timed(monkeypatch):
    case, rates = Case(1, 60, 32, 20, torch.float32, "overwrite"), dataclasses.asdict(floors.DEVICES[0])
    monkeypatch.setattr(gpu, "implementations", lambda *_: {"cuda": right, "eager": wrong, "tuned": broken})
    row = gpu.compare(case, devices.DryRun()).run(3)
    assert set(row.ms) == set(row.checked) == {"cuda host", "cuda graph"}
    assert set(row.failed) == {"eager", "tuned"}
    assert row.ours_failed == []
    assert {len(samples) for samples in row.seconds.values()} == {3}
    assert row.failed["tuned"] == "RuntimeError: out of something"
    assert row.failed["eager"].startswith("AssertionError: the overwritten slots do not hold the basis")
    assert row.checked["cuda graph"] > 0.5
    results = Results("gpu", {}, rates, [row])
    host, graph = gpu.sheets(results)[1:3]
    assert [line[host.columns.index("eager")] for line in host.lines] == ["-"]
    assert graph.lines[0][graph.columns.index("checked")] == f"{row.checked['cuda graph']:.0%}"
    assert len(failures(results)) == 2


def test_large_products_are_checked_where_the_result_is(monkeypatch):
    """A GPU multiplies in float64 what would take the CPU minutes."""
    where: list[str] = []
    monkeypatch.setattr(check, "check", lambda case, *tensors: where.extend(t.device.type for t in tensors[:-1]) or 1.0)
    large = Case(1, 16384, 3584, 4915, torch.bfloat16, "inplace")
    result = torch.empty(1, 4915, 3584, device="meta"), torch.empty(1, 4915, device="meta")
    check.judge(large, "cuda", torch.empty(1, 16384, 3584, device="meta"), result)
    assert where == ["meta"] * 3
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # a small one is copied to the CPU
        check.judge(Case(1, 576, 1024, 64, torch.bfloat16, "inplace"), "cuda", torch.empty(1, device="meta"), result)


@pytest.mark.parametrize("layout", ["overwrite", "inplace"])
def test_the_check_stays_where_the_result_is(layout):
    """If it made a tensor on the default device, which is another one here, the operations on it would fail."""
    case = Case(2, 60, 32, 20, torch.float32, layout)
    x = torch.randn(2, 60, 32, generator=torch.Generator().manual_seed(1))
    rows, indices = reference.compress(x, **case.op_arguments)
    with torch.device("meta"):
        assert check.check(case, x, rows, indices) > 0.5
        with pytest.raises(AssertionError, match=r"rows are not the mean of their tokens|do not hold the basis"):
            check.check(case, x, rows + 1, indices)


def test_a_backend_that_is_wrong_is_a_failure(monkeypatch):
    case = Case(1, 60, 32, 20, torch.float32, "overwrite")
    monkeypatch.setattr(gpu, "implementations", lambda *_: {"cuda": wrong, "eager": right})
    row = gpu.compare(case, devices.DryRun()).run(3)
    assert row.faster == {}
    assert [line.split(":")[0] for line in row.ours_failed] == ["cuda"]
    monkeypatch.setattr(gpu, "implementations", lambda *_: {"cuda": wrong, "eager": broken})
    row = gpu.compare(case, devices.DryRun()).run(3)
    assert row.ms == {}
    assert set(row.failed) == {"cuda", "eager"}


def test_the_backends_are_timed_as_the_op_calls_them(monkeypatch):
    """Not by `backend=`, which asks before every call whether the backend is usable."""
    called = []
    monkeypatch.setattr(apet_kernels, "available_backends", lambda: ("cpu", "triton", "cuda"))
    for name in ("triton", "cuda"):
        run = functools.partial(lambda name, op, x, **options: called.append((name, op, options)), name)
        monkeypatch.setattr(dispatch, f"run_{name}", run)
    monkeypatch.setattr(available, "check_usable", lambda *of: pytest.fail("it asks"))
    case = Case(1, 60, 32, 20, torch.float32, "overwrite")
    found = gpu.implementations(case, devices.DryRun())
    assert list(found)[:2] == ["triton", "cuda"], "before the baselines, whose capture may fail"
    for name in ("triton", "cuda"):
        found[name](torch.zeros(1, 60, 32))
    assert called == [(name, "compress", case.op_arguments) for name in ("triton", "cuda")]


def test_each_case_has_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    """A capture that fails in one case does not disturb the next; a process that dies is a failure of ours."""
    cases = [Case(1, 60, 32, 20, torch.float32, "overwrite"), Case(1, 50, 32, 20, torch.float32, "overwrite")]
    rates = dataclasses.asdict(floors.DEVICES[0])
    started: list[list[str]] = []

    def run(words: list[str], **_: object) -> SimpleNamespace:
        started.append(words)
        if str(cases[0]) in words:
            monkeypatch.setattr(gpu, "implementations", lambda *_: {"cuda": right})
            row = gpu.compare(cases[0], devices.DryRun()).run(3)
            save(Results("gpu", {}, rates, [row]), Path(words[words.index("--json") + 1]))
        return SimpleNamespace(returncode=-11, stderr="Fatal Python error\nSegmentation fault\n")

    monkeypatch.setattr(suite, "describe", dict)  # it runs git
    monkeypatch.setattr(suite.subprocess, "run", run)
    wanted = {"cases": lambda smoke: cases, "device": lambda smoke: devices.DryRun(), "rates": lambda device: rates}
    alone = dataclasses.replace(gpu.SUITE, **wanted, compare=lambda *_: pytest.fail("it is measured here"))
    monkeypatch.setattr(sys, "argv", ["it", "--smoke", "--json", str(tmp_path / "all.json")])
    with pytest.raises(SystemExit) as exit_:
        alone.main()
    assert exit_.value.code == 1
    first, second = load(tmp_path / "all.json").rows
    assert "cuda graph" in first.ms
    assert first.ours_failed == []
    assert second.ours_failed == ["apet process: it ended with -11: Segmentation fault"]
    assert [words[words.index("--only") + 1 :] for words in started] == [[str(case)] for case in cases]
    assert all({"--here", "--smoke"} <= set(words) for words in started)
    assert "Segmentation fault" in capsys.readouterr().out


@dataclass(frozen=True)
class Tiles:
    """The tiles of one kernel with one field."""

    topk_warps: int


def tuned(times: dict[int, list[float]], monkeypatch: pytest.MonkeyPatch) -> tune.Outcome:
    """Returns tune()'s outcome for 8 (in use), 4, 2 and 16, with these times in two cases; those without one fail."""
    group = tune.Group(("s4_topk",), ("topk_warps",), lambda wide, element: iter([(4,), (2,), (16,)]))
    in_use: list[int] = []

    @contextlib.contextmanager
    def using(tiles: Tiles) -> Iterator[None]:
        in_use[:] = [tiles.topk_warps]
        yield

    def judge_all(cases: list[Case], inputs: list[list[torch.Tensor]]) -> None:
        assert in_use[0] in times, "rows are wrong"

    monkeypatch.setattr(tune, "using", using)
    monkeypatch.setattr(tune, "judge_all", judge_all)
    monkeypatch.setattr(tune, "_time", lambda group, case, inputs, device: times[in_use[0]][case.B - 1])
    cases = [Case(B, 20, 8, 12, torch.float32, "overwrite") for B in (1, 2)]
    return tune.tune(group, cases, devices.DryRun(), Tiles(8), None)


@needs_triton
def test_the_fastest_over_all_cases_is_taken(monkeypatch):
    found = tuned({8: [4e-6, 4e-6], 4: [1e-6, 9e-6], 16: [3e-6, 4e-6]}, monkeypatch)
    assert (found.best, found.before, found.tried, found.passed_over) == ((4,), (8,), 4, 1)
    assert found.best_us == pytest.approx([1, 9])
    assert found.before_us == pytest.approx([4, 4])


@needs_triton
def test_tiles_in_use_that_fail_are_no_candidate(monkeypatch):
    with pytest.raises(RuntimeError, match="the tiles in use fail: AssertionError: rows are wrong"):
        tuned({4: [1e-6, 9e-6]}, monkeypatch)


@needs_triton
def test_every_entry_has_candidates():
    """Candidates are powers of 2, several for each group at the channels and dtypes that are measured."""
    from apet_kernels.triton_kernels.configs import Tiles

    for key in {tune._key(case) for case in gpu_cases()}:
        for group in tune.GROUPS:
            candidates = list(group.candidates(*key))
            assert 8 <= len(candidates) == len(set(candidates)) <= 250, f"{group.kernels} at {key}: {len(candidates)}"
            for values in candidates:
                sizes = dict(zip(group.fields, values, strict=True))
                assert all(n & (n - 1) == 0 for name, n in sizes.items() if not name.endswith("stages")), sizes
    assert sorted(name for group in tune.GROUPS for name in group.fields) == sorted(Tiles.__annotations__)


def dry_run(module: str, *options: str) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
@pytest.mark.slow
@pytest.mark.matrix
def test_dry_run_of_the_benchmark(tmp_path):
    """Every figure of one case, with interpreted kernels."""
    file = tmp_path / "gpu.json"
    said = dry_run("gpu", "--only", "float32", "--json", str(file))
    results = load(file)
    (row,) = results.rows
    kernels = ["s1_norms", "s1_s3_sweep", "s4_topk", "s5_assign", "s5_mean"]
    graphed = {f"{name} graph" for name in ("triton", "eager", "tuned", "compiled")}
    assert row.failed == {}
    assert (row.base, row.counts.keys()) == ("triton graph", {f"programs {name}" for name in kernels})
    until = {f"triton until {name}" for name in kernels}
    assert row.ms.keys() == graphed | {name.replace("graph", "host") for name in graphed} | {"published host"} | until
    (stages,) = [sheet for sheet in gpu.sheets(results) if sheet.title.startswith("Kernels")]
    assert [line[2] for line in stages.lines] == kernels
    for name in (*kernels, "DRY RUN", "x published", "of bound"):
        assert name in said


@needs_triton
@pytest.mark.slow
@pytest.mark.matrix
def test_dry_run_of_tuning():
    said = dry_run("tune", "--only", "float32")
    assert "('interpreter', 16, 4): Tiles(sweep_n=" in said.splitlines()[-1]
