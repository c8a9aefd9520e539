"""Finds the loads from global memory in compiled Triton kernels: the bytes of each, and its line in the kernel."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import torch


def narrow_loads(ttir: str, assembly: str, threads: int, dtype: torch.dtype) -> list[str]:
    """Returns messages about the loads of x that have fewer than 16 bytes although 16 are possible."""
    widths = collections.defaultdict(set)
    for place, line in placed(assembly):
        widths[place] |= load_bytes(line)
    loads = dict(loads_of("x", ttir))
    assert loads, "no load of x found: does the kernel's argument have another name?"
    return [
        f"{place} loads x by {min(widths[place], default=0)} bytes, {elements * dtype.itemsize} by {threads} threads"
        for place, elements in loads.items()
        if elements * dtype.itemsize >= 16 * threads and widths[place] != {16}
    ]


def placed(assembly: str) -> Iterator[tuple[str, str]]:
    """Yields every line of assembly with its `file:line:column` in the kernel."""
    place, inside = "", False
    for line in assembly.splitlines():
        inside = "begin inline asm" in line or (inside and "end inline asm" not in line)
        if not inside and (loc := re.match(r"\s*\.loc\s.*?(?://|;) (\S+)", line)):
            place = loc[1]  # locations inside are lines of the inline assembly
        yield place, line


def load_bytes(instruction: str) -> set[int]:
    """Returns the bytes that a thread loads from global memory with an instruction of PTX or of AMD."""
    if load := re.search(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", instruction):
        return {int(load[1] or 1) * int(load[2]) // 8}
    if copy := re.search(r"cp\.async\.c[ag]\.shared\.global\b.*\], (\w+)", instruction):
        return {int(copy[1], 0)}
    if load := re.search(r"\b(?:global|buffer)_load_(?:lds_)?(\w+)", instruction):
        words = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
        return {words.get(load[1], 2)}
    return set()


def loads_of(argument: str, ttir: str) -> Iterator[tuple[str, int]]:
    """Yields `file:line:column` and number of elements of every load through a pointer made from an argument."""
    locations = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", ttir, re.MULTILINE))
    pointers = {f"%{argument}"}
    for line in ttir.splitlines():
        if not (op := re.match(r"\s*(%\w+) = tt\.(\w+) (%\w+)", line)) or op[3] not in pointers:
            continue
        if op[2] != "load":
            pointers.add(op[1])
            continue
        at = re.search(r"loc\((#loc\d*)\)$", line)[1]
        while not (place := re.fullmatch(r'"(.*)":(\d+):(\d+)', locations[at])):
            at = re.search(r"#loc\d*", locations[at])[0]  # a named place, or the callee of a call
        shape = re.search(r"tensor<([\dx]+)x!tt.ptr", line)
        elements = functools.reduce(lambda a, b: a * int(b), shape[1].split("x"), 1) if shape else 1
        yield f"{Path(place[1]).name}:{place[2]}:{place[3]}", elements
