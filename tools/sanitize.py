"""Runs the tests with the compiled libraries under AddressSanitizer and UndefinedBehaviorSanitizer.

    python -m tools.sanitize [pytest arguments]

It installs a sanitized build into build/sanitized/, checks that it reports an out-of-bounds read, and runs the tests on
it. Python and torch are not sanitized, so the sanitizers' runtime must be loaded before them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
POINTS = "6"  # of each test's grid, for each instruction set: a part of the grid that `make test-rest` completes
FOLDER = ROOT / "build/sanitized"

# Tests of the source tree, of benchmarks, of the command line, of models and of GPU kernels are left out, because they
# do not run the CPU library's code. tests/test_cuda_simt.py has its own sanitized builds.
NOT_THE_LIBRARY = ["__pycache__", "test_cli*.py", "test_layering.py", "test_library_*.py", "test_packaging*.py"]
NOT_THE_LIBRARY += ["test_threads.py", "test_arm.py", "test_tiles.py", "test_alternatives.py", "test_benchmark*.py"]
NOT_THE_LIBRARY += ["test_floors.py", "test_gpu*.py", "test_triton_*.py", "test_cuda_*.py", "test_simt.py"]
NOT_THE_LIBRARY += ["hooks", "vllm", "test_eval.py", "explore", "test_reload.py", "test_ptx.py", "test_estimates.py"]
NOT_THE_LIBRARY += ["test_sass.py", "test_quality.py"]
NOT_INSTALLED = re.compile(r"^(?:from|import) (?:benchmarks|tools)\b", re.MULTILINE)

# A tensor of 65 tokens in memory that holds 64, so that the kernel reads past its end.
INJECTED = """
import numpy, torch, apet_kernels
tokens = numpy.ones((64, 64), numpy.float32)
x = torch.from_numpy(numpy.lib.stride_tricks.as_strided(tokens, (1, 65, 64), (0, *tokens.strides)))
apet_kernels.compress(x, 8, backend="cpu")
"""


def library(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip()


def not_the_library(folder: str, names: list[str]) -> set[str]:
    """Returns the names in a folder of tests that are listed above, or that import benchmarks or tools."""
    sources = [name for name in names if name.startswith("test_") and name.endswith(".py")]
    tests = {name for name in sources if NOT_INSTALLED.search(Path(folder, name).read_text())}
    return shutil.ignore_patterns(*NOT_THE_LIBRARY)(folder, names) | tests


def main(pytest_arguments: list[str]) -> int:
    shutil.rmtree(FOLDER, ignore_errors=True)
    build = {**os.environ, "CMAKE_ARGS": "-DAPET_SANITIZE=address;undefined"}
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.check_call([*pip, "--target", FOLDER, ROOT], env=build)
    # The tests are copied there too, because beside the sources they would import the build without sanitizers.
    shutil.copytree(ROOT / "tests", FOLDER / "tests", ignore=not_the_library)
    shutil.copy(ROOT / "pyproject.toml", FOLDER)

    environment = {
        **os.environ,
        "PYTHONPATH": str(FOLDER),
        # libstdc++ is loaded first too, or ASan does not find its function that throws exceptions.
        "LD_PRELOAD": " ".join(library(name) for name in ("libasan.so", "libstdc++.so")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks at exit
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    injected = subprocess.run(
        [sys.executable, "-c", INJECTED], env=environment, cwd=FOLDER, capture_output=True, text=True
    )
    if not re.search(r"SUMMARY: AddressSanitizer: heap-buffer-overflow \S*/csrc/", injected.stderr):
        print(f"The sanitizers missed the injected out-of-bounds read:\n{injected.stdout}{injected.stderr}")
        return 1
    print("The sanitizers report the injected out-of-bounds read; now the tests.", flush=True)
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "--points",
        POINTS,
        "-k",
        "not triton and not cuda-simt",
        *pytest_arguments,
    ]
    return subprocess.call(pytest, env=environment, cwd=FOLDER)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
