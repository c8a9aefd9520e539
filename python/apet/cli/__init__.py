"""The command `apet`.

- `apet compress` shows what compression does to a photo or clip;
- `apet explore` shows it on a page with sliders;
- `apet generate` shows what it does to a vision-language model;
- `apet eval` measures what it costs in accuracy;
- `apet doctor` checks the installation.

Modules that need torch are imported by the commands that use them, so that `apet --help` answers at once.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import apet
from apet import ApetError, Notice
from apet.cli import compress, doctor, evaluate, explore, generate

# What typer raises for wrong options. Newer releases carry their own click, so click's class may be another one.
UsageError = typer.BadParameter.__base__


class Commands(TyperGroup):
    """The group of commands. It prints every error as one line on stderr and exits with code 2."""

    def main(
        self, args: Sequence[str] | None = None, *more: Any, standalone_mode: bool = True, **named: Any
    ) -> NoReturn:
        words = sys.argv[1:] if args is None else args
        try:
            with _notices():
                code = super().main(words, *more, standalone_mode=False, **named)
        except UsageError as error:
            code = _complain(error.format_message() + _values(error, words))
        except ApetError as error:
            code = _complain(str(error))
        except (typer.Abort, KeyboardInterrupt):
            code = 130
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def _notices() -> Iterator[None]:
    """Prints notices as lines on stderr, only the first one of each key."""
    shown: set[str] = set()
    with warnings.catch_warnings():
        before = warnings.showwarning

        def show(message: Any, category: type[Warning], *where: Any) -> None:
            if not isinstance(message, Notice):
                before(message, category, *where)
            elif message.key not in shown:
                shown.add(message.key)
                print(f"apet: {message}", file=sys.stderr)

        warnings.showwarning = show
        warnings.simplefilter("always", Notice)
        yield


def _complain(message: str) -> int:
    print(f"apet: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _values(error: Exception, words: Sequence[str]) -> str:
    """Returns the values given for an option that is out of range; the messages of newer releases of typer lack
    them."""
    options = getattr(getattr(error, "param", None), "opts", ())
    values = []
    for word, following in itertools.pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if name in options:
            values.append(value if equals else following)
    shown = not values or any(value in str(error) for value in values)
    return "" if shown else f" (given: {', '.join(values)})"


app = typer.Typer(cls=Commands, rich_markup_mode="rich", pretty_exceptions_enable=False)
app.command()(compress.compress)
app.command()(explore.explore)
app.command()(generate.generate)
app.command("eval")(evaluate.evaluate)
app.command()(doctor.doctor)


def main() -> None:
    """Runs the command; it is the package's entry point."""
    app()


@app.callback(invoke_without_command=True)
def _apet(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.", is_eager=True)] = False,
) -> None:
    """ApET: compress the visual tokens of vision-language models by approximation error (arXiv 2602.19870)."""
    if version:
        print(f"apet {apet.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
