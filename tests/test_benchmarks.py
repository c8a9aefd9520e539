"""The benchmarks run on small sizes, their checks find what is wrong, and the report and the comparison say so."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import growth, hooks, kept, ragged, regress, report, serving, stages
from benchmarks.lib import ceilings, compare, memory, suite
from benchmarks.lib.baselines import published_bytes
from benchmarks.lib.cases import Case, tokens
from benchmarks.lib.compare import Comparison, Row, Timed
from benchmarks.lib.device import Cpu
from benchmarks.lib.suite import Results

RATES = {"float32 GFLOP/s": 200.0, "bfloat16 GFLOP/s": 800.0, "copy GB/s": 40.0, "read GB/s": 50.0}
RATES |= {"cached GB/s": 100.0, "call us": 10.0, "peak GFLOP/s": 1000.0, "cache MiB": 32.0}
SUITES = {one.name: one for one in report.SUITES_OF_OPS if one.name != "gpu"}  # that one: test_gpu_benchmarks.py
PAGE = report.DOCS / "benchmarks.md"
ONLY = {"cpu": ["inplace"], "growth": ["float32"]}  # of the smoke cases, where the others take more than they tell


@pytest.mark.parametrize(
    "name",  # that of the CPU compiles its baseline by torch.compile, in half a minute
    [pytest.param(name, marks=pytest.mark.slow if name == "cpu" else ()) for name in SUITES],
)
def test_every_suite_runs_and_is_reported(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small sizes: what it times is checked, its results are read, its section of the page is written."""
    its, only = SUITES[name], ONLY.get(name, [])
    section = "cpu-inplace" if name == "cpu" else name
    file = tmp_path / f"{section}.json"
    monkeypatch.setattr(ceilings, "measure", lambda: RATES)
    monkeypatch.setattr(suite, "THREADS", 1)  # two would wait for each other where other tests keep the cores busy
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
        assert row.judged["kernel"] > 0.5
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
    """What it says is taken, under the names that it gives; ratios are to the base."""
    parts = iter([0.2, 0.4, 0.3])
    calls = {
        "apet 64": lambda _: Timed({"apet 64": (prefill := next(parts)), "apet 64 op": prefill / 10}),
        "uncompressed": lambda _: Timed({"uncompressed": 1.0}),
    }
    judged = dict.fromkeys(calls, 1.0)
    row = Comparison(Cpu(), {}, calls, [None], judged, base="uncompressed", sums={}, counts={"64": 5.0}).run(3)
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
    """Of a processor with 12 MiB of cache: some have a hundred times as much, which would take minutes to fill."""
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
        return torch.ops.apet.compress(pair[0], **CASE.arguments)

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
    """In the order of its stages, each on every image."""
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

    def wrong(x: torch.Tensor, *given: object) -> tuple[torch.Tensor, torch.Tensor]:
        rows, at = real(x, *given)
        return rows.index_fill(0, torch.tensor([20]), 7.0), at

    monkeypatch.setattr(ragged.apet_kernels, "compress_packed", wrong)
    with pytest.raises(AssertionError, match="rows are not the mean of their tokens"):
        ragged.compare(small, Cpu())


# ---- growth


def test_exponents_of_power_laws() -> None:
    values = [1, 2, 4, 8]
    assert growth.exponent(values, [3 * v**1.5 for v in values]) == pytest.approx(1.5)
    curve = growth.Curve("N", "float32", "kernel", [1, 2, 4, 8, 16], [1, 2, 4, 16, 64])
    assert [growth.exponent(*curve.part(half)) for half in (0, 1)] == pytest.approx([1, 2])


def test_what_varies() -> None:
    ranges: dict[str, list[growth.Point]] = {}
    for point in growth.points(smoke=False):
        ranges.setdefault(f"{point.axis} {point.case.dtype_name}", []).append(point)
    ends = {name: (points[0].value, points[-1].value) for name, points in ranges.items()}
    wanted = {"N": (64, 65536), "D": (64, 8192), "B": (1, 64), "keep": (10, 922), "basis": (1, 64)}
    assert ends == {f"{axis} {d}": limits for axis, limits in wanted.items() for d in ("float32", "bfloat16")}
    assert all(
        point.case.keep == round(0.1 * point.case.N)
        for points in ranges.values()
        for point in points
        if point.axis != "keep"
    )


def test_the_cost_model_by_hand() -> None:
    case = Case(2, 100, 10, 20, torch.float32, "inplace", basis=3)
    # 4000 bytes an image: once from memory, three times from the cache; 20 rows, and 44 bytes a token, likewise.
    moved = 2 * (4000 / 50 + (3 * 4000 + 800 + 4400) / 100)
    product = 2 * 2 * (80 * 20 + 3 * 100) * 10
    assert growth.predicted_ms(case, RATES) == pytest.approx((10e3 + moved + product / 200) / 1e6)
    # By the cache of the machine that measured, whatever reads its results: this one holds no half of an image.
    uncached = 2 * (4000 + 3 * 4000 + 800 + 4400) / 50
    small = RATES | {"cache MiB": 7999 / 2**20}
    assert growth.predicted_ms(case, small) == pytest.approx((10e3 + uncached + product / 200) / 1e6)
    assert growth.predicted_bytes(case) == 2 * 20 * (40 + 8) + 2 * 4 * (100 * 4 + 20 * 10)
    case = dataclasses.replace(case, keep=90, dtype=torch.bfloat16)  # half of 90 targets, and a panel
    assert growth.predicted_bytes(case) == 2 * 90 * (20 + 8) + 2 * (4 * 100 * 4 + 10 * min(4 * 90, 2 * 90 + 4 * 81))


