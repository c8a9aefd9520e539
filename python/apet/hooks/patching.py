"""The patch of a model: installs and removes hooks, and follows copies and pickles of the model."""

from __future__ import annotations

import copy
import dataclasses
import sys
import threading
import weakref
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .config import Options
from .state import Trace
from .target import Target

MODULES = ("model", "core", "language_model", "projector")  # the fields of a target that hold modules


def drop_compiled() -> None:
    """Drops compiled code, which would not notice that hooks were added or removed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


class Patch:
    """The patch of one model; the subclass `Engine` has the hooks. It is not an nn.Module, so state_dict() lacks it.

    The hooks are bound methods of the patch, which holds the model weakly. So a deep copy or a pickle of the model
    carries a patch of its own, a deep copy of a part of the model shares this one, and `del model` frees both. The
    state of a call is stored with the call (state.py), so several threads may call one model.
    """

    def __init__(self, target: Target):
        self.target = target
        self.handles: list[Any] = []
        self.generate_before: Any = None
        self.installed = False
        self.latest: Trace | None = None  # of the last prefill with visual tokens, in any thread
        # trace: of the last such prefill in this thread; projected: passed from the hook before the projector to the
        # one after it; mask: given to the core model; text: whether the core model runs without images or videos
        self.threads = threading.local()

    def hooks(self) -> list[Any]:
        """Registers every hook. Returns their handles."""
        raise NotImplementedError

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Replaces `model.generate` of this instance."""
        raise NotImplementedError

    def install(self) -> None:
        """Registers every hook, and replaces `generate`."""
        model = self.target.model()
        self.handles = self.hooks()
        if hasattr(model, "generate"):
            # transformers 5.22 encodes images in generate(), before any forward that a hook could see.
            self.generate_before = model.__dict__.get("generate")
            model.generate = self.generate
        self.installed = True

    def remove(self) -> None:
        """Removes every hook. Copies of a hook that other libraries made (PEFT copies modules) do nothing from now
        on."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.installed = [], False
        model = self.target.model()
        if model is not None:
            model.__dict__.pop("generate", None)
            if self.generate_before is not None:
                model.generate = self.generate_before
        self.generate_before = None

    @property
    def model(self) -> nn.Module:
        return self.target.model()

    @property
    def core(self) -> nn.Module:
        return self.target.core()

    @property
    def language_model(self) -> nn.Module:
        return self.target.language_model()

    @property
    def adapter(self) -> Adapter:
        return self.target.adapter

    @property
    def options(self) -> Options:
        return self.target.options

    @property
    def trace(self) -> Trace | None:
        """The trace of the last prefill with visual tokens in this thread, or, if this thread has run none, in any
        thread."""
        return getattr(self.threads, "trace", None) or self.latest

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state with the modules themselves, since a pickle cannot hold weak references."""
        fields = {f.name: getattr(self.target, f.name) for f in dataclasses.fields(self.target)}
        modules = {name: fields[name] and fields[name]() for name in MODULES}
        kept = {name: getattr(self, name) for name in ("handles", "generate_before", "installed", "latest")}
        return kept | {"target": fields | modules}

    def __setstate__(self, state: dict[str, Any]) -> None:
        fields = state.pop("target")
        refs = {name: None if fields[name] is None else weakref.ref(fields[name]) for name in MODULES}
        self.__dict__.update(state, target=Target(**fields | refs), threads=threading.local())

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        """Copies the patch along with the whole model; a copy of a part of the model (PEFT copies projectors) shares
        this one."""
        if id(self.target.model()) not in memo:
            return self
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin
