"""The quality study, step by step or as a whole.

python -m benchmarks.quality {features,intrinsic,task,agreement,write,all} [--folder DIR] [--results DIR] [--docs DIR]
                             [--seed N] [--photos DIR] [--layer N] [--budget N] [--threads N]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from apet import ApetError

from benchmarks.lib import command
from benchmarks.lib.machine import describe
from benchmarks.quality import agreement, features, intrinsic, methods, reader, report, task

ROOT = Path(__file__).parents[2]
STEPS = ("features", "intrinsic", "task", "agreement", "write")


def main(arguments: list[str] | None = None) -> None:
    """Runs one step, or all of them; each continues an earlier call that was stopped."""
    parser = command.parser("quality", __doc__)
    parser.add_argument("step", choices=[*STEPS, "all"])
    parser.add_argument("--folder", type=Path, default=ROOT / ".build/quality/main", help="features and readers")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/quality", help="raw results")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where `write` puts the page and its pictures")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    parser.add_argument("--photos", type=Path, help="a folder of photographs to test on instead")
    parser.add_argument("--layer", type=int, choices=features.LAYERS, help="of `task` only: a part for a process")
    parser.add_argument("--budget", type=int, choices=(methods.FULL, *methods.BUDGETS), help="the same")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        for step in STEPS if given.step == "all" else (given.step,):
            run(step, given)
    except (ApetError, ImportError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(step: str, given: argparse.Namespace) -> None:
    """Runs one step."""
    head = describe()
    if step == "features":
        features.extract(given.folder, features.SIZES, given.seed, given.photos)
    elif step == "intrinsic":
        if not (given.folder / "intrinsic.npz").exists():
            intrinsic.extract(given.folder, given.seed)
        intrinsic.study(given.folder, given.results, head)
    elif step == "task":
        layers = features.LAYERS if given.layer is None else (given.layer,)
        budgets = (methods.FULL, *methods.BUDGETS) if given.budget is None else (given.budget,)
        task.study(given.folder, given.results, reader.EPOCHS, head, layers, budgets)
    elif step == "agreement":
        agreement.study(given.folder, given.results, head)
    else:
        report.write(given.results, given.docs)
        report.draw(given.docs)


if __name__ == "__main__":
    main()
