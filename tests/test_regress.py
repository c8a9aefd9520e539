"""benchmarks/regress.py finds injected regressions and nothing else, and reads results as they were written."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import hooks, regress, report, serving
from benchmarks.lib import suite
from benchmarks.lib.compare import Comparison, Row
from benchmarks.lib.device import Cpu
from benchmarks.lib.suite import Results


def row(case: int = 0, **ms: float) -> Row:
    """Returns a row as a quiet machine measures it."""
    times = {"product": 3.0, "sweeps": 1.0, "eager": 8.0, "kernel": 2.0} | ms
    faster = {name: t / times["kernel"] for name, t in times.items() if name != "kernel"}
    return Row({"case": case}, times, dict.fromkeys(times, 9), faster, dict.fromkeys(times, 0.05), {"kernel": 1.0}, {})


def results_of(*rows: Row, name: str = "stages") -> Results:
    return Results(name, {"commit": "c", "date": "today"}, {}, list(rows))


def worse(new: Row, old: Row | None = None) -> list[tuple[str, float]]:
    """Returns the regressions that the command reports."""
    found = regress.compare(results_of(old or row()), results_of(new)).regressed(regress.ALLOW)
    return [(what, round(times, 3)) for _, what, times in found]


def test_injected_regressions_are_found() -> None:
    assert worse(row()) == []
    assert worse(row(kernel=3.0)) == [("kernel", 1.5)]
    halves = {"merge": 1.5, "score": 0.5, "kernel avx2": 2.5}
    assert worse(row(**halves | {"merge": 2.4}), row(**halves)) == [("merge", 1.6)]
    assert worse(row(**halves | {"kernel avx2": 5.0}), row(**halves)) == [("kernel avx2", 2.0)]
    hungry, lean = (dataclasses.replace(row(), memory={"kernel": n, "eager": 9}) for n in (200, 100))
    assert worse(hungry, lean) == [("memory", 2.0)]
    assert worse(lean, hungry) == []


def test_injected_regressions_of_a_model_are_found() -> None:
    """The base of a model's suite is not our code. The hooks take longer against it and against the model's parts."""

    def prefill(apet: float, op: float) -> Row:
        times = {"uncompressed": 9.0, "apet 64": apet, "apet 64 op": op, "attainable 64": 4.0}
        faster = {name: t / 9.0 for name, t in times.items() if name != "uncompressed"}
        quiet = dict.fromkeys(times, 0.05)
        return Row({"case": 0}, times, dict.fromkeys(times, 3), faster, quiet, {}, {}, base="uncompressed")

    assert worse(prefill(4.0, 0.1), prefill(4.0, 0.1)) == []
    assert worse(prefill(6.0, 0.1), prefill(4.0, 0.1)) == [("apet 64", 1.5)]
    assert worse(prefill(4.0, 0.2), prefill(4.0, 0.1)) == [("apet 64 op", 2.0)]


@pytest.mark.parametrize("its", [hooks.SUITE, serving.SUITE], ids=lambda its: its.name)
def test_stored_results_of_models_are_compared(its: suite.Suite) -> None:
    found = suite.load(report.RESULTS / f"{its.name}.json")
    assert regress.compare(found, found).regressed(0.01) == []


def test_what_is_no_regression() -> None:
    assert worse(row(product=9.0, sweeps=3.0, eager=24.0, kernel=6.0)) == []  # a slower machine
    assert worse(row(eager=2.0)) == []  # a baseline that got faster
    assert worse(row(kernel=2.4)) == []  # within the allowed slowdown
    assert worse(row(kernel=1.0)) == []


def test_a_kernel_that_takes_longer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls move a fake clock. Both results are measured in turns, and the new kernel takes twice as long."""
    clock = [0.0]

    def takes(seconds: float) -> Callable[[object], None]:
        def run(_: object) -> None:
            clock[0] += seconds

        return run

    def measured(seconds: float) -> Row:
        calls = {"eager": takes(0.02), "kernel": takes(seconds)}
        return Comparison(Cpu(), {"case": 0}, calls, [0], dict.fromkeys(calls, 1.0), sums={}).run(5)

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert worse(measured(0.04), measured(0.02)) == [("kernel", 2.0)]


def test_cases_that_are_gone_or_noisy() -> None:
    loud = copy.deepcopy(row(1, kernel=9.0))
    loud.noise["kernel"] = 0.5
    outcome = regress.compare(results_of(row(), row(1), row(2)), results_of(row(), loud))
    assert (outcome.gone, outcome.noisy) == (["case 2"], ["case 1"])
    assert {case for case, _, _ in outcome.changes} == {"case 0"}
    with pytest.raises(ValueError, match="nothing to compare: 0 cases are gone, 1 too noisy"):
        regress.compare(results_of(row(1)), results_of(loud))
    with pytest.raises(ValueError, match="the baseline has results of stages, the other file of kept"):
        regress.compare(results_of(row()), results_of(row(), name="kept"))


@pytest.mark.parametrize(
    ("new", "code", "said"),
    [
        ([row()], 0, "0 are more than 1.25 times"),
        ([row(kernel=3.0)], 1, "1.50"),
        ([row(1)], 2, "nothing to compare: 1 cases are gone"),
        ([row(), row(1)], 0, "0 are more"),
    ],
)
def test_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    new: list[Row],
    code: int,
    said: str,
) -> None:
    files = [tmp_path / "old.json", tmp_path / "new.json"]
    for file, rows in zip(files, ([row()], new), strict=True):
        suite.save(results_of(*rows), file)
    monkeypatch.setattr(sys, "argv", ["benchmarks/regress.py", *map(str, files)])
    with pytest.raises(SystemExit) as ended:
        regress.main()
    assert ended.value.code == code
    assert said in " ".join("".join(capsys.readouterr()).split())


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = dataclasses.replace(row(), seconds={"kernel": [1.23456789, math.pi]}, memory={"kernel": 123456789})
    suite.save(results_of(written), tmp_path / "some.json")
    (read,) = suite.load(tmp_path / "some.json").rows
    assert read.seconds == {"kernel": [1.235, 3.142]}  # four digits
    assert (read.memory, read.case, read.ms) == (written.memory, written.case, written.ms)
