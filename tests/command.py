"""Runs commands in this process: `apet`, and modules of the benchmarks."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from apet.cli import app
from typer.testing import CliRunner, Result


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def said(*words: object, code: int = 0) -> str:
    """Returns the output of a call that must end with this exit code; for exit code 0 without standard error."""
    result = invoke(*words)
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def failed(*words: object) -> str:
    """Returns the one message of a call that must fail with exit code 2."""
    result = invoke(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("apet: ")
    return result.stderr


def ended(module: Any, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Runs a module's main(); returns its exit code."""
    monkeypatch.setattr(sys, "argv", ["it", *arguments])
    with pytest.raises(SystemExit) as exit_:
        module.main()
    return exit_.value.code
