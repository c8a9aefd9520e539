"""Runs the example and the code in docs/vendoring.md as a reader would."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.binaries import run, version
from tests.data import tokens
from tests.judge import assert_same
from tests.library.copies import (
    CSRC,
    CUDA_HEADERS,
    SOURCES,
    STRICT,
    block,
    built,
    make_by_hand,
    make_example,
    needs_op,
    needs_sources,
)
from tests.simt import build as simt_build
from tests.simt import call as simt_call

pytestmark = needs_sources


# ---- the example -----------------------------------------------------------------------------------------------------


def compress_file(folder: Path, x: np.ndarray, *arguments: object, n: object = None) -> subprocess.CompletedProcess:
    """Runs the example on tokens x [..., N, D]; arguments: KEEP, or KEEP and THREADS. n: a wrong N to pass."""
    x.tofile(folder / "tokens.f32")
    keep, *threads = arguments
    sizes = [x.shape[-2] if n is None else n, x.shape[-1], keep]
    words = ["compress", "tokens.f32", *sizes, "kept.f32", "indices.i64", *threads]
    program = built("example", make_example) / "build/vendor/compress"
    return subprocess.run([str(w) for w in words], executable=program, cwd=folder, capture_output=True, text=True)


@needs_op
@pytest.mark.parametrize("threads", [(), (1,), (2,), (7,)], ids=["default", "1", "2", "7"])
@pytest.mark.parametrize("shape", [(1, 576, 256), (5, 200, 65)], ids=str)
def test_example_gives_the_bits_of_the_op(tmp_path: Path, shape: tuple[int, ...], threads: tuple):
    x = tokens(*shape, kind="clustered")
    done = compress_file(tmp_path, x.numpy(), 64, *threads)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"apet {version()}, ")
    kept, indices = torch.ops.apet.compress(x, 64)
    assert_same(torch.from_file(str(tmp_path / "kept.f32"), size=kept.numel()), kept.flatten(), "kept")
    found = torch.from_file(str(tmp_path / "indices.i64"), size=indices.numel(), dtype=torch.int64)
    assert_same(found, indices.flatten(), "indices")
    assert (tmp_path / "kept.f32").stat().st_size == kept.nbytes


@pytest.mark.parametrize(
    ("arguments", "n", "message"),
    [
        ((5,), None, "keep=5 is outside 1..4, the tokens of an image"),
        ((-1,), None, "keep=-1 is outside 1..4, the tokens of an image"),
        (("many",), None, "KEEP is 'many', not a number"),
        (("9" * 30,), None, f"KEEP is '{'9' * 30}', not a number"),
        ((1,), 0, "x has 0 tokens per image; at least 1 is needed"),
        ((1,), 3, "tokens.f32 does not hold whole images of 9 float32"),
        ((2, 0), None, "THREADS is 0, outside 1..256"),
        ((2, 257), None, "THREADS is 257, outside 1..256"),
        ((2, "x"), None, "THREADS is 'x', not a number"),
    ],
)
def test_example_reports_errors(tmp_path: Path, arguments: tuple, n: int | None, message: str):
    done = compress_file(tmp_path, np.zeros((4, 3), np.float32), *arguments, n=n)
    assert (done.returncode, done.stderr) == (1, f"{message}\n")
    assert not (tmp_path / "kept.f32").exists()


def test_example_reports_files_that_it_cannot_open(tmp_path: Path):
    program = built("example", make_example) / "build/vendor/compress"
    np.zeros((4, 3), np.float32).tofile(tmp_path / "x")
    for files, message in (
        (("none", "a", "b"), "none cannot be opened"),
        (("x", "no/a", "b"), "no/a cannot be opened"),
        (("x", "/dev/full", "b"), "/dev/full cannot be written"),
    ):
        words = [program, files[0], "4", "3", "1", *files[1:]]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (1, f"{message}\n")
    done = subprocess.run([program], capture_output=True, text=True)
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")


# ---- the guide's snippets --------------------------------------------------------------------------------------------


def call_guide(library: ctypes.CDLL, x: Tensor, keep: int) -> tuple[Tensor, Tensor, str]:
    """Calls the snippet's compress(); returns the outputs and the message."""
    images, n, dim = x.shape
    out, indices = x.new_empty(images, keep, dim), torch.empty(images, keep, dtype=torch.int64)
    sizes, wrong = (ctypes.c_int64 * 4)(images, n, dim, keep), ctypes.create_string_buffer(512)
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, out, indices)]
    library.guide_compress(pointers[0], sizes, *pointers[1:], wrong, ctypes.c_size_t(512))
    return out, indices, wrong.value.decode()


@needs_op
@pytest.mark.slow
def test_the_snippet_for_the_cpu_runs(tmp_path: Path):
    (tmp_path / "snippet.cpp").write_text(block("snippet: cpu"))
    archive = built("by_hand", make_by_hand) / "libapet.a"
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", *STRICT[:2], "-DAPET_STATIC", f"-I{tmp_path}", f"-I{CSRC}"]
    run("g++", *options, SOURCES / "guide_cpu.cpp", archive, "-o", tmp_path / "libguide.so")
    library, x = ctypes.CDLL(str(tmp_path / "libguide.so")), tokens(2, 100, 48)
    *got, wrong = call_guide(library, x, 12)
    assert wrong == ""
    for result, wanted in zip(got, torch.ops.apet.compress(x, 12), strict=True):
        assert_same(result, wanted)
    assert call_guide(library, x, 700)[2] == "keep=700 is outside 1..100, the tokens of an image"


@pytest.mark.skipif(simt_build.missing() is not None, reason=str(simt_build.missing()))
def test_the_snippet_for_cuda_runs_on_the_simulated_gpu(tmp_path: Path):
    (tmp_path / "snippet.cpp").write_text(block("snippet: cuda"))
    simulated = simt_build.library()
    options = [*simt_build.FLAGS, "-O1", "-shared", f"-I{tmp_path}", f"-I{CSRC}", f"-I{simt_build.HERE / 'include'}"]
    options += [SOURCES / "guide_cuda.cpp", simulated, f"-Wl,-rpath,{simulated.parent}"]
    run("g++", *options, "-o", tmp_path / "libguide.so")
    x, how = tokens(2, 100, 48, dtype=torch.float16), simt_call.How(seed=5)
    simt_call.use_device(how.device)
    library = ctypes.CDLL(str(tmp_path / "libguide.so"))
    *got, wrong = call_guide(library, x, 12)
    assert wrong == ""
    assert simt_call.finish(seed=5)
    with simt_call.always(how) as functions:
        for result, wanted in zip(got, functions.compress(x, 12), strict=True):
            assert_same(result, wanted)
    assert call_guide(library, x, 700)[2] == "keep=700 is outside 1..100, the tokens of an image"


@pytest.mark.skipif(not CUDA_HEADERS.exists(), reason=f"the headers of CUDA are not at {CUDA_HEADERS}")
def test_the_snippets_for_cuda_compile_against_its_headers(tmp_path: Path):
    source = tmp_path / "snippets.cpp"
    source.write_text(block("snippet: cuda") + block("snippet: graph"))
    run("g++", "-std=c++17", "-fsyntax-only", *STRICT, f"-I{CSRC}", f"-isystem{CUDA_HEADERS}", source)
