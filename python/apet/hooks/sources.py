"""Compares the code of transformers that the hooks rely on with the code that the tests ran on."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from .versions import TORCH, digests


def as_tested(files: Mapping[str, str]) -> bool:
    """Returns whether torch, transformers and these files of transformers are the tested versions."""
    known = digests().get(transformers.__version__, {})
    minor = ".".join(torch.__version__.split(".")[:2])
    return minor in TORCH and all(known.get(name) == digest for name, digest in files.items())


def code(classes: set[type]) -> tuple[dict[str, str], bool]:
    """Returns the files of transformers that the hooks of some classes rely on, with their digests, and whether all
    loaded functions come from these files."""
    root = Path(inspect.getfile(transformers)).parent
    makers = ("create_causal_mask", "create_sliding_window_causal_mask")
    used = [f for f in (getattr(transformers.masking_utils, name, None) for name in makers) if f is not None]
    caches = (transformers.Cache, transformers.DynamicCache, transformers.StaticCache)
    for cls in (*caches, transformers.GenerationMixin):
        used += [f for f in vars(cls).values() if inspect.isfunction(f)]
    rotary = {c for cls in classes for c in vars(sys.modules[cls.__module__]).values() if _is_rotary(c)}
    for cls in {*classes, *rotary}:
        used += [
            f for f in (vars(c).get("forward") for c in cls.__mro__ if c is not nn.Module) if inspect.isfunction(f)
        ]
    places = {Path(f.__code__.co_filename) for function in used for f in _layers_of(function)}
    inside = {p for p in places if p.is_relative_to(root)}
    libraries = (Path(inspect.getfile(torch)).parent, Path(inspect.getfile(contextlib)).parent)  # their decorators
    beside = {Path(f.__code__.co_filename) for function in _beside(classes) for f in _layers_of(function)}
    unchanged = all(p.is_relative_to(root) or _is_of_library(p, libraries) for p in places | beside)
    return {p.relative_to(root).as_posix(): _digest(p) for p in sorted(inside)}, unchanged


def _beside(classes: set[type]) -> Iterator[Callable[..., Any]]:
    """Yields all functions of all modules in the files of some classes, e.g. of attention, or those that make
    positions."""
    for name in {cls.__module__ for cls in classes}:
        for cls in vars(sys.modules[name]).values():
            if isinstance(cls, type) and issubclass(cls, nn.Module) and cls.__module__ == name:
                yield from (f for f in vars(cls).values() if inspect.isfunction(f))


def _is_of_library(path: Path, libraries: Iterable[Path]) -> bool:
    """Returns whether a file is torch's or Python's own. Other packages lie within Python's folder, too."""
    within = [path.relative_to(library).parts for library in libraries if path.is_relative_to(library)]
    return any("site-packages" not in parts for parts in within)


def _is_rotary(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__name__.endswith("RotaryEmbedding")


def _layers_of(function: Callable[..., Any]) -> Iterator[Callable[..., Any]]:
    """Yields a function and all functions that it wraps."""
    inner: Callable[..., Any] | None = function
    while inner is not None:
        if hasattr(inner, "__code__"):
            yield inner
        inner = getattr(inner, "__wrapped__", None)


@functools.cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
