"""The command `apet`: every error as one message, the parts that all commands share, and the command as a process."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from apet import ApetError, encoders, hub
from apet.cli import arguments, output
from apet.hooks import config
from PIL import Image

import apet_kernels
from apet_kernels import options
from tests.command import failed, invoke, said
from tests.photos import (
    BIKES,
    CHELSEA,
    SMALL,
    TRUNK,
    quick,  # noqa: F401, a fixture
)

# --- errors ---


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Returns a folder of files whose contents do not match their names."""
    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "half.png").write_bytes(CHELSEA.read_bytes()[:50_000])
    (tmp_path / "half.mp4").write_bytes(BIKES.read_bytes()[:50_000])
    (tmp_path / "photo.png").write_bytes(CHELSEA.read_bytes())
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("missing.png",), "'missing.png' does not exist"),
        ((".",), "'.' is a directory"),
        (("text.png",), "neither a photo nor a video"),
        (("empty.png",), "the file is empty"),
        (("half.png",), "cannot read the photo half.png"),
        (("ftp://example.org/photo.png",), "of addresses only http and https are read"),
        (("half.mp4",), "half.mp4"),
        (("photo.png", "missing.png"), "'missing.png' does not exist"),
        (("photo.png", "x" * 5000), "File name too long"),
        (("photo.png", "--keep", "71", *SMALL), "photo.png: keep=71 is outside 1..70"),
        (("photo.png", "--keep", "0"), "Invalid value for '--keep': 0 is neither"),
        (("photo.png", "--keep", "-3"), "-3 is neither"),
        (("photo.png", "--keep", "1.5"), "1.5 is neither"),
        (("photo.png", "--keep", "nan%"), "nan% is neither"),
        (("photo.png", "--keep", "many"), "many is neither"),
        (("photo.png", "--layout", "sideways"), "'sideways' is not one of 'inplace', 'overwrite', 'append'"),
        (("photo.png", "--select", "best"), "'best' is not one of 'fps', 'qr'"),
        (("photo.png", "--start", "70", "--keep", "9", *SMALL), "photo.png: start=70 is outside -1..69"),
        (("photo.png", "--layout", "overwrite"), "photo.png: basis=None needs layout='inplace'"),
        (
            ("photo.png", "--basis", 10, "--layout", "overwrite", "--keep", "10"),
            "layout='overwrite' needs keep > basis",
        ),
        (("photo.png", "--basis", "65"), "photo.png: basis=65 is outside 1..64"),
        (("photo.png", "--select", "fps"), "photo.png: basis=None needs select='qr', got select='fps'; give basis"),
        (("photo.png", "--blend", "0.5"), "photo.png: blend=0.5 needs layout='overwrite'"),
        (("photo.png", "--size", "100000"), "photo.png would become 51009525 tokens, more than 65536"),
        (("photo.png", "--size", "13"), "size=13 is smaller than one 14 x 14 patch"),
        (("photo.png", "--layer", "13"), "layer=13 is outside the 12 layers"),
        (("photo.png", "--backend", "abacus"), "'abacus' is not one of 'cpu', 'triton', 'cuda', 'reference'"),
        (("photo.png", "--model", "no/such/model"), "cannot load model 'no/such/model'"),
        (("photo.png", "--out", "photo.txt"), "the name must end in"),
        (("photo.png", "--out", "photo.png"), "the picture would replace the photo"),
        (("photo.png", "--out", "nowhere/p.png"), "no such folder: nowhere"),
        (("photo.png", "photo.png", "--out", "photo.png"), "photo.png is a file"),
        (("photo.png", "photo.png", "--out", "two.png"), "two.png names one picture, but several files need a folder"),
        (("photo.png", "--kep", "3"), "--kep"),
        ((), "Missing argument"),
    ],
)
def test_errors(files: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.iterdir())
    assert message in failed("compress", *words)
    assert sorted(files.iterdir()) == before  # no picture was drawn before all arguments were checked


@pytest.mark.parametrize(
    ("option", "value"),
    [("--basis", "0"), ("--basis", "ten"), ("--refine", "9"), ("--start", "-2"), ("--blend", "2"), ("--frames", "0")],
)
def test_values_out_of_range(files: Path, option: str, value: str) -> None:
    for words in ((option, value), (f"{option}={value}",)):
        message = failed("compress", files / "photo.png", *words)
        assert f"Invalid value for '{option}'" in message
        assert value in message.partition("Invalid value")[2]


