"""Faults injected into the PTX text, one instruction at a time."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from tests.judge import bits
from tests.simt.call import Case, Fault, How

from . import build, call


@dataclass(frozen=True)
class Injected:
    """A change of one line that matches `pattern`."""

    name: str
    pattern: str
    change: Callable[[str], str]


def swapped(group: int, i: int, j: int) -> Callable[[str], str]:
    """Exchanges registers i and j of the instruction's braces number `group`."""

    def change(line: str) -> str:
        braces = list(re.finditer(r"\{(.*?)\}", line))[group]
        names = braces[1].split(",")
        names[i], names[j] = names[j], names[i]
        return line[: braces.start(1)] + ",".join(names) + line[braces.end(1) :]

    return change


def replaced(old: str, new: str) -> Callable[[str], str]:
    return lambda line: re.sub(old, new, line)


def further(by: int) -> Callable[[str], str]:
    """Moves an address by some bytes."""

    def change(line: str) -> str:
        return re.sub(r"\[(%\w+)(?:\+(-?\d+))?\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + by}]", line, count=1)

    return change


def deleted(line: str) -> str:
    return ""


A_BARRIER = "a barrier of the CTA deleted"
MMA, MATRICES = r"\bmma\.sync", r"\bldmatrix\.sync"
INJECTED = (
    Injected("mma: a1 and a2 exchanged", MMA, swapped(1, 1, 2)),
    Injected("mma: b0 and b1 exchanged", MMA, swapped(2, 0, 1)),
    Injected("mma: d0 and d1 exchanged", MMA, swapped(0, 0, 1)),
    Injected("ldmatrix: r0 and r1 exchanged", MATRICES, swapped(0, 0, 1)),
    Injected("ldmatrix: r1 and r2 exchanged", MATRICES, swapped(0, 1, 2)),
    Injected("ldmatrix: a row 16 bytes further", MATRICES, further(16)),
    Injected("polls acquire nothing", r"\bfence\.acq_rel\.gpu", deleted),
    Injected("polls made plain", r"\bld\.relaxed\.gpu", replaced(r"\.relaxed\.gpu", "")),
    Injected("acquire made plain", r"\bld\.acquire\.gpu", replaced(r"\.acquire\.gpu", "")),
    Injected("release made relaxed", r"\bred\.release|\batom\.add\.release", replaced("release", "relaxed")),
    Injected("a release deleted", r"\bred\.release", deleted),
    Injected("cp.async.commit_group deleted", r"\bcp\.async\.commit_group", deleted),
    Injected("cp.async.wait_group 1 made 2", r"\bcp\.async\.wait_group\s+1", replaced(r"1;", "2;")),
    Injected("cp.async: 16 bytes further", r"\bcp\.async\.cg", further(16)),
    Injected("griddepcontrol.wait deleted", r"\bgriddepcontrol\.wait", deleted),
    Injected("mapa of rank 0", r"\bmapa\.u64", replaced(r"%r\d+;", "0;")),
    Injected("atom.max made add", r"\batom\.global\.max\.u64", replaced("max", "add")),
    Injected("a barrier of the cluster deleted", r"\bbarrier\.cluster\.arrive", deleted),
    Injected(A_BARRIER, r"\b(?:bar|barrier)\.sync\s", deleted),
    Injected("a barrier of the warp deleted", r"\bbar\.warp\.sync", deleted),
    Injected("a store 4 bytes further", r"\bst\.shared\.u32\s+\[%", further(4)),
    Injected("a store of the result 16 bytes further", r"\bst\.global\.v4\.\w32\s+\[%", further(16)),
    Injected("a shuffle of another lane", r"\bshfl\.sync\.bfly", replaced(r"(%r\d+\|%p\d+, %r\d+), %r\d+", r"\1, 0")),
)
# Faults of s1_s4_rounds and s4_medoids: the last five are of what only these compute.
IN_ROUNDS = (
    *(
        fault
        for fault in INJECTED
        if re.match("mma: [ab]|ldmatrix: r0|ldmatrix: a row|cp.async|atom|a barrier of the C|release made", fault.name)
    ),
    Injected(
        "a product and its addition dropped",
        r"\bfma\.rn\.f(?:32|64)\s+%\w+, %\w+, %\w+, %\w+;",
        replaced(r"fma\.rn\.(f\d\d)(\s+%\w+), %\w+, %\w+, (%\w+);", r"mov.\1\2, \3;"),
    ),
    Injected("a smaller key preferred", r"(?<!\.)\bmax\.u64", replaced("max", "min")),
    Injected("an entry of gram 8 bytes further", r"\bld\.global\.cg\.f64", further(8)),
    Injected("a number of y 4 bytes further", r"\bst\.(?:global\.)?f32\s+\[%rd", further(4)),
    Injected("a shuffle from lane 1", r"\bshfl\.sync\.idx", replaced(r"(%r\d+\|%p\d+, %r\d+), %?\w+", r"\1, 1")),
)


