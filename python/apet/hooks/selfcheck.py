"""The self-check: runs the hooks on a tiny random model, if a model's code or the versions are not the tested ones.

It also runs if `positions` keeps those that the model's family renumbers. The tiny model has the same classes. It is
patched and called with two padded rows, then for three more tokens, once with a cache that grows and once with one of
fixed size. The states that its decoder returns must equal those of the reference (reference.py), which shares no code
with the hooks. A model without an adapter of its own is patched only if the check passes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

from . import recording, reference, tiny
from .adapter import Adapter
from .adapters import ADAPTERS, OWN, adapter_for
from .config import Options, Positions
from .engine import Engine
from .mask_functions import implementation
from .results import ENGINE, kept
from .sources import as_tested, code
from .target import Target
from .versions import TESTED, TORCH

TOLERANCE = 1e-3  # of states of standard deviation 1; rounding is 1e-5, and mistakes are 0.1 and more
# The budgets are ratios, so that units of any size get shorter.
STAGES = {
    "first": Options(keep=0.4, basis=4),
    "both": Options(keep=0.4, basis=4, llm_layer=2, llm_keep=0.5),
}
NEW = 4  # tokens that are generated
# Two rows of different lengths. Both end with a few text tokens: a prefill in several calls may be cut there.
PROMPTS = ((3, "image", 5), (1, "image", 4))
NAMES: Mapping[str, str] = {
    name: cls
    for mapping in (
        "MODEL_FOR_VISION_2_SEQ_MAPPING_NAMES",  # of transformers 4
        "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
        "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    )
    for name, cls in getattr(modeling_auto, mapping, {}).items()
}  # model type -> class, for every model of images and text in transformers


def ensure(model: Any, target: Target) -> None:
    """Runs the self-check on a model's classes, unless they are as tested or have passed before with the same code.

    Raises ValueError if the check fails, or if no tiny model can be made. For a model with an adapter that the user has
    registered, the latter is only a warning.
    """
    name = model.config.model_type
    stage = "first" if target.options.llm_layer is None else "both"
    files, unchanged = code(classes_of(target))
    kept = target.options.positions if target.positions != target.adapter.positions else None
    if unchanged and as_tested(files) and kept is None:
        return
    try:
        small = tiny.config(model.config)
        classes = sorted(c.__qualname__ for c in classes_of(target))
        key = repr((name, small.to_json_string(), stage, target.positions, classes, sorted(files.items()), _versions()))
        record = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
        if unchanged and record.exists():
            return
        # A class that does not generate is checked by the class of its type that does: its other parts are the same.
        built = _build(type(model) if hasattr(model, "generate") else _class(name), small, target)
    except Exception as error:  # shrinking an unknown configuration may raise any kind of error
        message = (
            f"apet has no tiny model of model_type='{name}' to check its hooks with under transformers "
            f"{transformers.__version__} ({type(error).__name__}: {error})"
        )
        how = "see docs/hooks.md for how to check an adapter"
        if name in ADAPTERS and ADAPTERS[name] is not OWN.get(name):
            _warn_once(f"{message}: {how}")
            return
        if name in OWN:
            raise ValueError(
                f"{message}. {_works_with(kept)}, or patch with check=False to use the model unchecked"
            ) from error
        raise ValueError(
            f"{message}: {how}, and register it; or patch with check=False to use the model unchecked"
        ) from error
    result = check(built, stage, target.adapter, kept)
    if result.error is not None:
        raise ValueError(result.message(kept))
    if unchanged:
        _write(record, {"key": key, "difference": result.difference})


def _build(cls: type, small: transformers.PretrainedConfig, target: Target) -> nn.Module:
    """Builds the tiny model, with the attention implementation of the real one. Raises an error if it takes no
    image."""
    decoder: Any = target.language_model()
    attention = implementation(decoder.config)
    model = tiny.build(cls, small, attention if attention in ("eager", "sdpa") else None)
    prompt(model, PROMPTS[0])
    return model


def _class(name: str) -> type:
    """Returns transformers' class for images and text of a `model_type`. Raises ValueError if there is none."""
    if name not in NAMES:
        raise ValueError(f"transformers has no class of model_type='{name}' that generates")
    found: type = getattr(transformers, NAMES[name])
    return found


