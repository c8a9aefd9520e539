"""Every kernel compiles for every GPU and fits it: tools/offline.py, and tests of that tool."""

import dataclasses
import re

import pytest
import torch

from benchmarks.lib.sheet import replaced
from tools import loads, offline

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("instruction", "bytes_"),
    [
        ("@%p12 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd210 + 0 ];", 16),
        ("ld.global.L1::evict_last.v2.b64 { %rd1, %rd2 }, [ %rd3 + 0 ];", 16),
        ("@%p2 ld.global.b16 { %rs1 }, [ %rd45 + 0 ];", 2),
        ("cp.async.cg.shared.global [ %r98 + 0 ], [ %rd121 + 0 ], 0x10, %r99;", 16),
        ("cp.async.ca.shared.global [ %r98 + 0 ], [ %rd121 + 0 ], 0x4, %r99;", 4),
        ("global_load_dwordx4 v[2:5], v[6:7], off", 16),
        ("buffer_load_dwordx2 v[2:3], v2, s[20:23], 0 offen", 8),
        ("global_load_ushort v1, v[2:3], off", 2),
        ("buffer_load_dwordx4 v1, s[8:11], 0 offen lds", 16),
        ("st.global.v4.b32 [ %rd1 + 0 ], { %r1, %r2, %r3, %r4 };", None),
        ("ld.shared.v4.b32 { %r1, %r2, %r3, %r4 }, [ %r5 ];", None),
    ],
)
def test_bytes_of_a_load(instruction, bytes_):
    assert loads.load_bytes(instruction) == ({bytes_} if bytes_ else set())


def test_places_in_assembly():
    """Lines inside inline assembly have their own locations, which are not lines of the kernel."""
    ptx = """
	.loc	1 98 17                         // s1_norms.py:98:17
	// begin inline asm
	.loc	1 99 17                         // s1_norms.py:99:17
	@%p12 ld.global.v4.b32 { %r1 }, [ %rd1 + 0 ];
	// end inline asm
	.loc	2 36 12, function_name $L__info_string0, inlined_at 1 52 12 // device.py:36:12
	ld.global.b64 { %rd1 }, [ %rd2 + 0 ];
"""
    found = {place: loads.load_bytes(line) for place, line in loads.placed(ptx) if "ld." in line}
    assert found == {"s1_norms.py:98:17": {16}, "device.py:36:12": {8}}


def altered(kernel: str, **constants) -> tuple[list[str], list[str]]:
    """Runs in a process that compiles. Returns the faults of a kernel with other constants, and those of its loads."""
    problem = offline.Problem("compress", 1024, torch.float16)
    launch = next(one for one in problem.launches("sm_90a") if one.kernel.__name__ == kernel)
    launch = dataclasses.replace(launch, constants={**launch.constants, **constants})
    result, compiled = offline.examine_launch("sm_90a", launch, torch.float16)
    return result.faults, loads.narrow_loads(compiled.asm["ttir"], compiled.asm["ptx"], 128, torch.float16)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, None),
        ({"resident": 0}, "no program fits on a multiprocessor, with 168 registers per thread"),
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 300 << 10}, "needs 307200 bytes of shared memory of 232448"),
        ({"matrix": ""}, "multiplies 16-bit tokens without a matrix instruction"),
    ],
    ids=str,
)
def test_what_does_not_fit(change, fault):
    good = offline.Compiled("sm_90a", "s5_assign", 1024, torch.float16, 168, 0, 98304, 8, "wgmma.mma_async")
    changed = dataclasses.replace(good, **change)
    assert offline.misfits(changed, offline.TARGETS["sm_90a"], "") == ([fault] if fault else [])


@pytest.mark.slow
def test_faults_are_seen():
    with offline.pool(1) as executor:
        faults, narrow = executor.submit(altered, "s5_assign", BLOCK_R=256, BLOCK_D=256).result()
        assert any(re.fullmatch(r"needs \d+ bytes of shared memory of 232448", fault) for fault in faults), faults
        faults, narrow = executor.submit(altered, "s1_s3_sweep", BLOCK_N=64).result()
        assert any(re.fullmatch(r"spills \d+ bytes", fault) for fault in faults), faults
        assert narrow == []
        faults, narrow = executor.submit(altered, "s1_s3_sweep", ALIGN=2).result()
        assert len(narrow) == 1
        assert re.fullmatch(r"s1_s3_sweep.py:\d+:\d+ loads x by 2 bytes, 8192 by 128 threads", narrow[0])


@pytest.mark.matrix
@pytest.mark.slow  # minutes
def test_what_most_users_run():
    """Three sizes on three GPUs, 64 kernels."""
    results = offline.compile_all(offline.SMOKE, smoke=True)
    assert {r.target for r in results} == set(offline.SMOKE)
    assert {r.kernel for r in results} == {
        "s1_norms",
        "s1_s3_sweep",
        "s4_topk",
        "s5_assign",
        "s5_mean",
        "s4_given_rows",
        "s1_pool",
        "s1_rounds",
        "s4_medoids",
    }
    assert offline.faults(results) == []


def products(target: str) -> offline.Compiled:
    """Runs in a process that compiles. Returns s5_assign of 16-bit tokens."""
    problem = offline.Problem("compress", 1024, torch.float16)
    launch = next(one for one in problem.launches(target) if one.kernel.__name__ == "s5_assign")
    return offline.examine_launch(target, launch, torch.float16)[0]


@pytest.mark.slow
@pytest.mark.parametrize(("target", "instruction"), [("sm_100a", "tcgen05.mma"), ("sm_120a", "mma.sync")])
def test_both_sums_of_a_product_fit_the_registers(target, instruction):
    """GPUs with their own tile that test_what_most_users_run leaves out."""
    with offline.pool(1) as executor:
        compiled = executor.submit(products, target).result()
    assert compiled.faults == []
    assert compiled.matrix == instruction


@pytest.mark.matrix
@pytest.mark.slow
def test_every_gpu_and_size():
    """The table in docs/gpu.md is also what `python -m tools.offline --markdown` writes."""
    results = offline.compile_all(offline.TARGETS, smoke=False)
    assert offline.faults(results) == []
    text = offline.GUIDE.read_text()
    assert replaced(text, offline.BEGIN, offline.END, offline.table(results)) == text
