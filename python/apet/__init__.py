"""ApET on models and on files: the command `apet`, pictures, and the encoders behind them.

The kernels themselves are in `apet_kernels`; importing `apet` imports neither them nor torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

_HOOKS = (
    "Adapter",
    "Kept",
    "Options",
    "Visual",
    "equal_units",
    "kept",
    "one_unit",
    "options",
    "patch",
    "patched",
    "register_adapter",
    "unpatch",
)
__all__ = ["Refused", "__version__", *_HOOKS]

try:
    __version__ = version("apet-kernels")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"


class Refused(Exception):
    """Something that cannot be done as asked, said in one sentence for the person who asked."""


def __getattr__(name: str) -> Any:
    """The hooks for transformers models, imported with torch and transformers when they are first asked for."""
    if name in _HOOKS:
        return getattr(import_module(".hooks", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