def classes_of(target: Target) -> set[type]:
    """Returns the classes that the hooks of a model rely on."""
    modules = (target.model(), target.core(), target.language_model(), *target.layers())
    return {type(module) for module in modules}


@dataclass(frozen=True)
class Result:
    """The result of the self-check of a family."""

    name: str  # its model_type
    stage: str  # "first" or "both"
    difference: float = 0.0  # the largest, of states of standard deviation 1
    error: str | None = None  # None: passed

    def message(self, positions: Positions | None = None) -> str:
        stages = "first stage" if self.stage == "first" else "both stages"
        return (
            f"the self-check failed for model_type='{self.name}' with transformers {transformers.__version__} and "
            f"torch {torch.__version__} ({stages}): {self.error}. {_works_with(positions)}, or patch with check=False "
            "to patch it anyway"
        )


def _works_with(positions: Positions | None = None) -> str:
    """positions: what the user asked for, other than what the model's family does."""
    if positions is not None:
        return f"Leave out positions='{positions}'"
    return (
        f"This version of apet-kernels was tested with transformers {', '.join(TESTED)} and torch {', '.join(TORCH)}: "
        "install one of these"
    )


def check(
    model: nn.Module, stage: str = "both", adapter: Adapter | None = None, positions: Positions | None = None
) -> Result:
    """Runs the self-check on a tiny model. adapter: by default that of its type; positions: as in `apet.patch`."""
    name, worst = model.config.model_type, 0.0
    try:
        options = options_of(model, stage, adapter, positions)
        rows = [prompt(model, parts, seed) for seed, parts in enumerate(PROMPTS)]
        if not unpatched(model, rows) < TOLERANCE:  # the results of some models depend on the batch or its padding
            rows = rows[:1]
        for kind, static in (("a cache that grows", False), ("a cache of fixed size", True)):
            if static and not _takes_static(model, rows):
                continue
            difference = judge(model, rows, options, static=static, adapter=adapter)
            worst = max(worst, difference)
            if not difference < TOLERANCE:
                return Result(
                    name,
                    stage,
                    difference,
                    f"with {kind}, the decoder's output differs from the reference by {difference:.3g}",
                )
    except torch.OutOfMemoryError:  # not a fault of the hooks
        raise
    except Exception as error:
        return Result(name, stage, worst, f"{type(error).__name__}: {error}")
    return Result(name, stage, worst)


def _takes_static(model: nn.Module, rows: Sequence[recording.Row]) -> bool:
    """Returns whether the unpatched model agrees with the reference, with a cache of fixed size."""
    try:
        return unpatched(model, rows, static=True) < TOLERANCE
    except Exception:  # the model may raise any kind of error
        return False


def options_of(
    model: nn.Module, stage: str, adapter: Adapter | None = None, positions: Positions | None = None
) -> Options:
    """Returns the options of a stage for a tiny model, with the first `llm_layer` from 2 on that is possible.

    Raises ValueError, for a layer of 2, if none is possible.
    """
    adapter, chosen = adapter or adapter_for(model), dataclasses.replace(STAGES[stage], positions=positions)
    if chosen.llm_layer is None:
        return chosen
    for llm_layer in range(chosen.llm_layer, tiny.LAYERS):
        deeper = dataclasses.replace(chosen, llm_layer=llm_layer)
        with contextlib.suppress(ValueError):
            Target.find(model, adapter, lambda *_, options=deeper: options)
            return deeper
    Target.find(model, adapter, lambda *_: chosen)  # raises
    return chosen


def families() -> list[str]:
    """Returns each `model_type` that has an adapter in this package and that the installed transformers knows."""
    return sorted(OWN.keys() & NAMES.keys())


