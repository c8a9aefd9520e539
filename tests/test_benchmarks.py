"""The benchmarks run on small sizes, their checks find faults, and the report shows the measured values."""

from __future__ import annotations

import itertools
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import growth, kept, ragged, report, stages
from benchmarks.lib import ceilings, compare, suite
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.compare import Comparison, Timed
from benchmarks.lib.device import Cpu
from benchmarks.lib.suite import Results
from tests.rates import RATES

SUITES = {one.name: one for one in report.SUITES_OF_OPS if one.name != "gpu"}  # test_gpu_benchmarks.py tests that one
PAGE = report.DOCS / "benchmarks.md"
# The smoke cases of a suite that run here. The CPU's other layouts, and growth in bfloat16, take too long.
ONLY = {"cpu": ["inplace"], "growth": ["float32"]}


@pytest.mark.parametrize(
    "name",
    [
        # `cpu` compiles a baseline for half a minute; `growth` starts a process for every measurement of memory.
        pytest.param(name, marks={"cpu": [pytest.mark.slow], "growth": [pytest.mark.rest]}.get(name, ()))
        for name in SUITES
    ],
)
def test_every_suite_runs_and_is_reported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small sizes, the suite checks what it times, its results can be read, and its section is written."""
    its, only = SUITES[name], ONLY.get(name, [])
    section = "cpu-inplace" if name == "cpu" else name
    file = tmp_path / f"{section}.json"
    monkeypatch.setattr(ceilings, "measure", lambda: RATES)
    monkeypatch.setattr(suite, "THREADS", 1)  # two would wait for each other when other tests use the cores
    words = ["--smoke", *(["--only", *only] if only else []), "--json", str(file)]
    monkeypatch.setattr(sys, "argv", [f"benchmarks/{name}.py", *words])
    its.main()
    found = suite.load(file)
    assert (found.suite, found.rates) == (name, RATES)
    assert found.head.keys() >= {"machine", "commit", "command", "date", "ceilings"}
    chosen = [case for case in its.cases(True) if all(text in str(case) for text in only)]
    assert [row.case for row in found.rows] == [case.fields() for case in chosen]
    for row in found.rows:
        assert {"kernel", "reference cost", "product", "sweeps"} <= row.ms.keys()
        assert {n: len(spent) for n, spent in row.seconds.items()}.items() <= row.rounds.items()
        assert row.rounds["kernel"] == suite.SMOKE_ROUNDS
        assert row.checked["kernel"] > 0.5
        assert row.ms["kernel"] == pytest.approx(1e3 * sorted(row.seconds["kernel"])[1], rel=1e-3)

    for page in report.PAGES:
        shutil.copy(report.DOCS / page, tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks/report.py", "--results", str(tmp_path), "--docs", str(tmp_path)])
    report.main()
    sections = {its.file: _between((tmp_path / its.page).read_text(), its.file) for its in report.SECTIONS}
    written = sections.pop(section)
    assert set(sections.values()) == {f"\n{report.NONE}"}
    assert "- machine: " in written
    for sheet in its.sheets(found):
        assert f"### {sheet.title}\n" in written
        assert all(len(line) == len(sheet.columns) for line in sheet.lines), sheet.title
    pictures = {path.name: path.read_bytes()[:4] for path in tmp_path.glob("*.png")}
    assert pictures == ({f"benchmarks-{name}.png": b"\x89PNG"} if name in ("kept", "growth") else {})
    assert all(f"]({picture})" in written for picture in pictures)


def _between(text: str, section: str) -> str:
    return text.partition(f"<!-- {section}:begin -->")[2].partition(f"<!-- {section}:end -->")[0]


@pytest.mark.parametrize("name", report.PAGES)
def test_a_page_is_what_the_results_say(name: str) -> None:
    page = report.DOCS / name
    assert report.text(page, report.RESULTS) == page.read_text(), (
        f"docs/{name} is not what `python -m benchmarks.report` writes"
    )


def test_the_pictures_are_there() -> None:
    for section in report.SECTIONS:
        if section.draw and (report.RESULTS / f"{section.file}.json").exists():
            assert section.picture(report.DOCS).exists()


def test_results_of_another_suite_raise(tmp_path: Path) -> None:
    suite.save(Results("ragged", {}, {}, []), tmp_path / "kept.json")
    with pytest.raises(ValueError, match=r"kept\.json has results of ragged, not of kept"):
        report.body(report.SECTIONS[0], tmp_path)


def test_the_page_has_the_cost_model() -> None:
    model = (growth.__doc__ or "").partition("model:\n\n")[2].partition("\n\nThe rates")[0]
    assert len(model.splitlines()) == 5
    for line in model.splitlines()[:4]:
        assert line in PAGE.read_text()


# ---- turns


def test_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order rotates, the kernel is last, every call gets the next input, ratios are of one round."""
    clock, called = [0.0], []
    takes = {
        "a": itertools.cycle([3.0, 30.0, 3.0]),
        "b": itertools.cycle([5.0]),
        "kernel": itertools.cycle([1.0, 10.0, 1.0]),
    }

    def call(name: str) -> Callable[[int], None]:
        def run(x: int) -> None:
            called.append((name, x))
            clock[0] += next(takes[name])

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    comparison = Comparison(
        Cpu(), {}, {n: call(n) for n in takes}, range(100), dict.fromkeys(takes, 1.0), sums={"both": ("a", "b")}
    )
    row = comparison.run(3)
    assert called == list(zip(["a", "b", "kernel", "b", "a", "kernel", "a", "b", "kernel"], range(9), strict=True))
    assert row.faster == {"a": 3.0, "b": 5.0, "both": 8.0}
    assert row.ms == {"a": 3000.0, "b": 5000.0, "kernel": 1000.0, "both": 8000.0}


