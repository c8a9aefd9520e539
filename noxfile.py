"""The matrix of versions: `make matrix-quick` (minutes a session) and `make matrix-torch` (gigabytes a session).

One session installs one version of one dependency, runs the tests that need it, and writes the outcome to
docs/compatibility.json, from which docs/compatibility.md is made (tools/matrix.py). `nox --list` lists the sessions,
and `nox -s "transformers(5.8.1)"` runs one. "newest" is the newest version in the package index.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from ast import literal_eval
from pathlib import Path

import nox

ROOT = Path(__file__).parent
FOLDER = ROOT / ".build/matrix"
LOCK = ROOT / "requirements/dev.txt"

NEWEST = "newest"
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
# The last 4, the first 5, and the last patch of every second minor.
TRANSFORMERS = [
    *("4.57.6", "5.0.0", "5.2.0", "5.4.0", "5.6.2", "5.8.1", "5.10.4", "5.12.1", "5.14.1", "5.16.1", "5.18.0"),
    *("5.20.2", "5.22.2", "5.24.0", NEWEST),
]
TRITON = ["3.5.1", "3.6.0", "3.7.1", "3.8.0", NEWEST]
TORCH = ["2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", NEWEST]

HOOKS = [f"tests/hooks/test_{part}.py" for part in ("selfcheck", "stages", "generate")]
WHOLE = ["--points", "0"]  # every family at every stage, not two points of each grid
OPS = ["tests/test_op.py", "tests/test_layouts.py", "tests/test_invariance.py"]
KERNELS = [f"tests/test_triton_{part}.py" for part in ("faults", "interpreter", "invariance", "launches", "offline")]
EXTRAS = ["--extra", "demo", "--extra", "eval", "--extra", "heif"]  # of the programs
PROGRAMS = [
    f"tests/test_{part}.py" for part in ("cli", "cli_compress", "cli_doctor", "media", "media_photos", "media_sources")
]
PROGRAMS += [f"tests/hooks/test_{part}.py" for part in ("generate_cli", "eval_cli", "lmms")]

nox.options.sessions = []  # by tag or name alone


def wanted(package: str, version: str) -> str:
    return package if version == NEWEST else f"{package}=={version}"


def lock_without(session: nox.Session, *names: str) -> Path:
    """Returns the lock as constraints, without the packages whose version the session sets."""
    lines = LOCK.read_text().splitlines(keepends=True)
    path = Path(session.create_tmp(), "constraints.txt")
    path.write_text("".join(line for line in lines if not re.match(rf"({'|'.join(names)})==", line)))
    return path


# ---- packages before those of the installed environment, with its torch ---------------------------------------------


def in_front(session: nox.Session, name: str, *pip: object) -> Path:
    """Returns a new folder with these packages and their requirements."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-compile", "--no-warn-conflicts"]
    session.run(*install, "--target", folder, *map(str, pip))
    return folder


def record(session: nox.Session, package: str, tests: list[str], folder: Path, *pytest: str) -> None:
    command = [sys.executable, "-m", "tools.matrix", package, *tests]
    session.run(*command, "--", *pytest, env={"PYTHONPATH": str(folder)})


@nox.session(venv_backend="none", tags=["quick"])
@nox.parametrize("version", TRANSFORMERS, ids=TRANSFORMERS)
def transformers(session: nox.Session, version: str) -> None:
    """The hooks, on one version of transformers."""
    own = ("transformers", "tokenizers", "huggingface-hub")
    pip = ["--constraint", lock_without(session, *own), wanted("transformers", version)]
    folder = in_front(session, f"transformers-{version}", *pip)
    record(session, "transformers", HOOKS, folder, *WHOLE)
    # With this version tested, `apet.patch` runs no self-check.
    session.run(sys.executable, "-m", "apet.hooks.record", env={"PYTHONPATH": str(folder)})


@nox.session(venv_backend="none", tags=["quick"])
@nox.parametrize("version", TRITON, ids=TRITON)
def triton(session: nox.Session, version: str) -> None:
    """The Triton kernels, interpreted and compiled, with one version of Triton."""
    folder = in_front(session, f"triton-{version}", "--no-deps", wanted("triton", version))
    record(session, "triton", KERNELS, folder, "-m", "not matrix")  # slow: they compile