@dataclass(frozen=True)
class Harmless:
    """Instructions that no result depends on: those of the line where this text ends, and those inlined there."""

    fault: str  # its name
    file: str  # in csrc/cuda
    source: str  # a pattern
    why: str
    kernels: str = ""  # a pattern; in other kernels the fault must be noticed

    def holds(self, place: Place) -> bool:
        return (
            not _lines(self.file, self.source).isdisjoint(place.source)
            and re.search(self.kernels, place.kernel) is not None
        )


HARMLESS = (
    Harmless(
        A_BARRIER,
        "s5_assign.cuh",
        r"__syncthreads\(\);  // all threads have finished the previous tile",
        "a barrier opens each ticket",
        kernels="s5_merge",
    ),
    Harmless(
        A_BARRIER,
        "group.cuh",
        r"this_grid\(\)\.sync\(\);",
        "thread 0 zeroes the counter, arrives and polls; the others meet it before they depend on that",
    ),
    Harmless(
        A_BARRIER,
        "s4_topk.cuh",
        r"ties\[c\] = found\[3 \* c \+ 2\];\s*\}\s*__syncthreads\(\);",
        "the next pass has two barriers before it writes `found`, and one before it counts",
    ),
    Harmless(
        A_BARRIER,
        "s1_s4_group.cuh",
        r"__syncthreads\(\);  // s4 has finished",
        "as launched, a cluster takes one image",
        kernels="ClusterGroup",
    ),
    Harmless(
        A_BARRIER,
        "s1_s4_rounds.cuh",
        r"__syncthreads\(\);  // s4 has finished",
        "likewise",
        kernels="ClusterGroup",
    ),
    Harmless(
        A_BARRIER,
        "s4_medoids.cuh",
        r"__syncthreads\(\);  // all threads have finished with the image before",
        "likewise",
        kernels="ClusterGroup",
    ),
    Harmless(
        A_BARRIER,
        "s4_medoids.cuh",
        r"group\.sync\(\);  // the lists are written, and all keys are 0",
        "the next step, and the next image, begin with a barrier",
    ),
    Harmless(
        "a shuffle from lane 1",
        "s1_rounds.cuh",
        r"__shfl_sync\(kAllLanes, \(float\)\(value\[r\] \* inv_diag\), q\), value\[r\]\);",
        "the last of them is of the last pick, which no lane multiplies",
    ),
    Harmless(
        "a shuffle from lane 1",
        "s5_mean.cuh",
        r"__shfl_sync\(kAllLanes, position, min\(q \+ f, listed - 1\)\)",
        "the last of eight rows in flight lies past the end of the lists of these calls, and is not added",
    ),
    Harmless(
        "a shuffle of another lane",
        "s5_lists.cuh",
        r"below \+= __shfl_xor_sync\(kAllLanes, below, step\);",
        "these calls have one block of targets, and no key is below its first",
    ),
    Harmless(
        A_BARRIER,
        "s1_s5_cluster.cuh",
        r"\(int\)\(i % blocks\)\);\s*__syncthreads\(\);",
        "as launched, a cluster takes one image",
    ),
    Harmless(
        "a store 4 bytes further",
        "s1_s3_sweep.cuh",
        r"if \(threadIdx\.x == 0\) \*work = ",
        "the last store, of target_count, a zero that is not read: s4 counts",
    ),
)
SEEDS = (3, 0, 4, 5, 6, 9, 1, 2)  # of all kinds of schedules; most at random


