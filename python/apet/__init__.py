"""ApET on models and on files: hooks for models, the command `apet`, pictures, and the encoders behind them.

The kernels are in the package `apet_kernels`. Importing `apet` imports neither that package nor torch: a module is
imported when one of its names is first used.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from .notice import Notice

if TYPE_CHECKING:
    from .hooks import (
        Adapter,
        Kept,
        Options,
        Visual,
        equal_units,
        kept,
        one_unit,
        options,
        patch,
        patched,
        register_adapter,
        unpatch,
    )
    from .model_pictures import picture
    from .model_report import Report, report

# The module of each name above; tests/test_api.py compares the two.
_LAZY = {
    "Adapter": "hooks",
    "Kept": "hooks",
    "Options": "hooks",
    "Report": "model_report",
    "Visual": "hooks",
    "equal_units": "hooks",
    "kept": "hooks",
    "one_unit": "hooks",
    "options": "hooks",
    "patch": "hooks",
    "patched": "hooks",
    "picture": "model_pictures",
    "register_adapter": "hooks",
    "report": "model_report",
    "unpatch": "hooks",
}
__all__ = [
    "Adapter",
    "ApetError",
    "Kept",
    "Notice",
    "Options",
    "Report",
    "Visual",
    "__version__",
    "equal_units",
    "kept",
    "one_unit",
    "options",
    "patch",
    "patched",
    "picture",
    "register_adapter",
    "report",
    "unpatch",
]

try:
    __version__ = version("apet-kernels")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"


class ApetError(Exception):
    """The error of the command line and of the functions that it calls: one message for the user, with the offending
    value."""


if not TYPE_CHECKING:  # else a type checker would accept every misspelt name

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return getattr(import_module(f".{_LAZY[name]}", __name__), name)
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
