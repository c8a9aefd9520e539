"""Builds the libraries that `benchmarks.gpu_quick --carried` takes to a machine that cannot build them.

    python -m benchmarks.gpu_carry --out FILE.tar [--archs "80-real;90a-real;100a-real"]

The archive holds the CUDA kernels for these GPUs, the CPU kernels, and the bindings to torch's stable ABI, which work
with any Python and any torch from 2.10 on. A manifest identifies the sources that they were built from.
"""

from __future__ import annotations

import tarfile
import tempfile
from pathlib import Path

from benchmarks.lib import command
from benchmarks.quick import build

ARCHS = "80-real;90a-real;100a-real"


def main() -> None:
    """Builds and packs the libraries. Exits with 1 if they cannot be built."""
    parser = command.parser("gpu_carry", __doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the archive")
    parser.add_argument("--archs", default=ARCHS, help=f'as of CMAKE_CUDA_ARCHITECTURES ("{ARCHS}")')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            built = build.build(Path(folder), options.archs, build.cores())
        except RuntimeError as error:
            parser.exit(1, f"{error}\n")
        with tarfile.open(options.out, "w") as archive:
            for name in (*built.libraries, build.MANIFEST):
                archive.add(Path(folder, name), name)
    print(f"{options.out}: {', '.join(built.libraries)} for {built.archs}; {built.how}")


if __name__ == "__main__":
    main()
