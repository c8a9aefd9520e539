"""The compiled module `_host`: how the library was built, and how it would run a call."""

from __future__ import annotations

import importlib
from typing import Any

from .available import HOW_TO_GET_KERNELS

_host: Any
try:
    _host = importlib.import_module("._host", __package__)
except ImportError:  # a pure wheel, or libraries of another Python
    _host = None


def has_module() -> bool:
    """Returns whether the compiled module is part of this installation."""
    return _host is not None


def module() -> Any:
    """Returns the compiled module.

    Raises:
        ValueError: if it is not part of this installation.
    """
    if _host is None:
        raise ValueError(f"the module apet_kernels._host is not part of this installation; {HOW_TO_GET_KERNELS}")
    return _host


def build_info() -> dict[str, Any]:
    """Returns how the compiled library was built.

    Returns:
        version, commit, compiler, flags, build_type, cpu_isas, cuda_archs, cuda_compiler, and torch_headers, the torch
        whose headers were used. Empty if there is no compiled library.

    Example:
        >>> apet_kernels.build_info().get("version", "no compiled library")
        '0.2.0'
    """
    return dict(_host.build_info()) if _host else {}
