"""The versions that the hooks were tested with: `make matrix` runs them, docs/compatibility.md has the results."""

from __future__ import annotations

import functools
import json
from pathlib import Path

# tested.json: for each version of transformers, digests of its files that the hooks rely on.
FILE = Path(__file__).with_name("tested.json")


@functools.cache
def digests() -> dict[str, dict[str, str]]:
    """For each tested version of transformers: file within the package -> first 16 digits of its SHA-256."""
    return json.loads(FILE.read_text())


# The oldest of each is the lower bound in pyproject.toml.
TESTED: tuple[str, ...] = tuple(digests())
TORCH: tuple[str, ...] = ("2.10", "2.11", "2.12", "2.13", "2.14", "2.15")
