"""Faults planted in the PTX text, one instruction at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tests.judge import bits
from tests.simt.call import Case, Fault, How

from . import call


@dataclass(frozen=True)
class Planted:
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
    """An address some bytes further on."""

    def change(line: str) -> str:
        return re.sub(r"\[(%\w+)(?:\+(-?\d+))?\]", lambda m: f"[{m[1]}+{int(m[2] or 0) + by}]", line, count=1)

    return change


def deleted(line: str) -> str:
    return ""


MMA, MATRICES = r"\bmma\.sync", r"\bldmatrix\.sync"
PLANTED = (
    Planted("mma: a1 and a2 exchanged", MMA, swapped(1, 1, 2)),
    Planted("mma: b0 and b1 exchanged", MMA, swapped(2, 0, 1)),
    Planted("mma: d0 and d1 exchanged", MMA, swapped(0, 0, 1)),
    Planted("ldmatrix: r0 and r1 exchanged", MATRICES, swapped(0, 0, 1)),
    Planted("ldmatrix: r1 and r2 exchanged", MATRICES, swapped(0, 1, 2)),
    Planted("ldmatrix: a row 16 bytes further", MATRICES, further(16)),
    Planted("acquire made plain", r"\bld\.acquire\.gpu", replaced(r"\.acquire\.gpu", "")),
    Planted("release made relaxed", r"\bred\.release|\batom\.add\.release", replaced("release", "relaxed")),
    Planted("a release deleted", r"\bred\.release", deleted),
    Planted("cp.async.commit_group deleted", r"\bcp\.async\.commit_group", deleted),
    Planted("cp.async.wait_group 1 made 2", r"\bcp\.async\.wait_group\s+1", replaced(r"1;", "2;")),
    Planted("cp.async: 16 bytes further", r"\bcp\.async\.cg", further(16)),
    Planted("griddepcontrol.wait deleted", r"\bgriddepcontrol\.wait", deleted),
    Planted("mapa of rank 0", r"\bmapa\.u64", replaced(r"%r\d+;", "0;")),
    Planted("atom.max made add", r"\batom\.global\.max\.u64", replaced("max", "add")),
    Planted("a barrier of the cluster deleted", r"\bbarrier\.cluster\.arrive", deleted),
    Planted("a barrier of the CTA deleted", r"\b(?:bar|barrier)\.sync\s", deleted),
    Planted("a barrier of the warp deleted", r"\bbar\.warp\.sync", deleted),
    Planted("a store 4 bytes further", r"\bst\.shared\.u32\s+\[%", further(4)),
    Planted("a store of the result 16 bytes further", r"\bst\.global\.v4\S*\s+\[%", further(16)),
    Planted("a shuffle of another lane", r"\bshfl\.sync\.bfly", replaced(r"(%r\d+\|%p\d+, %r\d+), %r\d+", r"\1, 0")),
)


def planted_texts(text: str, counts: dict[int, int], fault: Planted) -> Iterator[tuple[int, str]]:
    """The line, and the text, of the fault at every instruction that was executed (call.executed)."""
    lines = text.split("\n")
    for number, count in sorted(counts.items()):
        line = lines[number - 1]
        if not count or not re.search(fault.pattern, line):
            continue
        edited = fault.change(line)
        assert edited != line, f"{fault.name}: nothing changes in {line}"
        if "barrier.cluster.arrive" in line and not edited:  # with the wait, which follows
            assert "barrier.cluster.wait" in lines[number]
            yield number, "\n".join([*lines[: number - 1], "", "", *lines[number + 1 :]])
        else:
            yield number, "\n".join([*lines[: number - 1], edited, *lines[number:]])


def noticed(case: Callable[[], Case], how: How, text: str, expected: dict) -> str:
    """What shows that a text is wrong: the interpreter's message, or which result differs; "" if nothing does."""
    run = case()
    try:
        call.run(run, how, text)
    except Fault as fault:
        return str(fault)
    finally:
        call.forget(text)
    return next((f"other {k}" for k, v in expected.items() if not bits(run.outputs[k]).equal(bits(v))), "")
