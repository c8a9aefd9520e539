"""The libraries that benchmarks/gpu_quick.py builds, or takes from benchmarks/gpu_carry.py."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_carry
from benchmarks.quick import build
from tools import sass


def test_libraries_of_other_sources_are_not_taken(tmp_path):
    (tmp_path / "carried").mkdir()
    with pytest.raises(RuntimeError, match="holds no manifest"):
        build.take(tmp_path / "carried", tmp_path / "into")
    manifest = build.Built("CMake and ninja", "90a-real", "0123456789abcdef", list(build.CUDA))
    for name in build.CUDA:
        (tmp_path / "carried" / name).write_text("not really")
    for sources, fine in ((manifest.sources, False), (build.sources(), True)):
        kept = dataclasses.replace(manifest, sources=sources)
        (tmp_path / "carried" / build.MANIFEST).write_text(json.dumps(vars(kept)))
        archive = tmp_path / "carried.tar"
        with tarfile.open(archive, "w") as packed:
            for path in (tmp_path / "carried").iterdir():
                packed.add(path, path.name)
        for place in (tmp_path / "carried", archive):
            into = tmp_path / f"into-{fine}-{place.suffix}"
            if fine:
                assert build.take(place, into).how == "carried; built by CMake and ninja"
                assert {p.name for p in into.iterdir()} == {*build.CUDA, build.MANIFEST}
            else:
                with pytest.raises(RuntimeError, match="are of other sources"):
                    build.take(place, into)


def test_what_nvcc_is_told():
    assert build.gencode("80-real;90") == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
    ]


def test_the_package_has_no_libraries_of_the_checkout(tmp_path):
    build.make_package(tmp_path / "package")
    copied = {p.relative_to(tmp_path / "package").as_posix() for p in (tmp_path / "package").rglob("*.*")}
    assert "apet_kernels/triton_kernels/s5_mean.py" in copied
    assert not any(name.endswith(".so") for name in copied)


needs_nvcc = pytest.mark.skipif(sass.nvcc() is None, reason="there is no nvcc")


@needs_nvcc
@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("direct", [False, True], ids=["cmake", "direct"])
def test_libraries_are_built_and_bind_to_torch_alone(tmp_path, monkeypatch, direct):
    """Every undefined symbol of the binding is torch's, the CUDA library's, or the system's."""
    if direct:
        monkeypatch.setattr(build, "missing_for_cmake", lambda: "cmake")
    elif lacks := build.missing_for_cmake():
        pytest.skip(f"there is no {lacks}")
    archive, into = tmp_path / "carried.tar", tmp_path / "into"
    monkeypatch.setattr(sys, "argv", ["it", "--out", str(archive), "--archs", "90-real"])
    gpu_carry.main()
    built = build.take(archive, into)
    assert ("directly" in built.how) == direct
    assert set(built.libraries) == {*build.CUDA, *(() if direct else build.CPU)}
    assert not list(into.glob("*objects*"))

    def symbols(path: Path, kind: str) -> set[str]:
        said = subprocess.check_output(["nm", "-D", kind, path], text=True)
        return {line.split()[-1].partition("@")[0] for line in said.splitlines() if " w " not in line}

    torch_libraries = [Path(torch.__file__).parent / "lib" / name for name in ("libtorch_cpu.so", "libc10.so")]
    ours = [into / name for name in built.libraries if name != "libapet_cuda_torch.so"]
    there = set().union(*(symbols(path, "--defined-only") for path in (*torch_libraries, *ours)))
    lacks = {
        n for n in symbols(into / "libapet_cuda_torch.so", "--undefined-only") if re.match(r"apet|_ZN4apet|aoti", n)
    }
    # A torch without CUDA has neither of these.
    assert lacks - there <= {"aoti_torch_get_current_cuda_stream", "aoti_torch_create_cuda_guard"}
    assert "apet_cuda_run" in lacks
