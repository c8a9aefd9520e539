"""Planted bugs: each is a change of a copy of the CUDA sources, which a certain detector must report."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.data import tokens
from tests.simt import build, call
from tests.simt.call import A100, How
from tests.test_cuda_simt import results

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))

RACE = r"WARNING: ThreadSanitizer: data race"
OVERFLOW = r"ERROR: AddressSanitizer: heap-buffer-overflow"
WRONG = "other bits"

# When a bug is planted. Each is a build of its own: every day only some without a sanitizer.
EVERY_DAY, SLOW = (), (pytest.mark.slow,)
ALL_BUGS = (*SLOW, pytest.mark.matrix)


class Bug:
    """A change [pattern, replacement] of a file in csrc/cuda, the launch in which it must show, and the expected
    report."""

    def __init__(
        self, name: str, file: str, change: list[tuple[str, str]], how: How, seen: str, when: tuple = ALL_BUGS
    ):
        self.name, self.file, self.change, self.how, self.seen, self.when = name, file, change, how, seen, when

    @property
    def sanitizer(self) -> str:
        return {RACE: "thread", OVERFLOW: "address"}.get(self.seen, "")


CLUSTER, FUSED, COOPERATIVE = (
    How(path="cluster", ctas_per_image=2),
    How(path="fused", ctas_per_image=2),
    How(A100, "cooperative", 2),
)
BUGS = [
    Bug(
        "a barrier is missing",
        "s1_s3_sweep.cuh",
        [(r"(warp_best\[warp\] = best;)\s*__syncthreads\(\);", r"\1")],
        FUSED,
        RACE,
        when=SLOW,
    ),
    Bug(
        "candidates are read before the group's barrier",
        "s1_s3_sweep.cuh",
        [(r"(group\.publish\(message, 3 \+ k\);)\s*group\.sync\(\);", r"\1")],
        CLUSTER,
        RACE,
    ),
    Bug("one set of slots instead of two", "group.cuh", [(r"turn_ \^= 1;", "")], CLUSTER, RACE),
    Bug(
        "residuals are ranked before all are there",
        "s1_s4_group.cuh",
        [(r"group\.sync\(\);  // rank and norm_sq of the whole image", "")],
        COOPERATIVE,
        RACE,
    ),
    Bug(
        "a flag that publishes nothing",
        "group.cuh",
        [(r"add_release\(arrived_, 1\);", "atomicAdd(arrived_, 1u);")],
        COOPERATIVE,
        RACE,
    ),
    Bug(
        "the second launch does not wait for the first",
        "s5_merge.cuh",
        [(r"wait_previous_launch\(\);", "")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "a count that is not atomic",
        "s4_topk.cuh",
        [(r"atomicAdd\((&histogram\[.*?\]), 1\)", r"*(\1) += 1")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "a list is read before the other CTAs have written it",
        "s1_s5_cluster.cuh",
        [(r"group\.sync\(\);  // the lists of all targets are written", "")],
        FUSED,
        RACE,
    ),
    Bug(
        "a count is raised before the warp has read it",
        "s5_lists.cuh",
        [(r"__syncwarp\(\);  // all lanes have read the count", "")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "one row too many",
        "s1_s3_sweep.cuh",
        [(r"min\(i0 \+ r, slice\.tokens - 1\)", "min(i0 + r, slice.tokens)")],
        How(path="cluster", ctas_per_image=2, resident=0),
        OVERFLOW,
        when=SLOW,
    ),
    Bug(
        "one column too many",
        "dot.cuh",
        [(r"if \(k \* Chunk<T>::kSize \+ i < dim\) chunk", "if (k * Chunk<T>::kSize + i <= dim) chunk")],
        How(path="cluster", ctas_per_image=2, resident=0),
        OVERFLOW,
    ),
    Bug(
        "rows lie one too far in shared memory",
        "s1_s3_sweep.cuh",
        [(r"call\.map\.resident \+ i \* call\.pitch", "call.map.resident + (i + 1) * call.pitch")],
        How(path="cluster", ctas_per_image=2),
        OVERFLOW,
    ),
    Bug(
        "a copy is not waited for",
        "s1_s3_sweep.cuh",
        [(r"copy_async_wait<0>\(\);", "")],
        FUSED,
        r"exits with \d+ asynchronous copies that it has not waited for",
        when=SLOW,
    ),
    Bug(
        "a copy is waited for one step too late",
        "s5_assign.cuh",
        [(r"copy_async_wait<kBuffers - 2>", "copy_async_wait<kBuffers - 1>")],
        CLUSTER,
        WRONG,
        when=EVERY_DAY,
    ),
    Bug(
        "a mask of half a warp",
        "s5_lists.cuh",
        [(r"__ballot_sync\(kAllLanes, own == t", "__ballot_sync(0xffffu, own == t")],
        FUSED,
        r"calls __ballot_sync with mask 0x0000ffff, which leaves out its lane",
        when=SLOW,
    ),
    Bug(
        "lanes that a shuffle waits for stay away",
        "s4_topk.cuh",
        [(r"if \(threadIdx\.x < 32\) \{", "if (threadIdx.x < 24) {")],
        CLUSTER,
        r"deadlock: .* waits in __shfl_up_sync",
    ),
    Bug(
        "means wait for one tile more than there is",
        "s5_merge.cuh",
        [(r"< \(uint32_t\)call\.tiles\)", "< (uint32_t)call.tiles + 1)")],
        CLUSTER,
        r"deadlock: .* waits in a loop around load_acquire",
        when=EVERY_DAY,
    ),
    Bug(
        "a thread leaves before a barrier",
        "s5_merge.cuh",
        [(r"if \(ticket >= end\) return;", "if (thread == 5) return;\n    if (ticket >= end) return;")],
        CLUSTER,
        r"divergent barrier: thread 5 of block \d+ exits|divergent barrier: .* 1 threads of the block have exited",
        when=SLOW,
    ),
    Bug(
        "shared memory of another CTA before that CTA runs",
        "group.cuh",
        [(r"sync\(\);  // shared memory of another CTA may be used only once that CTA runs", "")],
        How(path="cluster", ctas_per_image=2, seed=3),  # one block runs as far as it gets
        r"maps the shared memory of block \d+, which has not begun",
    ),
    Bug(
        "ties to the higher position",
        "call.cuh",
        [
            (r"\(0xffffffffu - \(uint32_t\)position\)", "(uint32_t)position"),
            (r"\(int\)\(0xffffffffu - \(uint32_t\)key\)", "(int)(uint32_t)key"),
        ],
        CLUSTER,
        WRONG,
        when=SLOW,
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [pytest.param(b, id=b.name.replace(" ", "_"), marks=b.when) for b in BUGS],
)
def test_planted_bugs(bug: Bug, tmp_path: Path):
    csrc = tmp_path / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = csrc / "cuda" / bug.file
    text = source.read_text()
    for pattern, replacement in bug.change:
        text, times = re.subn(pattern, replacement, text)
        assert times, f"{pattern} is no longer in {bug.file}: plant the bug again"
    source.write_text(text)
    # An odd D: rows end where their memory does. Repeated tokens: ties.
    x = tokens(1, 22, 63 if bug.sanitizer == "address" else 72, dtype=torch.float16, kind="repeated", seed=1)
    case = call.compress_case(x, 8, 3)
    program = build.program("driver.cpp", build.kernels(csrc, bug.sanitizer, only="float16"), bug.sanitizer)
    expected = {name: t.clone() for name, t in results(case, bug.how).items()}
    said = call.run_in_program(case, bug.how, program)
    if bug.seen == WRONG:
        assert said == ""
        assert any(not case.outputs[name].view(torch.uint8).equal(t.view(torch.uint8)) for name, t in expected.items())
    else:
        assert re.search(bug.seen, said), said or "nothing was seen"
