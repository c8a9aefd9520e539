"""The steps of benchmarks/gpu_quick.py, each a sequence of items. The result of an item goes into its line."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.quick import primitives, proofs, start, times
from benchmarks.quick.items import Item, Options

STEPS: dict[str, Callable[[Options], Iterator[Item]]] = {
    "card": start.card,
    "libraries": start.libraries,
    "selftest": proofs.selftests,
    "paths": proofs.every_path,
    "primitives": primitives.primitives,
    "times": times.times,
    "sanitizers": proofs.sanitizers,
    "compiler": proofs.compiler,
    "hooks": proofs.hooks,
    "tests": proofs.suite,
}
