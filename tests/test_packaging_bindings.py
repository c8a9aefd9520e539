"""The compiled libraries: their exports, and that their bindings use only functions of the oldest torch."""

from __future__ import annotations

import re
import shutil
from importlib import util
from pathlib import Path

import pytest

from tests.binaries import (
    LIBRARY,
    OF_THE_RUNTIMES,
    PACKAGE,
    RUNTIMES,
    declared_for,
    exported,
    needed,
    needs_library,
    run,
    used_of_torch,
)

ROOT = Path(__file__).parents[1]


TORCH_FREE = sorted({LIBRARY, *PACKAGE.glob("libapet_cuda.so")})


@needs_library
@pytest.mark.parametrize("library", TORCH_FREE, ids=lambda path: path.stem)
def test_library_exports_exactly_its_part_of_the_header(library: Path):
    assert exported(library) == declared_for(library.stem)


@needs_library
@pytest.mark.parametrize("library", TORCH_FREE, ids=lambda path: path.stem)
def test_library_needs_no_torch_and_no_python(library: Path):
    """It needs no CUDA runtime either, since this is linked into it."""
    assert needed(library) <= RUNTIMES | ({"libapet"} if library != LIBRARY else set())
    assert "torch" not in run("nm", "-D", "--undefined-only", library)


def test_symbols_of_the_runtimes_are_told_from_torchs():
    """Bindings built with torch 2.10 and 2.11 take symbols of libstdc++ from libtorch."""
    of_std = [
        "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev",
        "_ZNKSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEE4sizeEv",
        "_ZTVSt13runtime_error",
        "_ZTTNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEE",
    ]
    of_torch = [
        "_ZN5torch6Tensor4sizeEv",
        "_ZNK2at10TensorBase4dataEv",
        "aoti_torch_get_dim",
        "_ZN3c105ErrorC1ENSt7__cxx11E",
    ]
    assert [name for name in of_std + of_torch if not OF_THE_RUNTIMES.search(name)] == of_torch


@needs_library
@pytest.mark.parametrize("binding", sorted(PACKAGE.glob("libapet*_torch.so")), ids=lambda path: path.stem)
def test_bindings_keep_to_the_stable_abi(binding: Path):
    """They use torch's C shims alone, and nothing of its C++ interface, so a build runs on later releases of torch."""
    assert used_of_torch(binding)


# The names of torch that the bindings use, all of them in the headers of 2.10.0. The installed torch may have more, but
# a build with 2.10 would then fail (as with STABLE_TORCH_ERROR_CODE_CHECK, which is new in 2.13).
IN_TORCH_2_10 = {
    "torch/csrc/stable/accelerator.h": ["stable::accelerator::DeviceGuard"],
    "torch/csrc/stable/device.h": ["stable::Device", ".index", ".is_cpu", ".is_cuda"],
    "torch/csrc/stable/library.h": ["STABLE_TORCH_LIBRARY_IMPL", "TORCH_BOX", ".impl"],
    "torch/csrc/stable/ops.h": ["stable::contiguous", "stable::get_num_threads", "stable::parallel_for"],
    "torch/csrc/stable/tensor.h": [
        *("stable::Tensor", ".const_data_ptr", ".device", ".dim", ".get", ".get_device_index", ".mutable_data_ptr"),
        *(".scalar_type", ".size", ".stride"),
    ],
    "torch/headeronly/core/ScalarType.h": [
        *("headeronly::ScalarType", "headeronly::toString", "ScalarType::BFloat16", "ScalarType::Bool"),
        *("ScalarType::Float", "ScalarType::Half", "ScalarType::Int", "ScalarType::Long"),
    ],
    # Both are included by stable/tensor.h.
    "torch/headeronly/util/shim_utils.h": ["TORCH_ERROR_CODE_CHECK"],
    "torch/csrc/inductor/aoti_torch/c/shim.h": [
        *("aoti_torch_empty_strided", "aoti_torch_get_current_cuda_stream", "aoti_torch_get_device_type"),
        *("aoti_torch_dtype_float32", "aoti_torch_dtype_int64", "aoti_torch_dtype_uint8", "aoti_torch_get_dtype"),
    ],
}
OF_CPLUSPLUS = {".begin", ".has_value", ".str"}


def test_bindings_use_nothing_newer_than_the_oldest_torch():
    known = {name for names in IN_TORCH_2_10.values() for name in names}
    used = set()
    for source in ("torch_ops.h", "torch_binding.cpp", "cuda_torch_binding.cpp"):
        text = re.sub(r"//.*", "", (ROOT / "csrc" / source).read_text())
        assert set(re.findall(r"#include <(torch/.*)>", text)) <= set(IN_TORCH_2_10), source
        used |= set(re.findall(r"\btorch::([\w:]+)|$", text)) | set(re.findall(r"\bScalarType::\w+", text))
        used |= set(re.findall(r"\b(?:\w*TORCH_|(?:aoti_)?torch_|AOTI_)\w+(?=\()", text))
        used |= {f".{name}" for name in re.findall(r"(?:\.|->)(\w+)\(", text)}
    assert used - {""} - OF_CPLUSPLUS == known


def test_the_cuda_binding_keeps_to_the_stable_abi(tmp_path: Path):
    """The same for the CUDA binding, without nvcc: it is plain C++, and uses only a stream of torch."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    include = Path(util.find_spec("torch").origin).parent / "include"
    source, library = ROOT / "csrc/cuda_torch_binding.cpp", tmp_path / "binding.so"
    defined = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    run(
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fvisibility=hidden",
        *defined,
        "-isystem",
        include,
        source,
        "-o",
        library,
    )
    used = used_of_torch(library)
    assert {name for name in used if "cuda" in name} == {
        "aoti_torch_device_type_cuda",
        "aoti_torch_get_current_cuda_stream",
    }


@needs_library
def test_libraries_find_each_other_wherever_they_lie():
    for library in PACKAGE.glob("*.so"):
        dynamic = run("readelf", "-d", library)
        assert set(re.findall(r"\((?:RUNPATH|RPATH)\).*\[(.*)\]", dynamic)) == {"$ORIGIN"}, library.name


@pytest.mark.parametrize("instruction_set", ["avx2", "avx512", "avx512_bf16", "amx", "amx_fp16"])
def test_code_of_one_instruction_set_stays_in_its_file(instruction_set: str):
    """Of equal inline functions in several files the linker keeps one. The AVX-512 copy would then run, and crash, on
    every processor. So these files must not define a symbol that another file may define."""
    objects = sorted((ROOT / "build").glob(f"*/csrc/CMakeFiles/apet.dir/cpu/isa_{instruction_set}.cpp.o"))
    if not objects:
        pytest.skip("not built in this checkout")
    for file in objects:
        symbols = run("nm", "--demangle", "--defined-only", file).splitlines()
        assert [line for line in symbols if line.split()[1] == "W"] == [], file
