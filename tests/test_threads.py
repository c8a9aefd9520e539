"""The library without torch, from threads of another program, with and without ThreadSanitizer (tests/threads.cpp)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=sysconfig.get_path("scripts")) or shutil.which("cmake")
ORDERS = r"memory_order_(acquire|release|acq_rel)"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CMAKE or not (ROOT / "CMakeLists.txt").exists(), reason="needs cmake and the sources"),
]


def build(source: Path, folder: Path, *options: str) -> Path:
    """Builds the program from the sources in `source`, without torch and Python."""
    commands = (["-S", source, "-B", folder, *options], ["--build", folder, "--target", "apet_threads"])
    for command in commands:
        done = subprocess.run([CMAKE, *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "apet_threads"


def run(program: Path, seconds: float = 120) -> tuple[int, str]:
    """Runs the program; returns exit code and output, -1 if it had to be stopped."""
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as stopped:
        return -1, (stopped.stderr or b"").decode(errors="replace")
    return done.returncode, done.stdout + done.stderr


@pytest.mark.matrix  # with the sanitizer below, the program compares the same bits
def test_every_pool_gives_the_same_bits(tmp_path: Path):
    code, output = run(build(ROOT, tmp_path))
    assert code == 0, output


def test_no_data_race(tmp_path: Path):
    code, output = run(build(ROOT, tmp_path, "-DAPET_SANITIZE=thread"))
    assert code == 0, output
    assert "data race" not in output, output


@pytest.mark.matrix
def test_the_sanitizer_sees_a_missing_order(tmp_path: Path):
    """ThreadSanitizer must report a race if every acquire and release of the team is relaxed."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    for name in ("CMakeLists.txt", "tests/threads.cpp", "benchmarks/chunks.cpp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    team = tmp_path / "csrc/cpu/team.h"
    team.write_text(re.sub(ORDERS, "memory_order_relaxed", team.read_text()))
    _, output = run(build(tmp_path, tmp_path / "build", "-DAPET_SANITIZE=thread"), seconds=20)
    assert "data race" in output
