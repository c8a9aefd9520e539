"""Injected faults: each is a change of a copy of the CUDA sources that a certain detector must report."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.simt import build
from tests.simt.bugs import BUGS, WRONG, Bug, both, differs, inject, small

pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug",
    [pytest.param(b, id=b.name.replace(" ", "_"), marks=b.when) for b in BUGS],
)
def test_injected_faults(bug: Bug, tmp_path: Path):
    case = small(bug)
    said, right = both(bug, inject(bug, tmp_path), case)
    if bug.seen == WRONG:
        assert said == ""
        assert differs(case, right)
    else:
        assert re.search(bug.seen, said), said or "nothing was seen"