def check_family(name: str) -> Result:
    """Runs the self-check of a family by its `model_type`, in both stages, on transformers' own class. Every error is
    part of the result."""
    try:
        return check(tiny.build(_class(name), tiny.config(name)))
    except Exception as error:
        return Result(name, "both", error=f"no tiny model of it can be checked: {type(error).__name__}: {error}")


# ---- a tiny model and its reference ---------------------------------------------------------------------------------


def prompt(model: nn.Module, parts: Sequence[int | str], seed: int = 0) -> recording.Row:
    """Returns a prompt of a tiny model. Its length differs from all widths of the model, so that the reference can
    tell which dimension is the sequence."""
    row = tiny.sample(model, parts, seed)
    widths = {size for parameter in model.parameters() for size in parameter.shape}
    while row["input_ids"].shape[1] + NEW - 1 in widths and isinstance(parts[0], int):
        parts = (parts[0] + 1, *parts[1:])
        row = tiny.sample(model, parts, seed)
    return row


@torch.no_grad()
def judge(
    model: nn.Module,
    rows: Sequence[recording.Row],
    options: Options,
    *,
    static: bool = False,
    adapter: Adapter | None = None,
) -> float:
    """Returns how far a patched tiny model is from the reference, in standard deviations of the states that its decoder
    returns.

    It is the largest difference over the prompt of every row and the tokens after it. model: not patched before or
    after the call; rows: prompts from `prompt`, a padded batch if several; static: use a cache of fixed size; adapter:
    by default that of its type. Raises ValueError if the model cannot be patched, or if a stage drops nothing.
    """
    target = Target.find(model, adapter or adapter_for(model), lambda *_: options)
    decoder = recording.Decoder.of(model, rows[0])
    engine = Engine(target)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.install()
        model.__dict__[ENGINE] = engine
        try:
            generation = recording.generate(model, decoder, tiny.collate(rows), NEW, static, options.llm_layer)
            remaining = kept(model)
        finally:
            engine.remove()
            del model.__dict__[ENGINE]
    stages = (options.keep is not None) + (options.llm_layer is not None)
    found = []
    for b, row in enumerate(rows):
        visuals: dict[str, list[Any]] = {}
        for one in remaining.visuals if remaining is not None else ():
            if one.row == b:
                visuals.setdefault(one.modality, []).append((one.tokens, one.remaining))
        found.append(reference.columns(row, visuals, stages))
    keep = target.gaps is not None or options.positions == "keep"
    return _largest(model, decoder, rows, generation, found, options.llm_layer, keep)


@torch.no_grad()
def unpatched(model: nn.Module, rows: Sequence[recording.Row], *, static: bool = False) -> float:
    """Returns how far a model without a patch is from the reference, which then keeps all columns."""
    decoder = recording.Decoder.of(model, rows[0])
    generation = recording.generate(model, decoder, tiny.collate(rows), NEW, static)
    every = [[torch.arange(row["input_ids"].shape[1])] for row in rows]
    return _largest(model, decoder, rows, generation, every, None)


def _largest(
    model: nn.Module,
    decoder: recording.Decoder,
    rows: Sequence[recording.Row],
    generation: recording.Generation,
    columns: Sequence[Sequence[torch.Tensor]],
    llm_layer: int | None,
    keep: bool = False,
) -> float:
    worst = 0.0
    for b, row in enumerate(rows):
        states = reference.expected_states(model, decoder, row, generation, b, columns[b], llm_layer, keep)
        difference = (generation.states[b] - states).abs().max() / states.std()
        worst = max(worst, float(difference.nan_to_num(nan=float("inf"))))
    return worst


# ---- the record of checks that have passed ---------------------------------------------------------------------------


@functools.cache
def _versions() -> dict[str, str]:
    own = importlib.metadata.version("apet-kernels")
    return {"apet-kernels": own, "transformers": transformers.__version__, "torch": torch.__version__}


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "apet-kernels" / "selfcheck"


def _write(path: Path, record: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    except OSError:  # the cache folder cannot be written: the check runs again next time
        pass


_WARNED: set[str] = set()


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=4)
