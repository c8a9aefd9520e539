"""The CPU library on 64-bit ARM: cross-compiled, and called on a processor that qemu-user emulates."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from tests import elsewhere
from tests.elsewhere import Program
from tests.library.copies import CMAKE, CSRC, built

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
ROOT = Path("/usr/aarch64-linux-gnu")  # of the cross compiler's package for the C library, which the emulator loads
CMAKE_OPTIONS = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_CXX_COMPILER={COMPILER}"]
ISAS = ("generic", "neon", "neon_bf16")
# The emulator's names for a processor with FEAT_BF16 and for one without.
WITH_BF16, WITHOUT_BF16 = "max", "cortex-a72"


def missing() -> str | None:
    """Returns None if the library can be compiled and run here, else the reason why not."""
    if not (CMAKE and (CSRC / "apet.h").exists()):
        return "needs cmake and the sources"
    absent = [name for name in (COMPILER, EMULATOR) if not shutil.which(name)]
    if not absent:
        return None
    return f"{' and '.join(absent)} not installed (Debian: apt install g++-aarch64-linux-gnu qemu-user)"


def make(folder: Path, csrc: Path = CSRC, *options: str) -> None:
    """Builds the library from these sources, and the program that calls it."""
    elsewhere.make(folder, COMPILER, csrc, *CMAKE_OPTIONS, *options)


def emulated(model: str, folder: Path) -> Program:
    """Starts the program of that folder on an emulated processor."""
    return Program(EMULATOR, "-cpu", model, "-L", ROOT, folder / "calls")


@functools.cache
def processor(model: str) -> Program:
    """The emulated processor of this name; it ends with this process."""
    return emulated(model, built("arm", make))