def lowest_versions(session: nox.Session, requirements: str | None) -> list[str]:
    """Returns the oldest version of each of these requirements, or of the extras of the programs in pyproject.toml."""
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--resolution", "lowest-direct"]
    command += ["--python", sys.executable, *(["-"] if requirements else [*EXTRAS, "pyproject.toml"])]
    done = subprocess.run(command, cwd=ROOT, input=requirements, stdout=subprocess.PIPE, text=True, check=True)
    return re.findall(r"^(?!torch=|triton=|nvidia-|cuda-)\w\S+==\S+", done.stdout, re.M)


@nox.session(venv_backend="none", tags=["quick"])
def lowest(session: nox.Session) -> None:
    """The build and the command line, with the oldest version of every requirement in pyproject.toml but torch."""
    text = (ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r"^requires = (\[.*\])$", text, re.M)
    build = in_front(session, "lowest-build", "--no-deps", *lowest_versions(session, "\n".join(literal_eval(required))))
    path = os.pathsep.join([str(build / "bin"), os.environ["PATH"]])
    command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(FOLDER / "lowest-wheel")]
    session.run(*command, str(copied("lowest")), env={"PYTHONPATH": str(build), "PATH": path})
    folder = in_front(session, "lowest", "--no-deps", *lowest_versions(session, None))
    record(session, "lowest", PROGRAMS, folder)


# ---- separate environments, with another torch -----------------------------------------------------------------------


def copied(name: str) -> Path:
    """Returns a new copy of the sources: a build leaves files beside them."""
    source = FOLDER / f"source-{name}"
    shutil.rmtree(source, ignore_errors=True)
    for file in subprocess.check_output(["git", "-C", ROOT, "ls-files"], text=True).splitlines():
        if (ROOT / file).is_file():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, source / file)
    return source


def own_environment(
    session: nox.Session, package: str, torch: str, tests: list[str], constraints: list[str], *pytest: str
) -> None:
    """Builds the project in a copy of the sources, editable, and tests that."""
    session.install(*constraints, "--requirement", "requirements/build.in")
    session.install(*constraints, torch)
    source = copied(session.name)
    # Any version that this torch allows, but no other torch.
    freeze = session.run("python", "-m", "pip", "freeze", silent=True)
    (pinned,) = re.findall(r"^torch==\S+", freeze, re.M)
    session.install(*constraints, "--no-build-isolation", "--editable", f"{source}[test]", pinned)
    session.chdir(source)
    session.run("python", "-m", "tools.matrix", package, *tests, "--docs", str(ROOT / "docs"), "--", *pytest)


@nox.session(python=PYTHONS, tags=["torch"])
def python(session: nox.Session) -> None:
    """The ops and the hooks on one version of Python, with everything as locked."""
    own_environment(session, "python", "torch", OPS + HOOKS, ["--constraint", str(LOCK)])


@nox.session(tags=["torch"])
@nox.parametrize("version", TORCH, ids=TORCH)
def torch(session: nox.Session, version: str) -> None:
    """The ops, built beside one version of torch, and the hooks on it."""
    constraints = lock_without(session, "torch", "triton", "setuptools", "cuda-.*", "nvidia-.*")
    own_environment(session, "torch", wanted("torch", version), OPS + HOOKS, ["--constraint", str(constraints)])


@nox.session(tags=["torch"])
def rehearsal(session: nox.Session) -> None:
    """`benchmarks.gpu_quick --rehearse` as on a machine that is there for minutes: with older torch and Triton, a NumPy
    that this Triton's interpreter can use, and without pytest, hypothesis and transformers. It needs nvcc and g++."""
    session.install("torch==2.11.0", "triton==3.6.0", "numpy<2.4", "--requirement", "requirements/build.in")
    out = Path(session.create_tmp(), "out").resolve()
    shutil.rmtree(out, ignore_errors=True)
    session.chdir(copied(session.name))  # without the libraries of another torch
    session.run("python", "-m", "benchmarks.gpu_quick", "--rehearse", "--seconds", "20000", "--out", str(out))


@nox.session(tags=["torch"])
def newest(session: nox.Session) -> None:
    """The ops and the hooks, with the newest version of everything."""
    own_environment(session, "newest", "torch", OPS + HOOKS, ["--upgrade"], *WHOLE)