def test_unknown_command() -> None:
    assert "squeeze" in failed("squeeze")


@pytest.mark.parametrize("module", ["transformers", "onnx", "PIL", "matplotlib", "av"])
def test_missing_extra(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes its import fail
    monkeypatch.setattr(encoders, "_trunk", TRUNK)
    file = BIKES if module == "av" else CHELSEA
    assert 'pip install "apet-kernels[demo]"' in failed("compress", file, "--out", tmp_path / "p.png")


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", nothing)
    monkeypatch.setattr(encoders, "_trunk", TRUNK)
    assert 'pip install "apet-kernels[demo]"' in failed("compress", CHELSEA, "--out", tmp_path / "p.png")


def test_backend_that_cannot_run_says_why(tmp_path: Path) -> None:
    """Tokens of photos are on the CPU, where CUDA kernels cannot run on any machine."""
    message = failed("compress", CHELSEA, *SMALL, "--keep", 9, "--backend", "cuda", "--out", tmp_path / "p.png")
    assert "backend='cuda' cannot run here: " in message
    assert not (tmp_path / "p.png").exists()


def test_choices_are_those_of_the_op() -> None:
    assert get_args(arguments.Layout) == options.LAYOUTS
    assert get_args(arguments.Select) == options.SELECTS
    assert get_args(arguments.Backend) == options.BACKENDS
    assert get_args(arguments.Guard) == config.GUARDS
    assert get_args(arguments.Positions) == config.POSITIONS


def test_rejected_op_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("keep=700 exceeds the 576 tokens\nand a stack of frames")

    monkeypatch.setattr(apet_kernels, "compress", fail)
    assert "keep=700 exceeds the 576 tokens" in failed("compress", CHELSEA, *SMALL, "--keep", 9, "--out", tmp_path)


# --- every command


def test_json_and_quiet_are_everywhere() -> None:
    for command in ("compress", "generate", "eval", "doctor"):
        text = said(command, "--help")
        assert "--json" in text
        assert "--quiet" in text


def test_compress_quietly(tmp_path: Path) -> None:
    assert said("compress", CHELSEA, *SMALL, "--keep", 9, "--out", tmp_path / "p.png", "--quiet") == ""
    assert (tmp_path / "p.png").exists()


def test_notes_go_to_standard_error(tmp_path: Path) -> None:
    pages = [Image.new("L", (64, 64), shade) for shade in (0, 255)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    words = ("compress", tmp_path / "pages.tif", *SMALL, "--keep", 9, "--out", tmp_path / "p.png", "--json")
    loud, quiet = invoke(*words), invoke(*words, "--quiet")
    assert loud.stderr == f"apet: {tmp_path / 'pages.tif'}: only the first of 2 pages was read\n"
    assert quiet.stderr == ""
    assert json.loads(quiet.stdout)[0]["notes"] == ["only the first of 2 pages was read"]


def test_progress_is_shown_on_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert output.progress().disable
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    assert not output.progress().disable
    assert output.progress(quiet=True).disable


def test_shell_completion() -> None:
    environment = {**os.environ, "_APET_COMPLETE": "complete_bash", "COMP_WORDS": "apet com", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from apet.cli import app; app(prog_name='apet')"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["compress"]


# --- the command as a process ---


def outside(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "apet", *(str(word) for word in words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker, on a machine that runs other tests as well
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)


def test_version_and_help() -> None:
    assert outside("--version").stdout == f"apet {importlib.metadata.version('apet-kernels')}\n"
    for words in ((), ("--help",)):
        result = outside(*words)
        assert result.returncode == 0
        assert "compress" in result.stdout
        assert "doctor" in result.stdout


def test_help_needs_no_torch() -> None:
    code = "import sys, apet.cli; print(sorted({'torch', 'transformers', 'apet_kernels', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.rest
def test_compress_from_outside(tmp_path: Path) -> None:
    out = tmp_path / "p.png"
    result = outside("compress", CHELSEA, *SMALL, "--keep", "25%", "--out", out)
    assert (result.returncode, result.stderr) == (0, "")
    assert out.stat().st_size > 50_000


def test_error_from_outside(files: Path) -> None:
    result = outside("compress", files / "half.png")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_need_names_what_is_missing() -> None:
    with pytest.raises(ApetError, match="no_such_module: pip install"):
        hub.need("no_such_module")