def test_a_call_may_take_the_time_itself() -> None:
    """The times that a call returns are used, under its names; ratios are to the base."""
    parts = iter([0.2, 0.4, 0.3])
    calls = {
        "apet 64": lambda _: Timed({"apet 64": (prefill := next(parts)), "apet 64 op": prefill / 10}),
        "uncompressed": lambda _: Timed({"uncompressed": 1.0}),
    }
    shares = dict.fromkeys(calls, 1.0)
    row = Comparison(Cpu(), {}, calls, [None], shares, base="uncompressed", sums={}, counts={"64": 5.0}).run(3)
    assert list(row.ms) == ["apet 64", "apet 64 op", "uncompressed"]
    assert row.ms == pytest.approx({"apet 64": 300.0, "apet 64 op": 30.0, "uncompressed": 1000.0})
    assert row.faster == pytest.approx({"apet 64": 0.3, "apet 64 op": 0.03})
    assert (row.base, row.counts, row.rounds["apet 64 op"], row.worst_noise) == ("uncompressed", {"64": 5.0}, 3, 0.0)


def test_what_takes_too_long_sits_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def takes(seconds: float) -> Callable[[object], None]:
        def run(_: object) -> None:
            clock[0] += seconds

        return run

    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    calls = {"slow": takes(compare.SECONDS), "less": takes(compare.SECONDS / 5), "kernel": takes(1.0)}
    rounds = Comparison(Cpu(), {}, calls, [0], dict.fromkeys(calls, 1.0), sums={}).run(9).rounds
    assert rounds == {"slow": 3, "less": 5, "kernel": 9}


def test_a_ring_exceeds_the_cache_and_shares_no_memory() -> None:
    """The cache is set to 12 MiB, since a processor may have a hundred times as much, which takes minutes to fill."""
    device = Cpu()
    device.cache_bytes = cache = 12 * 2**20
    case = Case(4, 2048, 256, 200, torch.float32, "inplace")
    found = compare.ring(lambda seed: tokens(case, seed), device)
    assert sum(x.nbytes for x in found) >= 2 * cache
    assert len({x.data_ptr() for x in found}) == len(found) >= 3
    assert not torch.equal(found[0], found[1])


# ---- checks


CASE = Case(2, 64, 32, 24, torch.float32, "inplace")


@pytest.mark.parametrize(
    ("name", "spoil", "said"),
    [
        ("norm", lambda rows, at: (rows[:, :-1], at), "tokens have shape"),
        ("norm", lambda rows, at: (rows, at.flip(1)), "indices do not ascend"),
        ("norm", lambda rows, at: (rows, at + 64), "an index is"),
        ("norm", lambda rows, at: (rows * float("nan"), at), "a token is not finite"),
        ("norm", lambda rows, at: (rows + 1, at), "48 rows are not tokens of x"),
        ("tome", lambda rows, at: (rows, at), "0 rows are not tokens of x"),
    ],
)
def test_other_methods_are_checked(name: str, spoil: Callable, said: str) -> None:
    x = tokens(CASE, 0)
    at = torch.arange(24).expand(2, 24)
    kept.check_other("norm", CASE, x, x[:, :24], at)
    with pytest.raises(AssertionError, match=said):
        kept.check_other(name, CASE, x, *spoil(x[:, :24], at))


def test_stages_are_checked() -> None:
    x = tokens(CASE, 0)

    def whole(pair: stages.Pair) -> stages.Pair:
        return torch.ops.apet.compress(pair[0], **CASE.op_arguments)

    def score(pair: stages.Pair) -> stages.Pair:
        return torch.ops.apet.score(pair[0])

    def merge(pair: stages.Pair) -> torch.Tensor:
        return torch.ops.apet.merge(*pair)

    assert stages.check(CASE, "kernel", x, whole, {"score": score, "merge": merge}) > 0.5
    with pytest.raises(AssertionError, match=r"score, .*: it ranks other tokens"):
        stages.check(CASE, "kernel", x, whole, {"score": lambda p: (-score(p)[0], score(p)[1]), "merge": merge})
    with pytest.raises(AssertionError, match=r"merge, .*: it gives other rows"):
        stages.check(CASE, "kernel", x, whole, {"score": score, "merge": lambda p: merge(p) + 1})
    with pytest.raises(AssertionError, match="rows are not the mean of their tokens"):
        stages.check(
            CASE,
            "kernel",
            x,
            lambda p: (whole(p)[0] + 1, whole(p)[1]),
            {"score": score, "merge": lambda p: merge(p) + 1},
        )


def test_the_reference_is_timed_stage_by_stage() -> None:
    """Every stage is timed on every image, in the order of the stages."""
    seen = []
    x = tokens(CASE, 0)
    with pytest.MonkeyPatch.context() as patch:
        for name in stages.REFERENCE:
            real = getattr(stages.reference, name)
            patch.setattr(stages.reference, name, lambda *a, n=name, f=real, **k: seen.append(n) or f(*a, **k))
        found = stages.reference_stages(CASE, x)
        for name, call in found.items():
            seen.clear()
            call(None)
            assert seen == [name] * CASE.B
    assert tuple(found) == stages.REFERENCE


def test_packed_images_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    (small,) = ragged.cases(smoke=True)
    real = ragged.apet_kernels.compress_packed

    def wrong(x: torch.Tensor, *given: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows, at = real(x, *given, **options)
        return rows.index_fill(0, torch.tensor([20]), 7.0), at

    monkeypatch.setattr(ragged.apet_kernels, "compress_packed", wrong)
    with pytest.raises(AssertionError, match="rows are not the mean of their tokens"):
        ragged.compare(small, Cpu())


# ---- growth
