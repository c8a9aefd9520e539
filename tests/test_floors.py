"""Compares the counts of benchmarks/floors.py with the launches that are built, and with the operations of torch."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import floors
from benchmarks.lib import baselines
from benchmarks.lib.cases import BASIS, RIDGE, Case, gpu_cases, tokens

BF16 = Case(B=2, N=20, D=3, keep=12, dtype=torch.bfloat16, layout="overwrite")  # T = 2, N - K = 8, X = 240 bytes
# Rates of one byte and one operation a second, so that seconds are counts; a launch costs 1000, and 5000 on the host.
UNIT = floors.Rates("unit", 1.0, 1.0, 2.0, 1e9, 0.0, "none", gap=1000.0, host=5000.0)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("case", gpu_cases(), ids=lambda case: str(case).replace(" ", "-"))
def test_the_launches_are_those_of_the_triton_backend(case):
    from apet_kernels.triton_kernels import launch

    x = torch.empty(case.B, case.N, case.D, dtype=case.dtype, device="meta")
    call = launch.compress(x, case.keep, BASIS, layout=case.layout, device_class="sm_90a")
    names = [launched.kernel.fn.__name__ for launched in call.launches]
    assert names == [work.stage for work in floors.triton(case) for _ in range(work.launches)]


def test_times_by_hand():
    piece = floors.Work("some", launches=3, moved=10, again=((2, 100), (1, 30)), matrix=40, lanes=50)
    assert piece.touched() == 10 + 200 + 30
    assert piece.seconds(UNIT) == 3 * 1000 + 240
    cached = floors.Rates("cached", 1.0, 1.0, 2.0, 1e9, 80.0, "none", gap=0.0, host=7.0)
    assert piece.bytes(cached) == 10 + 2 * 20
    assert piece.seconds(cached) == 50  # bytes and float32 instructions take the same time, and overlap
    assert floors.graphed([piece, piece], cached) == 100
    assert floors.ungraphed([piece, piece], cached) == 100  # six launches at 7 hide behind the work
    assert floors.ungraphed([piece, piece], UNIT) == 6 * 5000


class Counter(TorchDispatchMode):
    """Counts operations other than views and allocations, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.operations += 1
            self.bytes += sum(map(distinct, tree_leaves((args, kwargs, result))))
        return result


def distinct(t: object) -> int:
    """Returns the bytes of a tensor, without the repetitions of `expand`."""
    if not isinstance(t, torch.Tensor):
        return 0
    once = [n for n, stride in zip(t.shape, t.stride(), strict=True) if stride]
    return torch.Size(once).numel() * t.element_size()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("B", "N", "D", "keep"), [(1, 60, 512, 30), (2, 90, 512, 14), (1, 80, 1024, 40)])
def test_the_published_formulation_as_it_runs(B, N, D, keep, dtype):
    case = Case(B, N, D, keep, dtype, "overwrite")
    x = tokens(case, seed=0)
    with Counter() as counter:
        baselines.published(x, keep, BASIS, "overwrite", 0, RIDGE)
    work = floors.published(case)
    assert sum(w.launches for w in work) == counter.operations
    touched = sum(w.touched() for w in work)
    assert 0.9 * counter.bytes <= touched <= counter.bytes  # small copies and arrays without a D are not counted


def test_the_published_formulation_by_hand():
    work = {w.stage: w for w in floors.published(BF16)}
    assert work["s5 cosine"].moved == 3 * (8 * 2 * 3 * 2) + (8 + 2) * 3 * 2
    assert floors.published_memory(BF16) == 3 * (8 * 2 * 3 * 2)
    assert work["s1"].touched() == 9 * 5 * (20 * 3 * 4)  # difference, square and sum, nine times


def test_the_document_holds_these_tables():
    text = floors.DOCUMENT.read_text()
    assert floors.replaced(text, floors.BEGIN, floors.END, floors.section()) == text, (
        "docs/gpu.md is not what `python -m benchmarks.floors --markdown` writes"
    )


def test_a_document_without_markers_raises():
    with pytest.raises(ValueError, match="there is no <b>"):
        floors.replaced("text", "<b>", "<e>", "body")
    with pytest.raises(ValueError, match="there is no <e>"):
        floors.replaced("text <b>", "<b>", "<e>", "body")
    assert floors.replaced("a <b> old <e> z", "<b>", "<e>", "new\n") == "a <b>\nnew\n<e> z"


def test_every_floor_is_below_what_it_is_the_floor_of():
    for case in gpu_cases():
        for device in floors.DEVICES:
            graphed = floors.graphed(floors.triton(case), device)
            assert floors.graphed(floors.floor(case), device) < graphed <= floors.ungraphed(floors.triton(case), device)
            assert floors.ungraphed(floors.triton(case), device) < floors.ungraphed(floors.published(case), device)
