"""Every CUDA kernel compiles without spills, and the claims of docs/cuda.md hold for its machine code."""

from __future__ import annotations

import collections
import dataclasses
import re
from pathlib import Path

import pytest

from benchmarks.lib.sheet import replaced
from tools import sass

pytestmark = [
    pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing())),
    pytest.mark.slow,  # nvcc takes minutes for every kernel on two targets
]


@pytest.fixture(scope="module")
def kernels() -> list[sass.Kernel]:
    return sass.compile_all(sass.SMOKE)


def test_flags_are_those_of_the_build():
    text = (sass.CSRC / "CMakeLists.txt").read_text()
    assert "target_compile_options(apet_cuda PRIVATE -fmad=false" in text
    assert "CUDA_STANDARD 17" in text
    listed = set(re.findall(r"cuda/(\w+)\.cu\b", text))
    assert listed == {*sass.DTYPES, "device", "plan", "launch"}
    assert listed == {path.stem for path in (sass.CSRC / "cuda").glob("*.cu")}


def test_kernels_on_two_targets(kernels):
    assert list(sass.faults(kernels)) == []


def test_every_kernel_is_there(kernels):
    """Every kernel in the table of kernels.cuh, for every dtype and target."""
    names = collections.defaultdict(set)
    for kernel in kernels:
        names[kernel.target, kernel.dtype].add(
            re.sub(r"<.*>", "", kernel.name) if "s5_merge" in kernel.name else kernel.name
        )
    assert set(map(frozenset, names.values())) == {
        frozenset(
            {
                *(
                    f"{name}<{group}>"
                    for name in ("s1_s4_group", "s1_s4_rounds", "s4_medoids")
                    for group in ("ClusterGroup", "CooperativeGroup")
                ),
                *("s1_s5_cluster", "s5_merge"),
            }
        )
    }
    tiles = {"float32": 2, "float16": 4, "bfloat16": 4}  # of s5_merge
    assert len(kernels) == sum(7 + tiles[dtype] for _, dtype in sass.SMOKE)


@pytest.mark.parametrize("claim", sass.CLAIMS, ids=lambda claim: claim.text)
def test_a_claim_that_is_broken_is_noticed(kernels, claim):
    able = [k for k in kernels if re.search(claim.kernels, k.name) and k.dtype in claim.dtypes and k.capability >= 90]
    assert able
    for kernel in able:
        if claim.present:
            left = {name: n for name, n in kernel.instructions.items() if not re.fullmatch(claim.instruction, name)}
        else:
            known = {r"HMMA\.\S*": "HMMA.1688.F32.TF32", r"UCGABAR_\w+": "UCGABAR_ARV", "DFMA": "DFMA"}
            left = kernel.instructions | {known.get(claim.instruction, "REDG.E.ADD.F32.FTZ.RN"): 1}
        target = kernel.target if kernel.target in claim.targets else claim.targets[-1]
        broken = dataclasses.replace(kernel, target=target, instructions=collections.Counter(left))
        assert any(claim.text in fault for fault in broken.faults())
    others = [k for k in kernels if not re.search(claim.kernels, k.name)]
    assert any(claim.text in fault for fault in sass.faults(others))  # no kernel matches the claim


def cut(block: sass.Block, pattern: str, most: int, then: tuple[str, ...] = ()) -> list[sass.Block]:
    """Ends a block after `most` instructions that match, and `then`, if it has more of them."""
    places = [i for i, name in enumerate(block.names) if re.fullmatch(pattern, name)]
    if len(places) <= most:
        return [block]
    at = places[most]
    return [sass.Block((*block.names[:at], *then), False), sass.Block(block.names[at:], False)]


def apart(block: sass.Block, pattern: str, then: str) -> list[sass.Block]:
    """Puts `then` behind each instruction that matches."""
    pairs = ((name, then) if re.fullmatch(pattern, name) else (name,) for name in block.names)
    return [sass.Block(tuple(name for pair in pairs for name in pair), block.repeats)]


def shorter(block: sass.Block) -> list[sass.Block]:
    """Leaves eight of the matrix instructions of a loop."""
    last = [i for i, name in enumerate(block.names) if name.startswith("HMMA")][8:]
    names = tuple(name for i, name in enumerate(block.names) if i not in last)
    return [sass.Block(names, block.repeats)]


def polled(block: sass.Block) -> list[sass.Block]:
    """Empties L1 in every poll of a loop."""
    at = 1 + block.names.index("LDG.E.STRONG.GPU") if block.repeats and "LDG.E.STRONG.GPU" in block.names else 0
    return [sass.Block((*block.names[:at], "CCTL.IVALL", *block.names[at:]), True)] if at else [block]


