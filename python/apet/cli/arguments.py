"""Arguments that several commands have: their choices and ranges, which `--help` shows and typer checks."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

# The choices of apet_kernels, which cannot be imported here since it imports torch; tests/test_cli.py compares them.
Layout = Literal["inplace", "overwrite", "append"]
Select = Literal["fps", "qr"]
Backend = Literal["cpu", "triton", "cuda", "reference"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]


def budget(given: str | float) -> float:
    """'64' -> 64, an int: so many tokens; '0.25' and '25%' -> 0.25, a float: that share of them.

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


Model = Annotated[str, typer.Option(help="A vision-language model from Hugging Face: an id or a folder.")]
Frames = Annotated[int, typer.Option(min=1, help="Frames taken from a clip, evenly spaced.")]
Weights = Annotated[Dtype, typer.Option(help="dtype of the weights; auto is as stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; else an accelerator, if any.")]
