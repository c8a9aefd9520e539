"""Checks that an engine has what a plugin uses of it, before the plugin changes anything."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any


def check(engine: str, used: Mapping[str, Sequence[str]]) -> None:
    """Checks what a plugin uses of an engine: names, and the parameters or fields of theirs that it needs.

    Raises: RuntimeError, which names the first one that is missing.
    """
    for name, wanted in used.items():
        try:
            found: Any = pkgutil.resolve_name(name)
        except (ImportError, AttributeError) as error:
            raise RuntimeError(f"apet: this version of {engine} has no {name}: {error}") from error
        known = set(inspect.signature(found).parameters) if wanted else set()
        if missing := [parameter for parameter in wanted if parameter not in known]:
            raise RuntimeError(f"apet: {name} of this version of {engine} has no {missing[0]}")
