"""The page of the matrix: files that its sessions write are not changes of the tested sources."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tools import matrix

OUTCOME = matrix.Outcome(
    package="triton",
    version="3.5.1",
    passed=3,
    failed=0,
    skipped=1,
    seconds=9,
    date="2026-01-31",
    commit="0123456789",
    python="3.11.7",
    versions=dict.fromkeys(matrix.RECORDED, "1.0"),
)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in (*matrix.WRITTEN, "noxfile.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("[]")
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    return tmp_path


def test_a_row_is_of_a_commit(repository: Path) -> None:
    """Rows are written one after another, and committed later."""
    clean = matrix.commit(repository / "docs")
    matrix.keep(OUTCOME, repository / "docs")
    (repository / "docs/new.md").touch()
    assert matrix.commit(repository / "docs") == clean
    (repository / "noxfile.py").write_text("changed")
    assert matrix.commit(repository / "docs") == f"{clean}-dirty"


def test_rows(repository: Path) -> None:
    """A version has one row, that of its last run; versions are sorted as numbers."""
    docs = repository / "docs"
    for version, passed in (("3.10.0", 1), ("3.9.0", 2), ("3.10.0", 3)):
        matrix.keep(OUTCOME | {"version": version, "passed": passed}, docs)
    rows = [line.split(" | ")[:3] for line in (docs / "compatibility.md").read_text().splitlines() if "0123456" in line]
    assert rows == [["| 3.9.0", "2", "0"], ["| 3.10.0", "3", "0"]]


def test_an_error_counts_as_failed(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="9" failures="2" errors="1" skipped="4"/></testsuites>')
    assert matrix.counts(report) == (2, 3, 4)
