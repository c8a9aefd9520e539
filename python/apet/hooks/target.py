"""What a patched model is like: found once, when it is patched, and not changed afterwards."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import apet

from .adapter import Adapter
from .calling import ATTENTION_TYPES, Arguments, MaskBuilder, attention_types, check_rotary, implementation, versions
from .config import Options
from .units import Tokens


@dataclass(frozen=True)
class Target:
    """One model, its adapter, its options, and how its modules are called.

    The modules are held weakly: the model holds the hooks, which hold this.
    """

    model: weakref.ref[nn.Module]
    core: weakref.ref[nn.Module]
    language_model: weakref.ref[nn.Module]
    projector: weakref.ref[nn.Module] | None  # where the first stage is; None: at the input of the language model
    adapter: Adapter
    options: Options
    model_arguments: Arguments
    core_arguments: Arguments
    language_model_arguments: Arguments
    layer_arguments: tuple[Arguments, ...]
    masks: MaskBuilder | None  # for the second stage
    said: set[str] = field(default_factory=set)  # what users were told once

    @classmethod
    def find(
        cls, model: nn.Module, adapter: Adapter, resolve: Callable[[Adapter, nn.Module, range], Options]
    ) -> Target:
        """Finds the parts of a model and the names of their arguments.

        resolve: gives the options, from the adapter, the core model and what `llm_layer` may be. Raises ValueError
        where a part or an argument is missing.
        """
        core = plain(adapter.core(model))
        language_model = plain(part_of(adapter.language_model, core, "language model", adapter))
        layers = getattr(language_model, "layers", None)
        if not isinstance(layers, nn.ModuleList) or not len(layers):
            raise ValueError(
                f"{type(language_model).__name__}, the language model of {type(model).__name__}, has no list `layers` "
                "of decoder layers; an adapter's `language_model` says where they are (docs/hooks.md)"
            )
        implementation(language_model.config)
        options = resolve(adapter, core, range(adapter.first_llm_layer(core), len(layers)))
        projector = None
        if adapter.projector is not None and options.keep is not None:
            projector = weakref.ref(part_of(lambda c: c.get_submodule(adapter.projector), core, "projector", adapter))
        masks = None
        layers_from = range(0)
        if options.llm_layer is not None:
            layers_from = range(options.llm_layer, len(layers))
            check_rotary(language_model, layers, options.llm_layer)
            if len(attention_types(language_model.config)) != len(layers):
                raise ValueError(
                    f"llm_layer={options.llm_layer} cannot be used: {type(language_model).__name__}.layers has "
                    f"{len(layers)} layers, and its configuration {len(attention_types(language_model.config))}"
                )
            unknown = {*attention_types(language_model.config)} - {*ATTENTION_TYPES}
            if unknown:
                raise ValueError(
                    f"llm_layer={options.llm_layer} cannot be used with {type(language_model).__name__}: apet cannot "
                    f"build masks for its layers of type {', '.join(sorted(unknown))}"
                )
            masks = MaskBuilder.find()
        needed = ("mask", "cache", "rotary", "hidden")
        return cls(
            weakref.ref(model),
            weakref.ref(core),
            weakref.ref(language_model),
            projector,
            adapter,
            options,
            Arguments.of(model),
            Arguments.of(core),
            Arguments.of(language_model, ("embeds", "mask", "positions", "cache")),
            tuple(
                Arguments.of(layer, needed if i in layers_from else ("cache", "hidden"))
                for i, layer in enumerate(layers)
            ),
            masks,
        )

    def say_nothing_dropped(self, name: str, tokens: Tokens, modalities: Iterable[str]) -> None:
        """Tells once that `keep` or `llm_keep`, whichever the name is, drops none of these tokens, and what would.

        A ratio of 1 says so itself.
        """
        keep = getattr(self.options, name)
        wanted = keep if isinstance(keep, tuple) else (keep,)
        basis = self.options.appended
        most = max(tokens.lengths)
        least = most - basis  # the least keep that drops nothing of any unit
        if name in self.said or least <= 1 or all(isinstance(k, float) and k == 1 for k in wanted):
            return
        self.said.add(name)
        units = " or ".join(sorted({self.adapter.unit_names.get(modality, modality) for modality in modalities}))
        added = f", and layout='append' adds {basis} basis tokens" if basis else ""
        message = (
            f"{name}={keep} drops nothing: it counts per {units}, and the largest has {most} tokens{added}; "
            f"{name}={least - 1} or less drops some"
        )
        warnings.warn(apet.Notice(message, f"{name}={keep}"), stacklevel=2)

    # ---- of a module that runs, which may be a replica of the one that was patched

    @staticmethod
    def flash(language_model: nn.Module) -> bool:
        """Whether attention takes sequence lengths instead of masks."""
        return "flash" in implementation(language_model.config)

    @staticmethod
    def slides(language_model: nn.Module, index: int) -> bool:
        """Whether a decoder layer attends to a window only."""
        return attention_types(language_model.config)[index] == "sliding_attention"

    @staticmethod
    def window(language_model: nn.Module) -> tuple[int | None, bool]:
        """The attention window of the layers that have one, and whether all do: then the only mask is of its kind."""
        types = attention_types(language_model.config)
        size = getattr(language_model.config, "sliding_window", None)
        return size, size is not None and all(t == "sliding_attention" for t in types)

    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        language_model: Any = self.language_model()
        return list(language_model.layers)


def part_of(find: Callable[[nn.Module], nn.Module], core: nn.Module, what: str, adapter: Adapter) -> nn.Module:
    """A part of the core model. Raises ValueError where it is not there."""
    try:
        return find(core)
    except AttributeError as error:
        raise ValueError(
            f"{type(core).__name__} has no {what} where {type(adapter).__name__} looks for it ({error}). Models that "
            "are not transformers' own keep their parts elsewhere: write an adapter that says where (docs/hooks.md), "
            f"or load a port that transformers has ({versions()})"
        ) from error


def plain(module: nn.Module) -> nn.Module:
    """The model within the wrappers that torch, accelerate and PEFT put around one: its hooks run there, too.

    Known are torch.compile, PEFT, and DataParallel, DistributedDataParallel and FSDP.
    """
    while True:
        if isinstance(getattr(module, "_orig_mod", None), nn.Module):
            module = module._orig_mod
        elif callable(getattr(module, "get_base_model", None)):
            module = module.get_base_model()
        elif isinstance(getattr(module, "module", None), nn.Module) and type(module).__module__.startswith("torch."):
            module = module.module
        else:
            return module