# By the first words of a claim: what breaks it, of each block.
BROKEN = {
    "loads rows": lambda block: cut(block, r"HMMA\S*", 8, ("BRA",)),
    "has no loop": shorter,
    "has eight keys": lambda block: cut(block, r"LDG\.E\.STRONG\.GPU", 4, ("ATOMS.POPC.INC.32",)),
    "has eight 16-byte": lambda block: apart(block, r"LDG\.E\.128\S*", "LDG.E.U16"),
    "polls": polled,
    "has four ranks": lambda block: apart(block, r"LD\.E", "ATOMS.POPC.INC.32"),
}


@pytest.mark.parametrize("claim", sass.LOOP_CLAIMS, ids=lambda claim: claim.text.replace(" ", "_"))
def test_a_loop_that_is_broken_is_noticed(kernels, claim):
    able = [k for k in kernels if re.search(claim.kernels, k.name) and k.dtype in claim.dtypes and not k.empty]
    assert able
    (change,) = (change for words, change in BROKEN.items() if claim.text.startswith(words))
    for kernel in able:
        blocks = tuple(part for block in kernel.blocks for part in change(block))
        broken = dataclasses.replace(kernel, blocks=blocks)
        assert any(claim.text in fault for fault in broken.faults())
        assert not any(claim.text in fault for fault in kernel.faults())


def test_blocks_of_a_listing():
    """A block ends before a label and after a jump; a jump to its own label makes it a loop."""
    listing = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.STRONG.GPU R0, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_2) ;
        /*0040*/                   FADD R0, R0, R0 ;
.L_x_2:
        /*0050*/                   EXIT ;
    """
    blocks = sass.blocks_of(listing)
    assert [block.repeats for block in blocks] == [False, True, False, False, False]
    assert blocks[1].names == ("LDG.E.STRONG.GPU", "BRA")
    kernel = sass.Kernel("sm_90a", "float32", "k", 32, 8, 0, 0, 0, collections.Counter(), blocks)
    assert kernel.stream("LD|FADD") == "| LDC | [ LDG.E.STRONG.GPU ] | | FADD | "


FAULTY = """
#include <cuda_fp16.h>
namespace apet::cuda {
struct Call { float* at; int n; };
template <class T> __global__ void __launch_bounds__(256) %s(const Call call) {
  %s
}
template __global__ void %s<float>(const Call);
}
"""


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "float a[64]; for (int i = 0; i < call.n; i++) a[i % 64] = call.at[i]; call.at[0] = a[call.n];",
            "256 bytes of local",
        ),
        (
            "__shared__ float a[64]; a[threadIdx.x] = call.n; __syncthreads(); call.at[0] = a[call.n];",
            "256 bytes of static",
        ),
        ("atomicAdd(call.at, 1.5f);", "adds no floats atomically: 1"),
        ("call.at[threadIdx.x] = 1;", "writes results by 16 bytes: 0"),
    ],
    ids=["local memory", "static shared memory", "atomic float", "narrow store"],
)
def test_a_fault_in_machine_code_is_found(tmp_path: Path, body: str, said: str):
    """A kernel with one fault is compiled, and the fault is found."""
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/float32.cu").write_text(FAULTY % ("s5_merge", body, "s5_merge"))
    (kernel,) = sass.examine("sm_90a", "float32", tmp_path)
    assert (kernel.name, kernel.threads) == ("s5_merge", 256)
    assert any(said in fault for fault in kernel.faults())


def test_a_body_where_there_are_no_clusters(tmp_path: Path):
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/float32.cu").write_text(FAULTY % ("s1_s5_cluster", "call.at[threadIdx.x] = 1;", "s1_s5_cluster"))
    (kernel,) = sass.examine("sm_80", "float32", tmp_path)
    assert kernel.faults() == ["has a body, on a target without clusters"]


@pytest.mark.matrix
@pytest.mark.slow
def test_every_kernel_on_every_target():
    """There are no faults, and with the compiler that it names, docs/cuda.md is up to date."""
    kernels = sass.compile_all((target, dtype) for target in sass.TARGETS for dtype in sass.DTYPES)
    assert list(sass.faults(kernels)) == []
    text = sass.GUIDE.read_text()
    if f"nvcc {sass.compiler()}:" in text.partition(sass.BEGIN)[2].partition(sass.END)[0]:
        assert replaced(text, sass.BEGIN, sass.END, sass.table(kernels)) == text
