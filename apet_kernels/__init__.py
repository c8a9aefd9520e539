"""apet-kernels: ApET visual-token compression (arXiv 2602.19870) as PyTorch ops.

    tokens, indices = apet_kernels.compress(x, keep=64)   # [B, N, D] -> [B, 64, D], [B, 64]

Importing this package registers `torch.ops.apet.compress`, `compress_varlen`, `score` and `merge`.
"""

from typing import TYPE_CHECKING, Any

from . import ops as ops
from . import reference as reference
from .api import Compressed, Scored, compress, merge, score
from .api import backends as backends
from .available import available_backends, why_unavailable
from .budgets import distinct, needed, share
from .dispatch import set_backend, use_backend
from .host import build_info
from .options import Backend, Layout, Options, Select
from .plans import Plan, plan
from .ragged import compress_packed, compress_varlen
from .version import __version__

__all__ = [
    "Backend",
    "Compressed",
    "Layout",
    "Options",
    "Plan",
    "Scored",
    "Select",
    "__version__",
    "available_backends",
    "build_info",
    "compress",
    "compress_packed",
    "compress_varlen",
    "distinct",
    "merge",
    "needed",
    "plan",
    "score",
    "set_backend",
    "share",
    "use_backend",
    "why_unavailable",
]


if not TYPE_CHECKING:  # else a type checker would accept every misspelt name

    def __getattr__(name: str) -> Any:
        if name in ("cpu_isa", "use_cpu_isa"):
            import warnings

            from . import testing

            warnings.warn(
                f"apet_kernels.{name} is deprecated: use apet_kernels.testing.{name}", DeprecationWarning, stacklevel=2
            )
            return getattr(testing, name)
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
