"""Faults to inject: each is a change of a copy of the CUDA sources, with the way to run it and the expected report."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.data import tokens
from tests.judge import bits

from . import build, call
from .call import A100, Case, How

RACE = r"WARNING: ThreadSanitizer: data race"
OVERFLOW = r"ERROR: AddressSanitizer: heap-buffer-overflow"
WRONG = "other bits"

# When a fault is injected. Each needs a separate build, so `make test` injects only some that need no sanitizer.
EVERY_DAY, SLOW = (), (pytest.mark.slow,)
ALL_BUGS = (*SLOW, pytest.mark.matrix)


class Bug:
    """A change [pattern, replacement] of a file in csrc/cuda, the way to run it, and the expected report."""

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
        [(r"group\.sync\(\);  // rank and norm_sq of the whole image are written", "")],
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
        "sums of other warps are read before they are written",
        "s4_topk.cuh",
        [(r"__syncthreads\(\);  // the sums of all warps are written", "")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "tokens are listed before all have their target",
        "s1_s5_cluster.cuh",
        [(r"group\.sync\(\);  // the targets of all dropped tokens are written", "")],
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
        "product.cuh",
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
        [(r"if \(warp == c\) \{", "if (warp == c && lane < 24) {")],
        CLUSTER,
        r"deadlock: .* waits in __shfl_up_sync",
    ),
    Bug(
        "means wait for one ticket more than there is",
        "s5_merge.cuh",
        [
            (
                r"wait_until_done\(s, call\.tiles \+ call\.list_tickets\)",
                "wait_until_done(s, call.tiles + call.list_tickets + 1)",
            )
        ],
        CLUSTER,
        r"deadlock: .* waits in wait_acquire",
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
        How(path="cluster", ctas_per_image=2, seed=3),  # one block runs as far as it can
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
    Bug(
        "picks are read before they are made",
        "s1_rounds.cuh",
        [(r"group\.sync\(\);  // the picks are made", "")],
        COOPERATIVE,
        RACE,
        when=SLOW,
    ),
    Bug(
        "y is computed before all products are there",
        "s1_rounds.cuh",
        [(r"__syncthreads\(\);  // z of the slice is written", "")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "the diagonal is changed before all have read it",
        "s1_pool.cuh",
        [(r"__syncthreads\(\);  // all threads have read the diagonal and the best of the warps", "")],
        CLUSTER,
        RACE,
    ),
    Bug(
        "gram is read before it is updated",
        "s1_rounds.cuh",
        [(r"group\.sync\(\);  // the products of the picks are subtracted from gram", "")],
        replace(COOPERATIVE, seed=3),  # with others, CTA 1 leaves the barrier before when CTA 0 has read gram already
        RACE,
    ),
    Bug(
        "a product too few is subtracted from gram",
        "s1_pool.cuh",
        [(r"for \(int j = 0; j < kGramPicks; j\+\+\)", "for (int j = 1; j < kGramPicks; j++)")],
        CLUSTER,
        WRONG,
        when=SLOW,
    ),
    Bug(
        "medoids are listed before all are found",
        "s4_medoids.cuh",
        [(r"group\.sync\(\);  // all medoids are written, and all keys and lists are read", "")],
        COOPERATIVE,
        RACE,
    ),
    Bug(
        "one candidate too few",
        "s1_rounds.cuh",
        [(r"kPool \* wanted\)", "kPool * wanted - 1)")],
        CLUSTER,
        WRONG,
        when=EVERY_DAY,
    ),
    Bug(
        "candidates that tie to the higher position",
        "s1_pool.cuh",
        [(r"pack\(value, i\)", "pack(value, count - 1 - i)"), (r"p = unpack\(best\)", "p = count - 1 - unpack(best)")],
        COOPERATIVE,
        WRONG,
        when=SLOW,
    ),
    Bug("the diagonal of L counts twice", "s1_rounds.cuh", [(r"lane > q", "lane >= q")], CLUSTER, WRONG),
    Bug(
        "the pool keeps what earlier rounds explain",
        "s1_rounds.cuh",
        [(r"pool_gram<T>\(call, image, rounds, count, column,", "pool_gram<T>(call, image, rounds, count, 0,")],
        CLUSTER,
        WRONG,
    ),
    Bug(
        "the higher of two members",
        "s4_medoids.cuh",
        [(r"min\(target, listed\(0\)\)", "max(target, listed(0))")],
        COOPERATIVE,
        WRONG,
        when=SLOW,
    ),
]
IN_ROUNDS = ("s1_pool.cuh", "s1_rounds.cuh", "s4_medoids.cuh")


def inject(bug: Bug, folder: Path) -> Path:
    """Returns a copy of csrc in a new folder, with the bug."""
    csrc = folder / "csrc"
    shutil.copytree(build.CSRC, csrc)
    source = csrc / "cuda" / bug.file
    text = source.read_text()
    for pattern, replacement in bug.change:
        text, times = re.subn(pattern, replacement, text)
        assert times, f"{pattern} is no longer in {bug.file}: inject the bug again"
    source.write_text(text)
    return csrc


def small(bug: Bug) -> Case:
    """Returns a case that shows the bug. An odd D has rows that end where their memory does. Repeated tokens give
    ties."""
    D = 63 if bug.sanitizer == "address" else 72
    if bug.file == "s4_medoids.cuh":
        x = tokens(1, 40, D, dtype=torch.float16, kind="clustered", seed=1)
        return call.compress_case(x, 20, None, select="qr", refine=1)
    if "gram" in bug.name:  # which is updated only in rounds of more than 32 picks
        x = tokens(1, 150, D, dtype=torch.float16, kind="clustered", seed=1)
        return call.compress_case(x, 140, None, select="qr")
    if bug.file in IN_ROUNDS:
        return call.compress_case(almost_on_an_axis(D), 20, None, select="qr")
    return call.compress_case(tokens(1, 22, D, dtype=torch.float16, kind="repeated", seed=1), 8, 3)


def almost_on_an_axis(D: int) -> torch.Tensor:
    """Returns tokens [1, 40, D]. Of the ten longest nine lie almost on an axis, and two of these are equal. A round of
    five picks among ten candidates takes the tenth second. It explains a part of every second one of the others."""
    x = tokens(1, 40, D, dtype=torch.float16, seed=1) / 64
    x[0, :9, 0] += torch.linspace(10, 9.2, 9)
    x[0, 9, 1] += 9
    x[0, range(10, 40), range(2, 32)] += torch.linspace(5, 1, 30)
    x[0, 10::2, 1] += 5
    x[0, 1] = x[0, 0]
    return x


def both(bug: Bug, csrc: Path, case: Case) -> tuple[str, dict[str, torch.Tensor]]:
    """Runs the case with and without the bug, and leaves the results with the bug in the case. Returns the output of
    the sanitized program, and the results without the bug."""
    call.run(case, bug.how)
    right = {name: t.clone() for name, t in case.outputs.items()}
    program = build.program("driver.cpp", build.kernels(csrc, bug.sanitizer, only="float16"), bug.sanitizer)
    return call.run_in_program(case, bug.how, program), right


def differs(case: Case, right: dict[str, torch.Tensor]) -> bool:
    """Returns whether a bit of the results differs."""
    return any(not bits(case.outputs[name]).equal(bits(t)) for name, t in right.items())