@functools.cache
def _lines(file: str, source: str) -> set[str]:
    """Returns the places, FILE:LINE, at which text that matches ends."""
    text = (build.CSRC / "cuda" / file).read_text()
    found = {f"{file}:{text.count(chr(10), 0, match.end()) + 1}" for match in re.finditer(source, text)}
    assert found, f"{source} is no longer in {file}"
    return found


class Place(NamedTuple):
    """An instruction of a text."""

    line: int
    kernel: str
    source: tuple[str, ...]  # FILE:LINE in csrc/cuda, and the lines at which it is inlined

    def __str__(self) -> str:
        return f"line {self.line} of the PTX, {' in '.join(self.source)}, {self.kernel}"


@dataclass
class Unchanged:
    """Calls in one way, by the unchanged PTX: their results, and the instructions that the first one executed."""

    how: How
    text: str
    calls: list[tuple[Case, dict[str, Tensor]]]
    places: list[Place]


def unchanged(how: How, *cases: Case) -> Unchanged:
    """Runs the cases. The first should notice every fault; the others have features that the first lacks."""
    text, calls, counts = call.text_of(cases[0], how), [], {}
    for case in cases:
        call.run(case, how)
        counts = counts or call.executed(text)
        calls.append((case, {name: t.clone() for name, t in case.outputs.items()}))
    places: list[Place] = []
    kernel, source = "", ()
    for number, line in enumerate(text.split("\n"), 1):
        if entry := re.match(r"\.visible \.entry (\w+)", line):
            kernel, source = entry[1], ()
        elif line.startswith("// "):
            source = tuple(line.split()[1:])
        elif counts.get(number):
            places.append(Place(number, kernel, source))
    return Unchanged(how, text, calls, places)


def of_kernel(way: Unchanged, name: str) -> Unchanged:
    """Returns the same calls, with the instructions of one kernel only."""
    return replace(way, places=[place for place in way.places if name in place.kernel])


def executed(way: Unchanged, fault: Injected) -> list[Place]:
    """Returns the executed instructions at which the fault can be injected and is not harmless."""
    lines = way.text.split("\n")
    harmless = [entry for entry in HARMLESS if entry.fault == fault.name]
    fits = [place for place in way.places if re.search(fault.pattern, lines[place.line - 1])]
    return [place for place in fits if not any(entry.holds(place) for entry in harmless)]


def inject(text: str, fault: Injected, number: int) -> str:
    """Returns the text with the fault in that line."""
    lines = text.split("\n")
    before, lines[number - 1] = lines[number - 1], fault.change(lines[number - 1])
    assert lines[number - 1] != before, f"{fault.name}: nothing changes in {before}"
    if "barrier.cluster.arrive" in before:  # with the wait for it
        wait = next(n for n in range(number, len(lines)) if lines[n].strip() and not lines[n].startswith("//"))
        assert "barrier.cluster.wait" in lines[wait], f"{lines[wait]} after {before}"
        lines[wait] = ""
    return "\n".join(lines)


def noticed(way: Unchanged, fault: Injected, place: Place) -> str:
    """Runs the calls with the fault, on a few schedules. Returns the first error of the interpreter, or the result that
    differs; "" if none."""
    text = inject(way.text, fault, place.line)
    try:
        for case, results in way.calls:
            for seed in (way.how.seed, *SEEDS):
                call.run(case, replace(way.how, seed=seed), text)
                for name, expected in results.items():
                    if not bits(case.outputs[name]).equal(bits(expected)):
                        return f"other {name}"
        return ""
    except Fault as found:
        return str(found)
    finally:
        call.forget(text)
