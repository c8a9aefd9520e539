"""Compiles csrc/cuda to PTX by nvcc, and links its host code with the interpreter: a library for ctypes.

Builds are stored beside those of tests/simt, named by a hash of all inputs. It needs nvcc and g++ on x86-64.
"""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

from tests.simt import build as simt
from tools import sass

HERE = Path(__file__).parent
CSRC = simt.CSRC
TARGETS = ("sm_80", "sm_90a")
DTYPES = sass.DTYPES
PARTS = ("order", "memory", "module", "arithmetic", "conversions", "loads", "warp", "cta", "schedule")
FLAGS = ["-std=c++20", "-O2", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra"]


def missing() -> str | None:
    """Returns None if PTX can be compiled and interpreted here, else the reason why not."""
    return simt.missing() or (None if sass.nvcc() else "there is no nvcc")


@functools.cache
def library() -> Path:
    """Builds the interpreter, with the host code of the CUDA backend."""
    objects = [_interpreter(name) for name in PARTS]
    objects += [_host(HERE / "runtime.cpp"), _host(HERE / "workspace.cu"), _host(CSRC / "problem.cpp")]
    objects += [_host(CSRC / f"cuda/{name}.cu") for name in ("device", "plan", "launch")]
    objects += [device_code(dtype) for dtype in DTYPES]
    target = simt.FOLDER / f"libptx-{simt.digest(*map(str, objects))}.so"
    return simt.make(target, ["g++", "-shared", "-Wl,--no-undefined", "-Wl,-Bsymbolic", *map(str, objects)])


def device_code(dtype: str) -> Path:
    """Builds the object of a dtype's kernels: their host stubs, and their PTX for the targets."""
    archs = [target.removeprefix("sm_") for target in TARGETS]
    flags = [f"-gencode=arch=compute_{arch},code=compute_{arch}" for arch in archs]
    return _nvcc(CSRC / f"cuda/{dtype}.cu", CSRC, [*flags, "--no-compress", "-lineinfo"])


@functools.cache
def ptx(dtype: str, target: str) -> str:
    """Returns the PTX of a dtype's kernels from the object. Comments, "// FILE:LINE FILE:LINE", give the line in
    csrc/cuda of the next instructions, and the lines at which it is inlined."""
    content = device_code(dtype).read_bytes()
    texts = re.findall(rb"\.version [^\0]*", content)
    (text,) = (t.decode() for t in texts if f"\n.target {target}\n".encode() in t)
    return _with_places(text)


LOC = re.compile(r"\.loc\s+(\d+) (\d+) \d+(?:, function_name .*, inlined_at (\d+) (\d+) \d+)?")


def _with_places(text: str) -> str:
    """Replaces every .loc by a comment, and removes the names of files and functions, which -lineinfo appends."""
    text, _, names = text.partition("\n.file\t")
    files = {number: Path(name) for number, name in re.findall(r'(\d+) "(.*?)"', names)}
    inlined: dict[tuple[str, str], tuple[str, str]] = {}  # where a place was last inlined

    def comment(line: str) -> str:
        if not (loc := LOC.fullmatch(line)):
            return line
        places = [(loc[1], loc[2])]
        inlined.pop(places[0], None)
        if loc[3]:
            inlined[places[0]] = (loc[3], loc[4])
        while (outer := inlined.get(places[-1])) and outer not in places:
            places.append(outer)
        ours = [f"{files[file].name}:{line}" for file, line in places if files[file].parent == CSRC / "cuda"]
        return f"// {' '.join(ours)}"

    return "\n".join(map(comment, text.split("\n"))) + "\n"


def compiled(source: Path, csrc: Path, target: str) -> str:
    """Returns the PTX of a source that is not part of the library, as nvcc prints it."""
    arch = target.removeprefix("sm_")
    return _nvcc(source, csrc, [f"-arch=compute_{arch}"], "-ptx").read_text()


def _host(source: Path) -> Path:
    return _nvcc(source, CSRC, ["-gencode=arch=compute_80,code=compute_80"])


def _nvcc(source: Path, csrc: Path, flags: list[str], until: str = "-c") -> Path:
    command = [sass.nvcc(), *sass.FLAGS, "-Xcompiler=-fPIC", *flags, f"-I{HERE}"]
    read = sorted(p for folder in (csrc, HERE) for p in folder.rglob("*.*") if p.suffix in (".h", ".cuh"))
    digest = simt.digest(_version(), *command, source.name, source.read_text(), *(p.read_text() for p in read))
    return simt.make(simt.FOLDER / f"ptx-{source.stem}-{digest}.o", [*command, f"-I{csrc}", until, str(source)])


def _interpreter(name: str) -> Path:
    headers = sorted(HERE.glob("*.h"))
    source = HERE / f"{name}.cpp"
    digest = simt.digest(simt.compiler(), *FLAGS, source.read_text(), *(p.read_text() for p in headers))
    return simt.make(simt.FOLDER / f"ptx-{name}-{digest}.o", ["g++", *FLAGS, "-c", str(source)])


@functools.cache
def _version() -> str:
    return subprocess.check_output([sass.nvcc(), "--version"], text=True)
