"""ApET on models and on files: the command `apet`, pictures, and the encoders behind them.

The kernels themselves are in `apet_kernels`; importing `apet` imports neither them nor torch.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# Where the names live that need torch or transformers: importing apet imports neither.
_LAZY = {
    **dict.fromkeys(
        (
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
        ),
        "hooks",
    ),
    "Report": "model_report",
    "report": "model_report",
    "picture": "model_pictures",
}
__all__ = ["Refused", "__version__", *_LAZY]

try:
    __version__ = version("apet-kernels")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"


class Refused(Exception):
    """Something that cannot be done as asked, said in one sentence for the person who asked."""


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
