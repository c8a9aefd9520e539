"""apet-kernels: ApET visual-token compression (arXiv 2602.19870) as PyTorch ops.

    tokens, indices = apet_kernels.compress(x, keep=64)   # [B, N, D] -> [B, 64, D], [B, 64]

Importing this package registers `torch.ops.apet.compress`, `compress_varlen`, `score` and `merge`.
"""

from importlib.metadata import PackageNotFoundError, version

from . import ops, reference
from .api import backends, build_info, compress, compress_varlen, cpu_isa, merge, plan, score, use_cpu_isa

try:
    __version__ = version("apet-kernels")
except PackageNotFoundError:  # vendored without its metadata
    __version__ = build_info().get("version", "unknown")

__all__ = [
    "backends",
    "build_info",
    "compress",
    "compress_varlen",
    "cpu_isa",
    "merge",
    "ops",
    "plan",
    "reference",
    "score",
    "use_cpu_isa",
]
