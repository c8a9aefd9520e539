"""Runs the Triton kernels' own IR on the CPU, by `ttsem`, which looks for accesses out of bounds and races.

    python -m tools.sanitize_triton

The tests run the kernels' Python code in Triton's interpreter. This program runs the output of Triton's frontend (TTIR,
for sm_90a). It compiles and executes every launch of every op, and checks for accesses outside of the launch's tensors,
for programs that access the same element, and for operations without a defined result. The results are checked as in
the tests. First it checks that a dropped mask is reported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path

import torch
import triton
import triton.language as tl
from torch import Tensor

from apet_kernels import reference
from apet_kernels.triton_kernels import launch
from tests.data import tokens
from tests.judge import assert_same, check

# A store without its mask: 20 elements, two programs of 16.
INJECTED, CASES = "injected", "cases"


@triton.jit
def injected(x, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(x + i, i)


def run_injected() -> None:
    injected[(2,)](torch.zeros(20, dtype=torch.int32), 16)


def backend(device_class: str) -> types.SimpleNamespace:
    """Returns the four ops with the tiles of a device class, launched for tensors on the CPU."""

    def op(name: str):
        def run(*args, **kwargs):
            results = getattr(launch, name)(*args, **kwargs, device_class=device_class).run()
            return results if len(results) > 1 else results[0]

        return run

    return types.SimpleNamespace(**{name: op(name) for name in ("compress", "compress_varlen", "score", "merge")})


def run_cases() -> None:
    """Runs every op, layout, select and dtype; sizes that leave tiles partly empty; ragged images, and wrong
    offsets."""
    torch.use_deterministic_algorithms(True)  # fresh tensors hold NaN
    small, real = backend("interpreter"), backend("sm_90a")  # tiles that few tokens fill, and those of a GPU
    for kernels, x, keep, options in (
        (small, tokens(2, 75, 70, kind="repeated"), 21, {}),
        (small, tokens(1, 75, 70, dtype=torch.bfloat16), 21, {"layout": "overwrite", "blend": 0.5, "select": "qr"}),
        (small, tokens(1, 40, 72, dtype=torch.float16, kind="clustered"), 40, {"layout": "append", "start": 3}),
        (real, tokens(1, 75, 520, dtype=torch.float16), 21, {"layout": "append"}),
        (real, tokens(2, 75, 33), 21, {"layout": "overwrite"}),
    ):
        done, indices = check(kernels, x, keep, 3, **options)
        if not options:
            assert_same(kernels.merge(x, indices), done, "merge")
        print(tuple(x.shape), x.dtype, options, flush=True)
    x = tokens(80, 70, dtype=torch.bfloat16)
    cu, cu_keep = (torch.tensor(offsets, dtype=torch.int32) for offsets in ([0, 33, 33, 34, 80], [0, 9, 9, 10, 30]))
    for layout in ("inplace", "append"):
        done, indices = small.compress_varlen(x, cu, cu_keep, 30, 47, 20, 3, layout=layout)
        check_ragged(x, cu, cu_keep, done, indices, small, layout)
    lies = torch.tensor([-7, 90, 33, 2**31 - 1, 5], dtype=torch.int32)
    for layout in ("overwrite", "append"):
        _, indices = small.compress_varlen(x, lies, lies.flip(0), 30, 47, 20, 3, layout=layout)
        assert int(indices.min()) >= 0
        assert int(indices.max()) < len(x)
    at = torch.tensor([[3, 74, 3, -5, 90, 0]])
    expected = reference.merge(x[None, :75], at, targets=at != 74)
    assert (small.merge(x[None, :75], at, targets=at != 74).float() - expected.float()).abs().max() < 0.02
    print("ragged, offsets that lie, merge", flush=True)


def check_ragged(
    x: Tensor,
    cu: Tensor,
    cu_keep: Tensor,
    done: Tensor,
    indices: Tensor,
    kernels: types.SimpleNamespace,
    layout: str,
) -> None:
    """Checks that each packed image [n, D] has the bits that it has alone."""
    appended = 3 if layout == "append" else 0
    for s, (first, end) in enumerate(zip(cu.tolist(), cu.tolist()[1:], strict=False)):
        row, keep = int(cu_keep[s]) + s * appended, int(cu_keep[s + 1] - cu_keep[s])
        if end > first:
            alone, at = kernels.compress(x[None, first:end], keep, 3, layout=layout)
            assert_same(done[row : row + keep + appended], alone[0], f"image {s}")
            assert_same(indices[row : row + keep + appended], at[0] + first, f"indices of image {s}")


def sanitized(what: str) -> dict:
    """Returns the report on one of the two runs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        command = [sys.executable, "-m", "ttsem.sanitize", "--json", str(report), __file__, "--", what]
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": path})
        return json.loads(report.read_text()) if report.exists() else {"verdict": "error"}


def drive() -> int:
    if not importlib.util.find_spec("ttsem"):
        print("ttsem is not installed; `make sanitize-triton` does it")
        return 2
    caught = sanitized(INJECTED)
    if caught["verdict"] != "oob_write":
        print(f"the injected fault was not reported: {caught}")
        return 1
    report = sanitized(CASES)
    unchecked = report.get("races_unchecked")
    print(f"{report['verdict']}: {report.get('launches')} launches, {unchecked} of them too large to look for races")
    return 0 if report["verdict"] == "ok" and not unchecked else 1


if __name__ == "__main__":
    if sys.argv[1:] == [INJECTED]:
        run_injected()
    elif sys.argv[1:] == [CASES]:
        run_cases()
    else:
        sys.exit(drive())
