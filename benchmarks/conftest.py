"""Fixtures for pytest-benchmark: the option --smoke, two threads, and printing past pytest's capture."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

import apet_kernels
from benchmarks.lib.cases import cases
from benchmarks.lib.compare import THREADS
from benchmarks.report import SUITES_OF_OPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--smoke", action="store_true", help="benchmarks: tiny cases and three rounds")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    small = metafunc.config.getoption("smoke")
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", cases(small), ids=_id)
    if "suite_case" in metafunc.fixturenames:
        found = [(suite, case) for suite in SUITES_OF_OPS for case in suite.cases(small)]
        ids = [f"{suite.name}-{_id(case)}" for suite, case in found]
        metafunc.parametrize(("suite", "suite_case"), found, ids=ids)


def _id(case: object) -> str:
    return str(case).replace(" ", "-")


@pytest.fixture
def smoke(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("smoke")


@pytest.fixture(autouse=True)
def kernel() -> Iterator[None]:
    """Runs the CPU kernel on two threads, or skips with the reason why there is none."""
    reason = apet_kernels.why_unavailable("cpu")
    if reason is not None:
        pytest.skip(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Prints a line whether or not pytest captures output."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return line
