"""The stand-ins for a GPU in a rehearsal: the simulated GPU of tests/simt, Triton's interpreter, and a fake clock."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from benchmarks.lib.device import DryRun

SAID = "REHEARSED: no GPU, and no figure means anything"


class FakeClock(DryRun):
    """A clock by which every call takes about 10 us. A call that is timed several times runs once."""

    name = "a rehearsal"
    samples = 0
    last: Callable[[], object] | None = None

    def seconds(self, call: Callable[[], object]) -> float:
        if call is not self.last:
            call()
        self.last = call
        self.samples += 1
        return (10 + self.samples % 7) * 1e-6

    def describe(self) -> dict[str, str]:
        return {"device": SAID}


def install() -> None:
    """Lets `backend="cuda"` take CPU tensors. Kernels of Triton run in the tests' interpreter if that is reliable here,
    else in Triton's own."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.simt import binding, call

    with contextlib.suppress(ImportError):
        from tests import triton_interpreter

        triton_interpreter.install()
    binding.stand_in(call.H100)
