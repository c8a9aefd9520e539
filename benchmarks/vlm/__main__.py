"""A small vision-language model: its pictures, its training, and what compression costs it.

python -m benchmarks.vlm features [--split train val test] [--count N]
python -m benchmarks.vlm train --seed 0 [--resume] [--steps N] [--pictures N] ...
python -m benchmarks.vlm evaluate [--arms NAME ...] [--budgets N ...]
python -m benchmarks.vlm write                        # docs/vlm.md, of the answers
python -m benchmarks.vlm assemble --out FOLDER        # with the trunk, for from_pretrained
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path

import torch
from apet import ApetError

from benchmarks.lib import command
from benchmarks.vlm import arms, evaluation, features, llava, packing, report, training, words

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/vlm"
COUNTS = {"train": training.Plan.pictures, "val": 160, "test": 640}


def main(arguments: list[str] | None = None) -> None:
    """Runs one step."""
    parser = command.parser("vlm", __doc__)
    parser.add_argument("--cache", type=Path, default=ROOT / ".build/vlm/main", help="features, 197 KB a picture")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    steps = parser.add_subparsers(dest="step", required=True)
    step = steps.add_parser("features", help="make and encode pictures; continues an earlier call")
    step.add_argument("--split", nargs="*", choices=features.SPLITS, default=features.SPLITS)
    step.add_argument("--count", type=int, help="pictures of each split, instead of the usual number")
    step.add_argument("--seed", type=int, default=0, help="of the pictures")
    step.add_argument("--photos", type=Path, help="a folder of photographs to use instead")
    step = steps.add_parser("train", help="train on the features")
    step.add_argument("--out", type=Path, help="model, checkpoint and log (.build/vlm/SEED)")
    step.add_argument("--resume", action="store_true", help="go on from the checkpoint there")
    for field in fields(training.Plan):
        step.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    step = steps.add_parser("evaluate", help="ask the model the test questions")
    step.add_argument("--model", type=Path, default=llava.STORED)
    every = [*arms.ARMS, *arms.STAGED, *arms.IN_PLACE, *arms.MORE]
    step.add_argument("--arms", nargs="*", choices=every, default=every, metavar="NAME")
    step.add_argument("--budgets", nargs="*", type=int, default=arms.BUDGETS)
    step.add_argument("--results", type=Path, default=RESULTS)
    step = steps.add_parser("write", help="write docs/vlm.md")
    step.add_argument("--model", type=Path, default=llava.STORED)
    step.add_argument("--results", type=Path, default=RESULTS)
    step.add_argument("--docs", type=Path, default=ROOT / "docs")
    step = steps.add_parser("assemble", help="write the model with its trunk as one folder")
    step.add_argument("--model", type=Path, default=llava.STORED)
    step.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    try:
        run(given)
    except (ApetError, ImportError, FileNotFoundError, ValueError) as error:
        sys.exit(f"error: {error}")


def run(given: argparse.Namespace) -> None:
    """Runs one step."""
    if given.step == "features":
        for split in given.split:
            features.extract(given.cache, split, given.count or COUNTS[split], given.seed, given.photos)
    elif given.step == "train":
        plan = training.Plan(**{field.name: getattr(given, field.name) for field in fields(training.Plan)})
        training.train(given.cache, given.out or ROOT / f".build/vlm/{given.seed}", plan, given.resume)
    elif given.step == "evaluate":
        model = llava.load(given.model)
        packer = packing.Packer(words.tokenizer(), model.config.image_token_index)
        test = features.read(given.cache, "test")
        evaluation.evaluate(model, packer, test, given.arms, given.budgets, given.results)
    elif given.step == "write":
        report.write(given.results, given.model, given.docs)
    else:
        llava.assemble(given.out, given.model)


if __name__ == "__main__":
    main()
