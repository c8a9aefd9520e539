"""Tests that are written for one version of transformers skip themselves with the others. They must not do so with the
locked version: then they would no longer run anywhere."""

from __future__ import annotations

import re
from pathlib import Path

import test_models
import test_mutations
import test_traps
from apet.hooks import versions

LOCK = Path(__file__).parents[2] / "requirements" / "test.txt"


def locked(package: str) -> str:
    """Returns the newest locked version. For Pythons that the newest transformers does not support the lock has an
    older one, with which these tests are skipped."""
    found = re.findall(rf"^{package}==([\d.]+)", LOCK.read_text(), re.MULTILINE)
    return max(found, key=lambda version: [int(part) for part in version.split(".")])


def test_traps_are_of_the_locked_transformers() -> None:
    version = locked("transformers")
    assert version.startswith(test_traps.WRITTEN_FOR), (
        f"the lock has transformers {version}, so test_traps.py is skipped: set WRITTEN_FOR there, and make its tests "
        "pass; add the new models that hand something along the sequence to TRAPS"
    )


def test_mutations_are_of_the_locked_transformers() -> None:
    version = locked("transformers")
    assert version.startswith(test_mutations.WRITTEN_FOR), (
        f"the lock has transformers {version}, so mutations that do not fit its source are skipped: set WRITTEN_FOR in "
        "test_mutations.py, and renew the edits in tests/hooks/mutations"
    )


def test_the_table_of_models_is_of_the_locked_transformers() -> None:
    version = locked("transformers")
    others = sorted({one["transformers"] for one in test_models.TABLE.values()} - {version})
    assert not others, (
        f"the lock has transformers {version}, so rows of docs/models.json that are of {', '.join(others)} are not "
        "tested: renew them with `python -m tools.models_table`"
    )


def test_the_locked_versions_count_as_tested() -> None:
    """Else a self-check would run before every patch of the other tests, which are about versions that were tested."""
    version, torch = locked("transformers"), locked("torch")
    assert version in versions.TESTED, (
        f"tested.json has no transformers {version}, which is locked: `make matrix` tests and records it"
    )
    assert torch.rpartition(".")[0] in versions.TORCH, (
        f"apet.hooks.versions.TORCH has no {torch}, which is locked: `make matrix-torch` tests it"
    )
