"""The parts of the steps of benchmarks/gpu_quick.py: items, their options, and the device that they run on."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # imported where it is needed: the first steps must run even if torch is broken
    from benchmarks.lib.device import Device

ROUNDS = 5  # samples of every time


class NotPossible(Exception):
    """The machine cannot run the item, for a reason that is not a fault of this project."""


class NotRun(Exception):
    """The item did not end in its time, so it shows nothing."""


@dataclass(frozen=True)
class Item:
    """A part of a step, with its own line in the results."""

    name: str
    run: Callable[[], dict[str, Any] | None]


@dataclass(frozen=True)
class Options:
    """The options that the parent process passes to a step."""

    out: str
    rehearse: bool = False
    carried: str = ""
    seconds: float = 600  # the limit of the step
    only: tuple[str, ...] = ()
    done: tuple[str, ...] = ()
    injected: dict[str, str] = field(default_factory=dict)

    @property
    def package(self) -> Path:
        return Path(self.out, "package")

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


def prepare(options: Options) -> Device:
    """Returns the clock of the device; in a rehearsal it first installs the stand-ins."""
    from benchmarks.lib import device
    from benchmarks.quick import rehearsal

    if options.rehearse:
        rehearsal.install()
        return rehearsal.FakeClock()
    return device.gpu()


def device_works(options: Options) -> bool:
    """Returns whether the device still answers: after an illegal access every later call of its process fails."""
    if options.rehearse or "torch" not in sys.modules:
        return True
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def usable(options: Options) -> list[str]:
    """Returns the backends for tensors on the device."""
    from apet_kernels import available

    return [name for name in ("cuda", "triton") if available.why_unavailable(name) is None]


def no_cuda_gpu() -> bool:
    import torch

    return torch.version.hip is not None


def raise_unusable() -> None:
    from apet_kernels import available

    if no_cuda_gpu():
        raise NotPossible("an AMD GPU: Triton alone")
    raise RuntimeError(f"the CUDA kernels are not usable: {available.why_unavailable('cuda')}")


def forceable(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except RuntimeError as error:
        if "cannot run here" in str(error):
            raise NotPossible(str(error)) from None
        raise


def median(clock: Device, call: Callable[[], object]) -> float:
    """Returns the median seconds of a call."""
    clock.seconds(call)
    return statistics.median(clock.seconds(call) for _ in range(ROUNDS))
