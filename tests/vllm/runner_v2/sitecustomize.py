"""Lets vLLM's second model runner, that of GPUs, run on the CPU, with Triton's interpreter in place of a GPU.

Python imports this file when it starts, in every process of an engine, if this folder is in PYTHONPATH. vLLM runs the
second model runner on CPUs too, if Triton has a backend named "cpu" (which is no part of the package on PyPI); an
interpreted kernel needs no backend.
"""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from types import SimpleNamespace

    from triton.backends import backends
    from triton.backends.compiler import GPUTarget

    class Driver:
        """What vLLM and Triton ask a backend's driver for, without compiling."""

        @staticmethod
        def is_active() -> bool:
            """Returns whether this machine has the device."""
            return True

        @staticmethod
        def get_current_target() -> GPUTarget:
            """Returns what kernels would be compiled for."""
            return GPUTarget("cpu", 0, 1)

    backends["cpu"] = SimpleNamespace(driver=Driver)