def test_what_the_model_predicts_for_large_and_small() -> None:
    """The exponents that the documents promise: the product with many tokens, reading them with few kept."""

    def slope(cases: list[Case], values: list[int]) -> float:
        return growth.exponent(values, [growth.predicted_ms(case, RATES | {"call us": 0.0}) for case in cases])

    base = Case(1, 2**18, 1024, 2**14, torch.float32, "inplace")
    sizes = [2**n for n in range(18, 22)]
    assert slope([dataclasses.replace(base, N=n, keep=n // 10) for n in sizes], sizes) == pytest.approx(2, abs=0.05)
    assert slope([dataclasses.replace(base, N=n, keep=16) for n in sizes], sizes) == pytest.approx(1, abs=0.05)
    few, widths = dataclasses.replace(base, keep=16), [64, 256, 1024]
    assert slope([dataclasses.replace(few, D=d) for d in widths], widths) == pytest.approx(1, abs=0.1)


def test_memory_is_of_the_call_alone() -> None:
    """The published formulation holds its broadcast, the kernel its outputs and what it touches of its workspace; the
    input counts for neither."""
    case = Case(1, 512, 1024, 64, torch.float32, "overwrite")
    broadcast = published_bytes(case.N, case.D, case.keep, case.basis, case.itemsize)
    assert broadcast < memory.measured_growth(case, "published") < 1.5 * broadcast
    ours = memory.measured_growth(case)
    outputs = memory.output_bytes(case)
    assert outputs < ours < 1.5 * (outputs + memory.workspace_bound(case)) + 2**20


# ---- the floor


def test_the_floor_by_hand() -> None:
    """X has 400 bytes and fits the cache of 1000: it is read once. The product has 2 * 15 * 5 * 5 operations."""
    rates = RATES | {"cache MiB": 1000 / 2**20}
    case = Case(B=1, N=20, D=5, keep=5, dtype=torch.float32, layout="inplace")
    assert ceilings.floor_ms([case], rates) == pytest.approx(400 / 50e6 + 750 / 1000e6)
    large = dataclasses.replace(case, D=50)  # 4000 bytes: 3000 again from memory, while the product takes less
    assert ceilings.floor_ms([large], rates) == pytest.approx((4000 + 3000) / 50e6)
    both = ceilings.floor_ms([case, large], rates)  # the smaller first pass, then all products, or all bytes
    assert both == pytest.approx(max((400 + 7000) / 50e6, 400 / 50e6 + 8250 / 1000e6))
    batch = dataclasses.replace(case, B=3, dtype=torch.bfloat16)
    assert ceilings.floor_ms([batch], rates) == pytest.approx(max(600 / 50e6, 200 / 50e6 + 3 * 750 / 1000e6))
    overwrite = dataclasses.replace(case, layout="overwrite", basis=2)  # 3 targets
    assert ceilings.floor_ms([overwrite], rates) == pytest.approx(400 / 50e6 + 450 / 1000e6)


def test_no_floor_without_its_rates() -> None:
    case = Case(1, 20, 5, 5, torch.float32, "inplace")
    assert ceilings.of_floor([case], 1.0, {"read GB/s": 1.0}) == "-"
    assert ceilings.of_floor([case], 2 * ceilings.floor_ms([case], RATES), RATES) == "50%"


# ---- regressions


def row(case: int = 0, **ms: float) -> Row:
    """Of a quiet machine."""
    times = {"product": 3.0, "sweeps": 1.0, "eager": 8.0, "kernel": 2.0} | ms
    faster = {name: t / times["kernel"] for name, t in times.items() if name != "kernel"}
    return Row({"case": case}, times, dict.fromkeys(times, 9), faster, dict.fromkeys(times, 0.05), {"kernel": 1.0}, {})


def results_of(*rows: Row, name: str = "stages") -> Results:
    return Results(name, {"commit": "c", "date": "today"}, {}, list(rows))


def worse(new: Row, old: Row | None = None) -> list[tuple[str, float]]:
    """What has regressed."""
    found = regress.compare(results_of(old or row()), results_of(new)).regressed(regress.ALLOW)
    return [(what, round(times, 3)) for _, what, times in found]


def test_planted_regressions_are_found() -> None:
    assert worse(row()) == []
    assert worse(row(kernel=3.0)) == [("kernel", 1.5)]
    halves = {"merge": 1.5, "score": 0.5, "kernel avx2": 2.5}
    assert worse(row(**halves | {"merge": 2.4}), row(**halves)) == [("merge", 1.6)]
    assert worse(row(**halves | {"kernel avx2": 5.0}), row(**halves)) == [("kernel avx2", 2.0)]
    hungry, lean = (dataclasses.replace(row(), memory={"kernel": n, "eager": 9}) for n in (200, 100))
    assert worse(hungry, lean) == [("memory", 2.0)]
    assert worse(lean, hungry) == []


def test_planted_regressions_of_a_model_are_found() -> None:
    """Whose base is not ours: against it and against the model's parts, the hooks take longer."""

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
    assert worse(row(kernel=2.4)) == []  # within what is allowed
    assert worse(row(kernel=1.0)) == []


def test_a_kernel_that_takes_longer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the clock, which the calls move: both take turns, and the kernel then takes twice as long."""
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
