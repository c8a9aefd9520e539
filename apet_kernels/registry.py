"""The single definition of `torch.ops.apet.*` in a process, however often this package is imported.

torch lets an op be defined once, and an implementation be registered once per key. But a module may be executed again
(importlib.reload, %autoreload in a notebook), and an engine may vendor a copy of this package beside the installed one.
So the definition is stored where every copy finds it, on `torch.ops.apet`. A copy of the same version with the same
schemas shares it, with the implementations of the copy that was imported first: nothing is registered twice, and code
that was compiled or traced with these ops stays valid. Edited schemas, fakes and implementations need a new process.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "apet"  # named only here: builds for the Hugging Face Hub use another one (examples/hub)
registered: Any = getattr(torch.ops, NAMESPACE)
_ATTRIBUTE = "_apet_kernels_registry"  # the attribute of `registered` that holds the registry


class Registry:
    """The definition of the ops, and the implementations registered so far."""

    def __init__(self, version: str, file: str, schemas: tuple[str, ...]) -> None:
        """Defines the ops.

        Raises:
            ImportError: if something else has defined ops in this namespace.
        """
        self.version, self.file, self.schemas = version, file, schemas
        self._registered: set[tuple[str, str]] = set()
        try:
            self._library = torch.library.Library(NAMESPACE, "DEF")
        except RuntimeError as error:
            raise ImportError(
                f"torch.ops.{NAMESPACE} is already defined in this process, by an older apet-kernels or by another "
                f"library; {_this(version, file)} cannot share it. torch says: {str(error).splitlines()[0]}"
            ) from None
        for schema in schemas:
            self._library.define(schema)

    def implement(self, op: str, key: str, function: Callable[..., Any], with_keyset: bool = False) -> None:
        """Registers `function` for a dispatch key, unless one is registered already."""
        if (op, key) not in self._registered:
            self._library.impl(op, function, key, with_keyset=with_keyset)
            self._registered.add((op, key))

    def fake(self, op: str, function: Callable[..., Any]) -> None:
        """Registers the function that gives the shapes of an op's results, unless one is registered already."""
        if (op, "fake") not in self._registered:
            torch.library.register_fake(f"{NAMESPACE}::{op}", function, lib=self._library)
            self._registered.add((op, "fake"))


def registry(version: str, file: str, schemas: tuple[str, ...]) -> Registry:
    """Returns the registry of this process: the one of an earlier import, or a new one.

    Raises:
        ImportError: if the ops are defined already, by another version or with other schemas.
    """
    earlier: Registry | None = vars(registered).get(_ATTRIBUTE)  # or of the same class in another copy
    if earlier is None:
        earlier = Registry(version, file, schemas)
        setattr(registered, _ATTRIBUTE, earlier)
    if earlier.version != version:
        raise ImportError(
            f"torch.ops.{NAMESPACE} is already defined in this process by {_this(earlier.version, earlier.file)}; "
            f"{_this(version, file)} is another version and cannot share it: import one of the two"
        )
    if earlier.schemas != schemas:
        raise ImportError(
            f"torch.ops.{NAMESPACE} is already defined in this process by {_this(earlier.version, earlier.file)}; "
            f"{_this(version, file)} has other schemas: restart Python, and import one of the two"
        )
    return earlier


def has_kernel(op: str, key: str) -> bool:
    """Returns whether any copy of this package has registered an implementation for exactly this dispatch key."""
    name = f"{NAMESPACE}::{op}"
    return torch._C._dispatch_has_kernel(name) and torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


def _this(version: str, file: str) -> str:
    return f"apet-kernels {version} ({file})"
