"""ApET on models and on files: the command `apet`, pictures, and the encoders behind them.

The kernels themselves are in `apet_kernels`; importing `apet` imports neither them nor torch.
"""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["Refused", "__version__"]

try:
    __version__ = version("apet-kernels")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+unknown"


class Refused(Exception):
    """Something that cannot be done as asked, said in one sentence for the person who asked."""
