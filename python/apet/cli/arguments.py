"""Arguments that several commands share, with their choices and ranges, which `--help` shows and typer checks."""

from __future__ import annotations

import os
import stat
from typing import Annotated, Literal

import typer

# The choices of apet_kernels and apet.patch. They cannot be imported here, since they import torch;
# tests/test_cli.py compares them.
Layout = Literal["inplace", "overwrite", "append"]
Select = Literal["fps", "qr"]
Backend = Literal["cpu", "triton", "cuda", "reference"]
Guard = Literal["warn", "raise", "keep"]
Positions = Literal["keep", "renumber"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def budget(given: str | float) -> float:
    """Parses a budget: '64' -> 64 (int), a number of tokens; '0.25' or '25%' -> 0.25 (float), a share of the tokens.

    Raises: typer.BadParameter.
    """
    text = str(given)  # typer passes the default through here, too
    try:
        if text.endswith("%"):
            wanted: int | float = float(text[:-1]) / 100
        else:
            wanted = float(text) if "." in text else int(text)
    except ValueError:
        wanted = 0
    if wanted >= 1 if isinstance(wanted, int) else 0 < wanted <= 1:
        return wanted
    raise typer.BadParameter(f"{text or repr(text)} is neither a count from 1 nor a share such as 0.25 or 25%")


def basis_count(given: str | int) -> int | str:
    """Parses a basis size: '10' -> 10; 'keep' -> 'keep', which means as many basis tokens as are kept.

    Raises: typer.BadParameter.
    """
    text = str(given)  # typer passes the default through here, too
    if text == "keep":
        return text
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise typer.BadParameter(f"{text or repr(text)} is neither a count from 1 nor 'keep'")


def source(given: str) -> str:
    """Checks a source of `apet.media.read`: a path that exists, "-" or an address.

    Raises: typer.BadParameter.
    """
    from apet.media import is_address

    if given != "-" and not is_address(given):
        try:
            mode = os.stat(given).st_mode
        except FileNotFoundError:
            raise typer.BadParameter(f"'{given}' does not exist") from None
        except (OSError, ValueError) as error:  # no permission, too long, a null byte
            raise typer.BadParameter(f"cannot read '{given}': {getattr(error, 'strerror', error)}") from error
        if stat.S_ISDIR(mode):
            raise typer.BadParameter(f"'{given}' is a directory")
    return given


Model = Annotated[str, typer.Option(help="A vision-language model from Hugging Face: an id or a folder.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames taken from a clip, evenly spaced in time.")]
Weights = Annotated[Dtype, typer.Option(help="dtype of the weights; auto: as they are stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: an accelerator, if any.")]
Layouts = Annotated[Layout | None, typer.Option(help="Where basis tokens are placed.")]
Selection = Annotated[Select | None, typer.Option(help="How basis tokens are picked.")]
NewTokens = Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")]
BASIS_HELP = "Basis tokens, up to 64; with --select qr up to the number kept: 10, 100 or keep."
Basis = Annotated[int | None, typer.Option(parser=basis_count, metavar="COUNT|keep", help=BASIS_HELP)]
Refine = Annotated[int, typer.Option(min=0, max=8, help="Medoid steps, if all kept tokens are basis tokens.")]
Share = Annotated[bool, typer.Option("--share", help="Images and frames of a prompt share their budgets.")]
RELEVANCE_HELP = "0..1: how much tokens that resemble the prompt are preferred."
Relevance = Annotated[float, typer.Option(min=0, max=1, help=RELEVANCE_HELP)]
DISTINCT_HELP = "0 to 4: how much tokens that differ from the rest of their image are preferred."
Distinct = Annotated[float, typer.Option(min=0, max=4, help=DISTINCT_HELP)]
GUARD_HELP = "If --keep is little for an image: warn, raise an error, or keep as much as it takes."
GuardOption = Annotated[Guard | None, typer.Option("--guard", help=GUARD_HELP)]
LIMIT_HELP = "What is little: the squared residual of a dropped token, of the mean square. \\[0.2]"
GuardLimit = Annotated[float | None, typer.Option(help=LIMIT_HELP)]
POSITIONS_HELP = "Whether tokens keep their positions if others are dropped. Default: as the model's family does."
PositionsOption = Annotated[Positions | None, typer.Option("--positions", help=POSITIONS_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables and text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no tables, notes or progress.")]
