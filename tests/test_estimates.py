"""The estimates, and their table in docs/cuda.md."""

from __future__ import annotations

import re
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apet_kernels import choice, ops
from benchmarks.quick import figures
from tests.simt import build, call
from tests.simt.call import How

pytest.importorskip("triton")
from apet_kernels.triton_kernels import configs
from tools import estimates
from tools.estimates import CARDS, SHAPES, Card, cuda, mix, triton

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.mark.parametrize("name", SHAPES)
def test_the_plan_is_the_least_estimate_of_the_table(name):
    plan = cuda(CARDS["H100"], SHAPES[name])
    cells = dict(zip(estimates.COLUMNS, estimates.cells(SHAPES[name]), strict=True))
    times = {c.partition(": ")[2]: int(re.search(r"\d+", text)[0]) for c, text in cells.items() if text != "-"}
    paths = {path: times[path] for path in estimates.PATHS if path in times}
    assert round(plan.estimated_us) == min(paths.values()) == paths[estimates.PATHS[plan.path - 1]]
    assert sum("**" in text for column, text in cells.items() if column.startswith("H100")) == 1


def test_the_document_is_up_to_date():
    """`python -m tools.estimates --markdown` would change nothing but the commit."""

    def written(begin: str, end: str) -> list[str]:
        return estimates.GUIDE.read_text().partition(begin)[2].partition(end)[0].strip().splitlines()

    assert written(estimates.BEGIN, estimates.END)[1:] == estimates.table().strip().splitlines()[1:]
    assert written(estimates.TERMS_BEGIN, estimates.TERMS_END) == estimates.terms_table().strip().splitlines()
    assert written(estimates.ROUNDS_BEGIN, estimates.ROUNDS_END) == estimates.rounds_table().strip().splitlines()


def test_the_figures_have_one_list_of_names():
    rows = figures.read(estimates.HEADER.read_text())
    assert {tuple(row) for _, row in rows} == {("capability", *ops.FIGURES)}
    assert {card.device.capability for card in CARDS.values()} <= {row["capability"] for _, row in rows}


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("D", [1024, 3584])
def test_the_dispatcher_compares_these_estimates(card, D, monkeypatch):
    """On a device that says it is this card: both are of the paper's rule, and CUDA is taken, as docs/gpu.md says."""
    on = CARDS[card]
    row = {**estimates.card_figures(on.device.capability)}
    figures_of_card = tuple(row[name] for name in ops.FIGURES)
    major, minor = divmod(on.device.capability, 10)
    gpu = SimpleNamespace(major=major, minor=minor, multi_processor_count=on.device.multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(choice.registered, "_cuda_figures", lambda like, capability: figures_of_card, raising=False)
    by_cuda = lambda like, N, K: cuda(on, (1, N, like.shape[-1], K)).estimated_us  # noqa: E731
    monkeypatch.setattr(choice.registered, "_cuda_estimate", by_cuda, raising=False)
    monkeypatch.setattr(configs, "device_class", lambda device: on.device_class)
    got = choice.estimates(torch.device("cpu"), D, torch.bfloat16)
    shapes = [(1, N, D, K) for N, K in choice.IMAGES]
    assert got == [(cuda(on, shape).estimated_us, triton(on, shape).us) for shape in shapes]
    assert 1.2 <= round(statistics.geometric_mean(b / a for a, b in got), 1) <= 1.7


@pytest.mark.parametrize("card", CARDS)
def test_more_work_takes_longer(card):
    """More images, tokens or features have a higher estimate, and so have more kept tokens of a large image, whichever
    kernels run."""
    less, more = (1, 576, 1024, 64), ((64, 576, 1024, 64), (1, 4096, 1024, 64), (1, 576, 4096, 64))
    for way in (lambda shape: triton(CARDS[card], shape).us, lambda shape: cuda(CARDS[card], shape).estimated_us):
        assert all(way(shape) > way(less) for shape in more)
        assert way((1, 4096, 3584, 1229)) > way((1, 4096, 3584, 64))


def test_a_faster_card_is_estimated_to_be_faster():
    shape = (1, 16384, 3584, 4915)
    assert triton(CARDS["H100"], shape).us < triton(CARDS["A100"], shape).us
    few = Card(CARDS["H100"].device.__class__(90, multiprocessors=66), "sm_90a")
    for way in (lambda card: triton(card, shape).us, lambda card: cuda(card, shape).estimated_us):
        assert way(CARDS["H100"]) < 0.7 * way(few)
    # A matrix instruction that is faster shortens only what does not wait for L2.
    assert triton(CARDS["H100"], shape, torch.bfloat16).us < triton(CARDS["H100"], shape, torch.float32).us / 3


@pytest.mark.parametrize("path", [*estimates.PATHS, "best"])
@pytest.mark.parametrize("name", SHAPES)
def test_the_terms_add_up(name, path):
    """To the estimate of the plan; and each is of its own: none is negative, and s4 grows with N alone."""
    problem, how = estimates.problem(SHAPES[name]), How(CARDS["H100"].device, path)
    try:
        terms = call.terms(problem, how)
    except call.NoPath:
        assert path == "fused"
        assert SHAPES[name][2] == 3584
        return
    assert sum(terms.values()) == pytest.approx(call.plan(problem, how).estimated_us, rel=1e-12)
    assert min(terms.values()) >= 0
    B, N, D, keep = SHAPES[name]
    more = call.terms(estimates.problem((B, N, D, keep // 2)), how)
    assert more["topk"] == terms["topk"]
    assert terms["rounds"] == 0


def test_what_the_terms_depend_on():
    H100, A100 = (CARDS[card].device for card in ("H100", "A100"))

    def terms(shape: tuple[int, int, int, int], **how: Any) -> dict[str, float]:
        return call.terms(estimates.problem(shape), How(**({"device": H100} | how)))

    small = (1, 576, 1024, 64)
    cluster, cooperative = terms(small, path="cluster"), terms(small, path="cooperative")
    assert cooperative["launches"] > cluster["launches"]
    # The exchange of a cooperative launch grows with the group.
    few = terms(small, path="cooperative", ctas_per_image=4)
    assert cluster["exchanges"] < few["exchanges"] < cooperative["exchanges"]
    # Four warps of an SM do not reach the rate that eight reach.
    large = (1, 576, 1024, 288)
    slow = terms(large, device=A100, path="cooperative", tile=64, tile_rows=64)["products"]
    assert slow > terms(large, device=A100, path="cooperative", tile=64, tile_rows=128)["products"] / 2
    # In `fused`, more CTAs have fewer products each, but no warp has less than its 32 x 32.
    fused = [terms(small, path="fused", ctas_per_image=n)["products"] for n in (8, 16)]
    assert fused[0] == fused[1]
    # One CTA selects, in time that grows with the tokens.
    few, many = (terms((1, n, 3584, 307), path="cooperative")["topk"] for n in (1024, 16384))
    assert 3 * few < many <= 15


@pytest.mark.parametrize("name", SHAPES)
def test_the_mix_lies_between_its_parts(name):
    card, shape = CARDS["H100"], SHAPES[name]
    assert triton(card, shape).merge_us < mix(card, shape) < cuda(card, shape).estimated_us + triton(card, shape).us
