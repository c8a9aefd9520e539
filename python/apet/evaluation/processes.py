"""Several processes, on one machine or more, as `accelerate launch` or torchrun start them.

They talk over gloo, and rarely: what is done so far, whether all can go on, what was done in the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from apet import Refused

T = TypeVar("T")
LONGEST = timedelta(days=30)  # that one process waits for another: as long as a run may take


@dataclass(frozen=True)
class Processes:
    """This process among all: rank of count, and `local` on its machine."""

    rank: int
    count: int
    local: int

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks."""
        return self.rank == 0

    def share(self, items: list[T]) -> list[T]:
        """What this process does: every count-th, from its rank on. All processes must have the same items."""
        return items[self.rank :: self.count]

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in all of them; waits for the last."""
        if self.count == 1:
            return [value]
        import torch.distributed

        values: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """What `work` returns here. Raises: Refused in every process where one is refused."""
        result, problem = None, None
        try:
            result = work()
        except Refused as error:
            problem = str(error)
        problems = [p for p in self.gather(problem) if p is not None]
        if problems:
            raise Refused(problems[0])
        return result

    def device(self, name: str | None) -> str | None:
        """The device of this process, given what the user named: with several, each takes an accelerator of its own."""
        if self.count == 1 or name is not None:
            return name
        import torch

        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return f"{accelerator.type}:{self.local}" if accelerator else "cpu"


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """This process among those that were launched together; alone where it was not launched."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(0, 1, 0)
        return
    import torch.distributed

    ours = not torch.distributed.is_initialized()
    if ours:
        torch.distributed.init_process_group("gloo", timeout=LONGEST)
    rank = torch.distributed.get_rank()
    try:
        yield Processes(rank, count, int(os.environ.get("LOCAL_RANK", rank)))
    finally:
        if ours:  # gloo's threads abort a process that ends before them
            torch.distributed.destroy_process_group()
