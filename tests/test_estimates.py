"""The table of estimates in docs/cuda.md."""

from __future__ import annotations

import re

import pytest
import torch

from tests.simt import build, call
from tests.simt.call import How
from tests.tools import estimates

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.mark.parametrize("name", estimates.SHAPES)
def test_the_plan_is_the_least_estimate_of_the_table(name):
    *dims, keep = estimates.SHAPES[name]
    case = call.compress_case(torch.empty(*dims, dtype=torch.bfloat16, device="meta"), keep)
    plan = call.plan(case.problem, How(estimates.H100))
    cells = estimates.cells(estimates.SHAPES[name])
    least = cells[plan.path - 1]  # apet_cuda_path: 0 is the best
    assert least.startswith(f"**{plan.estimated_us:.0f}** ({plan.ctas_per_image}")
    times = [float(re.search(r"\d+", cell)[0]) for cell in cells[:3] if cell != "-"]
    assert round(plan.estimated_us) == min(times)


def test_the_document_has_a_line_for_every_shape():
    text = estimates.GUIDE.read_text().partition(estimates.BEGIN)[2].partition(estimates.END)[0]
    assert re.findall(r"^\| (\S.*?) \| ", text, re.M) == ["tokens", *estimates.SHAPES]
