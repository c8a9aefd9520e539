"""What stands in for a GPU in a rehearsal: the simulated one of tests/simt, Triton's interpreter, a clock that does not
look at the time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from benchmarks.lib.device import DryRun

SAID = "REHEARSED: no GPU, and no figure means anything"


class FakeClock(DryRun):
    """Every call takes 10 us and a little. One that is timed several times runs once."""

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
    """Lets `backend="cuda"` take CPU tensors. Kernels of Triton run in the tests' interpreter where that can be relied
    on, else in Triton's own."""
    os.environ["TRITON_INTERPRET"] = "1"
    from tests.simt import binding, call

    with contextlib.suppress(ImportError):
        from tests.tools import triton_interpreter

        triton_interpreter.install()
    binding.stand_in(call.H100)
