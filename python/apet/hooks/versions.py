"""The versions under which the hooks passed their self-check; docs/compatibility.md has those whose tests were run."""

from __future__ import annotations

import functools
import json
from pathlib import Path

# tested.json has, for each tested version of transformers, digests of the files that the hooks rely on.
FILE = Path(__file__).with_name("tested.json")


@functools.cache
def digests() -> dict[str, dict[str, str]]:
    """Returns, for each tested version of transformers: file within the package -> first 16 digits of its SHA-256."""
    return json.loads(FILE.read_text())


# With a torch of another minor version the self-check runs once.
TESTED: tuple[str, ...] = tuple(digests())
TORCH: tuple[str, ...] = ("2.13",)
