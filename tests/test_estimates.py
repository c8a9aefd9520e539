"""The estimates, and their table in docs/cuda.md."""

from __future__ import annotations

import re

import pytest
import torch

from apet_kernels import ops
from benchmarks.quick import figures
from tests.simt import build

pytest.importorskip("triton")
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


def test_the_document_has_a_line_for_every_shape():
    text = estimates.GUIDE.read_text().partition(estimates.BEGIN)[2].partition(estimates.END)[0]
    assert re.findall(r"^\| (\S.*?) \| ", text, re.M) == ["tokens", *SHAPES]


def test_the_figures_have_one_list_of_names():
    rows = figures.read(estimates.HEADER.read_text())
    assert {tuple(row) for _, row in rows} == {("capability", *ops.FIGURES)}
    assert {card.device.capability for card in CARDS.values()} <= {row["capability"] for _, row in rows}


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


@pytest.mark.parametrize("name", SHAPES)
def test_the_mix_lies_between_its_parts(name):
    card, shape = CARDS["H100"], SHAPES[name]
    assert triton(card, shape).merge_us < mix(card, shape) < cuda(card, shape).estimated_us + triton(card, shape).us
