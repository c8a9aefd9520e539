"""Describes the machine and the software of a measurement."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def describe() -> dict[str, str]:
    """Returns machine, versions, commit and command, for the head of a table."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, {_caches()}",
        "torch": f"{torch.__version__}, Python {platform.python_version()}, {torch.get_num_threads()} threads",
        "commit": commit(),
        "command": " ".join(["python", "-m", *_module(), *sys.argv[1:]]),
        "load": f"{os.getloadavg()[0]:.2f} at the start (only an idle machine gives ratios that mean anything)",
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def commit() -> str:
    """Returns the commit that this tree is at, with "+" if files differ from it, or "unknown" outside git."""
    root = Path(__file__).parent
    try:
        result = ["git", "-C", str(root), "describe", "--always", "--abbrev=10", "--exclude=*", "--dirty=+"]
        return subprocess.run(result, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def last_level_cache() -> int:
    """Returns the bytes of the largest cache of the first core; 32 MiB if the system does not report it."""
    return max((size for _, size in _cache_sizes()), default=32 * 2**20)


def available_memory() -> int:
    """Returns the bytes that can be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable")


def _module() -> list[str]:
    spec = sys.modules["__main__"].__spec__
    return [spec.name.removesuffix(".__main__")] if spec else [sys.argv[0]]


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _cache_sizes() -> list[tuple[str, int]]:
    """Returns ("L2", bytes) of every data cache of the first core."""
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            level, size = (index / "level").read_text().strip(), (index / "size").read_text().strip()
            found.append((f"L{level}", int(size.removesuffix("K")) * 1024))
    return found


def _caches() -> str:
    return ", ".join(f"{name} {size // 1024} KiB" for name, size in _cache_sizes())
