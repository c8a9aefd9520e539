"""For tests and benchmarks of this package: pins the CPU kernels of a process to one instruction set."""

from __future__ import annotations

from . import host

__all__ = ["cpu_isa", "use_cpu_isa"]


def cpu_isa() -> list[str]:
    """The instruction sets that the CPU kernels can use on this machine, the best one last.

    Returns:
        Some of "generic", "avx2", "avx512" and "avx512_bf16"; empty without the compiled library.

    Example:
        >>> from apet_kernels import testing
        >>> set(testing.cpu_isa()) <= {"generic", "avx2", "avx512", "avx512_bf16"}
        True
    """
    return list(host.module().cpu_isa()) if host.has_module() else []


def use_cpu_isa(name: str | None) -> None:
    """Pins the CPU kernels of this process to one instruction set, as on a machine that has no better one.

    Args:
        name: one of `cpu_isa()`; None goes back to the best.

    Raises:
        ValueError: if it is not usable here.

    Example:
        >>> from apet_kernels import testing
        >>> for isa in testing.cpu_isa():
        ...     testing.use_cpu_isa(isa)
        ...     # compare results
        >>> testing.use_cpu_isa(None)
    """
    host.module().use_cpu_isa(name)
