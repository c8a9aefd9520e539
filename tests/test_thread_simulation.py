"""The simulation of benchmarks/threads.py from the times of chunks."""

from __future__ import annotations

import sys

import pytest

from benchmarks import threads
from benchmarks.threads import Stage, greedy, simulate


@pytest.mark.parametrize(
    ("chunks", "threads", "end"),
    [
        ([3, 4, 5], 1, 12),
        ([5, 5, 5, 5], 2, 10),
        ([8, 1, 1, 1], 2, 8),  # the second thread also takes the other chunk of the first
        ([1, 1, 1, 8], 2, 9),  # a chunk that has begun is not shared
        ([7], 4, 7),
        ([], 3, 0),
    ],
)
def test_a_stage(chunks, threads, end):
    assert greedy(chunks, threads) == end


def test_a_call():
    image = [Stage("norms", 2, [10, 10]), Stage("sweep", 1, [4, 4])]
    alone = simulate([image] * 4, 1, 1, barrier=100)
    assert (alone.total, alone.serial) == (4 * 31, {"norms": 8, "sweep": 4})
    together = simulate([image] * 4, 1, 2, barrier=5)
    assert together.total == together.path == 4 * (2 + 5 + 10 + 1 + 5 + 4)
    apart = simulate([image] * 4, 2, 1, barrier=100)
    assert (apart.total, apart.serial) == (2 * 31, {"norms": 4, "sweep": 2})
    assert apart.barriers == 2


@pytest.mark.matrix
@pytest.mark.slow  # compiles the library
def test_the_benchmark(monkeypatch, capsys):
    only = ["--only", "1x576x1024 keep 64 float32", "inplace"]
    monkeypatch.setattr(sys, "argv", ["threads", "--threads", "1", "3", "--rounds", "1", "--markdown", *only])
    threads.main()
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| 1x576")]
    assert [line[3] for line in table] == ["1 x 1", "1 x 3"]
    stages, path, simulated = (float(table[1][column]) for column in (4, 6, 7))
    assert stages > 10
    assert 0 < path <= simulated
