"""Loads models of the Hugging Face Hub and the packages that they need, or raises one error that says what is
missing."""

from __future__ import annotations

import importlib
import json
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from apet import ApetError


def need(module: str, extra: str = "demo", what: str = "this") -> ModuleType:
    """Imports a module of an extra. what: the thing that needs it, for the message.

    Raises: ApetError, with how to install it, if it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ApetError(f'{what} needs {error.name or module}: pip install "apet-kernels[{extra}]"') from error


def load_config(model: str) -> tuple[Any, bool]:
    """Returns the config of a model (a folder or a hub id), and whether its other files must be local as well.

    Raises: ApetError, with the cause and what to do, if there is no such model, or its config cannot be read.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    begin = f"cannot load model {model!r}: "
    path, local = config_file(model)
    try:
        config_json = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ApetError(f"{begin}its config.json is broken: {first_line(error)}") from error
    kind = config_json.get("model_type") if isinstance(config_json, dict) else None
    if not isinstance(kind, str):
        raise ApetError(f"{begin}its config.json names no model_type")
    if kind not in CONFIG_MAPPING:
        raise ApetError(f"{begin}{_unknown(f'model_type {kind!r}', config_json)}")
    try:
        return AutoConfig.from_pretrained(model, local_files_only=local, trust_remote_code=False), local
    except Exception as error:
        raise ApetError(f"{begin}its config.json is broken: {first_line(error)}") from error


def config_file(model: str) -> tuple[Path, bool]:
    """Returns the config.json of a model (a folder or a hub id), and whether its other files must be local as well. Its
    folder is named after the commit of a hub id.

    Raises: ApetError, with the cause and what to do, if there is no such model.
    """
    from transformers.utils import cached_file

    begin = f"cannot load model {model!r}: "
    folder = Path(model)
    if not folder.is_dir() and (folder.exists() or folder.is_absolute() or model.startswith((".", "~"))):
        raise ApetError(f"{begin}there is no such folder")
    local = folder.is_dir() or not reachable()
    try:
        path = cached_file(model, "config.json", local_files_only=local)
    except Exception as error:  # the hub client raises its own kinds, besides OSError and ValueError
        raise ApetError(f"{begin}{why(error, model)}") from error
    if path is None:
        raise ApetError(f"{begin}it has no config.json")
    return Path(path), local


def _unknown(what: str, config: Mapping[str, Any]) -> str:
    """Explains why the installed transformers does not know the type or class in a config.json, and what to do."""
    import transformers
    from packaging.version import InvalidVersion, Version

    try:
        made = Version(str(config.get("transformers_version")))
    except InvalidVersion:
        made = None
    here = transformers.__version__
    if config.get("auto_map"):
        return (
            f"{what} is code of its own authors (trust_remote_code), which apet does not run: use a checkpoint that "
            'was converted to transformers, often named "...-hf"'
        )
    if made is not None and made > Version(here):
        return (
            f"{what} is not known to transformers {here}, and the model was made with {made}: pip install "
            "--upgrade transformers"
        )
    return (
        f"{what} is not known to transformers {here}: upgrade that if the model is newer, or use a checkpoint that was "
        'converted to transformers, often named "...-hf"'
    )


def model_class(model: str, config: Any) -> Any:
    """Returns the class in transformers that a config names, with generate(). Raises: ApetError, if there is none."""
    import transformers

    name = (config.architectures or [None])[0]
    if not name:
        raise ApetError(f"model {model!r} is a {config.model_type!r} whose config.json names no class (architectures)")
    kind = getattr(transformers, name, None)
    if kind is None:
        raise ApetError(f"cannot load model {model!r}: {_unknown(f'class {name}', vars(config))}")
    if not hasattr(kind, "generate"):
        raise ApetError(f"model {model!r} is a {config.model_type!r} of class {name}, with no generate()")
    return kind


def why(error: BaseException, model: str) -> str:
    """Returns the cause of a load that failed, and what to do; the message of transformers often names another
    cause."""
    from huggingface_hub import constants, errors

    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)

    def caused(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    status = {getattr(getattr(cause, "response", None), "status_code", None) for cause in causes}
    if caused(errors.GatedRepoError):
        return f"it is gated: accept its terms on {constants.ENDPOINT}/{model}, then run hf auth login"
    if caused(errors.HFValidationError):
        return "it is neither a folder nor a name of the form owner/model"
    if caused(errors.RepositoryNotFoundError):
        return (
            f"there is no such folder, and no such model on {constants.ENDPOINT}: check its name; if it is private, "
            "run hf auth login"
        )
    if status & {401, 403}:
        return f"{constants.ENDPOINT} rejects this login: run hf auth login, or check HF_TOKEN"
    if caused(errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError):
        offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        return f"there is no such folder, it is not downloaded, and {offline}"
    if any("trust_remote_code" in str(cause) for cause in causes):
        return "it needs code of its own authors (trust_remote_code), which apet does not run"
    return first_line(error)


def reachable() -> bool:
    """Returns whether the Hugging Face Hub can be reached.

    This is checked first, because the hub's client repeats a failed connection for half a minute (huggingface_hub 2.4;
    no setting shortens it), for each file of a model, even if the file is downloaded already. HF_HUB_OFFLINE is obeyed.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    # Behind a proxy, the hub's host name need not resolve on this machine.
    if urllib.request.getproxies().keys() & {"http", "https", "all"}:
        return True
    hub = urllib.parse.urlsplit(constants.ENDPOINT)
    port = hub.port or (80 if hub.scheme == "http" else 443)
    try:
        socket.create_connection((hub.hostname or "", port), timeout=constants.HF_HUB_ETAG_TIMEOUT).close()
    except OSError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without the full stop at its end."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
