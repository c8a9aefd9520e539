"""Models of the Hugging Face Hub and the packages that they need: loaded, or one error that says what is missing."""

from __future__ import annotations

import importlib
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

from apet import Refused


def need(module: str, extra: str = "demo") -> ModuleType:
    """Import a module of an extra, or say how to install it.

    Raises: Refused, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Refused(f'this needs {error.name or module}: pip install "apet-kernels[{extra}]"') from error


def load_config(model: str) -> tuple[Any, bool]:
    """The config of a model (a folder or a hub id), and whether its other files must be local as well.

    Raises: Refused, if there is no such model, or it is not downloaded and the hub cannot be reached.
    """
    from transformers import AutoConfig

    local = Path(model).is_dir() or not reachable()
    try:
        return AutoConfig.from_pretrained(model, local_files_only=local), local
    except Exception as error:  # the hub client raises its own kinds, besides OSError and ValueError
        raise Refused(
            f"cannot load model {model!r}: it is neither a folder with a config.json nor a model that is downloaded or "
            "could be reached on the Hugging Face Hub"
        ) from error


def reachable() -> bool:
    """Whether the Hugging Face Hub can be reached.

    Checked first, because the hub's client repeats a failed connection for half a minute (huggingface_hub 2.4; no
    setting shortens it), for each file of a model, even where the file is downloaded. HF_HUB_OFFLINE is obeyed.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if urllib.request.getproxies():  # then its address need not be known here
        return True
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((hub.hostname or "", hub.port or 443), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without the full stop at its end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
