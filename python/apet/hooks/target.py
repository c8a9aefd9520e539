"""`Target`: the parts of a model and the names of their arguments, found once when the model is patched."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from apet.notice import Notice

from . import parts
from .adapter import Adapter
from .calling import Arguments, Rotary, versions
from .config import Options
from .gaps import Gaps, chosen
from .mask_functions import IDLE, KINDS, RECURRENT, MaskBuilder, attention_types, implementation
from .masks import Reach
from .state import NOT_COMPILED_REASON
from .units import VisualTokens


@dataclass(frozen=True)
class Target:
    """One model, its adapter, its options, and how its modules are called.

    The modules are held weakly: the model holds the hooks, which hold this.
    """

    model: weakref.ref[nn.Module]
    core: weakref.ref[nn.Module]
    language_model: weakref.ref[nn.Module]
    projector: weakref.ref[nn.Module] | None  # compress before it; None: at the input of the language model
    adapter: Adapter
    options: Options
    model_arguments: Arguments
    core_arguments: Arguments
    language_model_arguments: Arguments
    layer_arguments: tuple[Arguments, ...]
    masks: MaskBuilder | None  # for the second stage
    rotary: Rotary | None  # for the second stage
    axes: int  # the number of position axes of M-RoPE
    text_row: bool  # whether a row with the positions of the text may precede the axes
    # Whether the core model's result is put back at the places of the prompt as given in every call: if the model does
    # not generate, it may be read there, as classifiers and embeddings take the row of a prompt's last token.
    by_place: bool
    # Whether the class leaves labels out by the last columns of the mask as given (Gemma 3 in transformers 4). If the
    # rows are padded on the right and drop other numbers of tokens, these columns hide labels that count.
    masks_labels: bool
    positions: str  # "keep" or "renumber": what tokens do with their positions if others are dropped
    gaps: Gaps | None  # how layers use positions, if tokens keep theirs along one axis
    warned: set[str] = field(default_factory=set)  # the options that a warning was given about

    @classmethod
    def find(
        cls, model: nn.Module, adapter: Adapter, resolve: Callable[[Adapter, nn.Module, range], Options]
    ) -> Target:
        """Finds the parts of a model and the names of their arguments.

        resolve: returns the options, from the adapter, the core model and the values that `llm_layer` may have. Raises
        ValueError if a part or an argument is missing.
        """
        core = plain(part_of(adapter.core, model, "core model", adapter))
        language_model = plain(part_of(adapter.language_model, core, "language model", adapter))
        adapter = adapter.fitted(core)
        layers = parts.layers(language_model)
        if layers is None:
            raise ValueError(
                f"{type(language_model).__name__}, the language model of {type(model).__name__}, has no list `layers` "
                "of decoder layers; an adapter's `language_model` says where they are (docs/add-a-model.md)"
            )
        config = language_model.config
        implementation(config)
        if not getattr(config, "is_causal", True) or getattr(config, "use_bidirectional_attention", None) == "all":
            raise ValueError(f"{type(language_model).__name__} attends in both directions, so it is not a decoder")
        options = resolve(adapter, core, range(adapter.first_llm_layer(core), len(layers)))
        positions = chosen(adapter, options, model.config.model_type)
        along_one_axis = positions == "keep" and parts.positions(core) == "renumber"
        projector = None
        if adapter.projector is not None and options.keep is not None:
            projector = weakref.ref(part_of(lambda c: c.get_submodule(adapter.projector), core, "projector", adapter))
        masks, rotary = None, None
        layers_from = range(0)
        if options.llm_layer is not None:
            layers_from = range(options.llm_layer, len(layers))
            check_second_stage(language_model, layers, options.llm_layer)
            masks = MaskBuilder.find()
            rotary = Rotary.of(language_model, layers, f"llm_layer={options.llm_layer} cannot be used")
        needed = ("mask", "cache", "hidden")
        return cls(
            weakref.ref(model),
            weakref.ref(core),
            weakref.ref(language_model),
            projector,
            adapter,
            options,
            Arguments.of(model),
            Arguments.of(core),
            Arguments.of(language_model, parts.DECODER),
            tuple(
                Arguments.of(layer, needed if i in layers_from else ("cache", "hidden"))
                for i, layer in enumerate(layers)
            ),
            masks,
            rotary,
            parts.axes(language_model),
            parts.takes_text_row(language_model),
            not hasattr(model, "generate"),
            "shift_attention_mask" in source_of(type(model).forward),
            positions,
            Gaps.of(language_model, layers) if along_one_axis else None,
        )

    def warn_nothing_dropped(self, name: str, tokens: VisualTokens, modalities: Iterable[str]) -> None:
        """Warns once that `keep` or `llm_keep` (whichever `name` is) drops none of these tokens, and which value would.

        A ratio of 1 gives no warning.
        """
        keep = getattr(self.options, name)
        wanted = keep if isinstance(keep, tuple) else (keep,)
        basis = self.options.appended
        most = max(tokens.lengths)
        least = most - basis  # the least keep that drops nothing of any unit
        if name in self.warned or least <= 1 or all(isinstance(k, float) and k == 1 for k in wanted):
            return
        if tokens.after(keep, self.options) != tokens.lengths:  # the guard has kept all
            return
        self.warned.add(name)
        units = " or ".join(sorted({self.adapter.unit_names.get(modality, modality) for modality in modalities}))
        added = f", and layout='append' adds {basis} basis tokens" if basis else ""
        message = (
            f"{name}={keep} drops nothing: it counts per {units}, and the largest has {most} tokens{added}; "
            f"{name}={least - 1} or less drops some"
        )
        warnings.warn(Notice(message, f"{name}={keep}"), stacklevel=2)

    # ---- methods that take the running module, which may be a replica of the one that was patched

    @staticmethod
    def flash(language_model: nn.Module) -> bool:
        """Returns whether attention takes sequence lengths instead of masks."""
        return "flash" in implementation(language_model.config)

    @staticmethod
    def kind(language_model: nn.Module, index: int) -> str:
        """Returns the kind of a decoder layer."""
        return attention_types(language_model.config)[index]

    def attending(self, language_model: nn.Module) -> int:
        """Returns the first layer from `llm_layer` on that attends to tokens."""
        kinds = attention_types(language_model.config)
        return next(i for i in range(self.options.llm_layer, len(kinds)) if kinds[i] in KINDS)

    @staticmethod
    def reach(language_model: nn.Module) -> Reach:
        """Returns which tokens the layers see, and the kind of layers that a single mask would be for."""
        config = language_model.config
        window, chunk = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        kinds = {kind for kind in attention_types(config) if kind in KINDS}
        single = kinds.pop() if len(kinds) == 1 else "full_attention"
        return Reach("full_attention" if single == "sliding_attention" and window is None else single, window, chunk)

    def layers(self) -> list[nn.Module]:
        """Returns the decoder layers."""
        return list(parts.layers(self.language_model()) or ())

    def holds_placeholders(self, core: nn.Module, ids: Any) -> bool:
        """Returns whether there are placeholders of images or videos among token ids."""
        tokens = [parts.of(core, name) for name in self.adapter.tokens.values()]
        return isinstance(ids, Tensor) and any(token is not None and bool((ids == token).any()) for token in tokens)

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def check_no_images(self, core: nn.Module, inputs: Mapping[str, Any], unknown: list[str]) -> None:
        """Raises ValueError for a call that has placeholders, no pixels, and arguments of unknown names that may be
        pixels."""
        if self.holds_placeholders(core, inputs.get("input_ids")):
            raise ValueError(
                f"{type(core).__name__} was called with placeholders of images or videos and with "
                f"{', '.join(unknown)}, but with no pixel_values: these arguments are not supported, and nothing "
                f"would be compressed ({versions()})"
            )


def check_second_stage(language_model: nn.Module, layers: nn.ModuleList, llm_layer: int) -> None:
    """Raises ValueError if the layers from `llm_layer` on cannot be given a sequence of their own."""
    config, owner = language_model.config, type(language_model).__name__
    kinds = attention_types(config)
    if len(kinds) != len(layers):
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used: {owner} has {len(layers)} layers, and its configuration "
            f"{len(kinds)}"
        )
    unknown = {*kinds} - {*KINDS, *RECURRENT, *IDLE}
    if unknown:
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used with {owner}: apet cannot build masks for its layers of type "
            f"{', '.join(sorted(unknown))}"
        )
    if not any(kind in KINDS for kind in kinds[llm_layer:]):
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used with {owner}: no layer from there on attends to tokens, so nothing "
            "tells how many there are"
        )
    attending = [i for i, kind in enumerate(kinds) if kind in KINDS]
    if attending[0] >= llm_layer:
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used with {owner}: its first layer that attends to tokens is layer "
            f"{attending[0]}, and the cache counts tokens there; llm_layer={attending[0] + 1} is the least"
        )
    if getattr(config, "indexer_budget", None) is not None:
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used with {owner}: its indexer reads the rotary embeddings of all tokens "
            "in the cache, of which the layers from there on have fewer"
        )
    if getattr(config, "num_kv_shared_layers", 0):
        raise ValueError(
            f"llm_layer={llm_layer} cannot be used with {owner}: its last {config.num_kv_shared_layers} layers use the "
            "keys and values of earlier ones, which may hold other tokens"
        )


def part_of(finder: Callable[[nn.Module], nn.Module], whole: nn.Module, what: str, adapter: Adapter) -> nn.Module:
    """Returns a part of a model, found by `finder`. Raises ValueError if it is not there."""
    try:
        return finder(whole)
    except AttributeError as error:
        raise ValueError(
            f"{type(whole).__name__} has no {what} where {type(adapter).__name__} looks for it ({error}). Models that "
            "are not transformers' own keep their parts elsewhere: write an adapter that says where "
            f"(docs/add-a-model.md), or load a port that transformers has ({versions()})"
        ) from error


def plain(module: nn.Module) -> nn.Module:
    """Returns the model inside the wrappers that torch, accelerate and PEFT put around it; hooks run there as well.

    Known wrappers are torch.compile, PEFT, DataParallel, DistributedDataParallel and FSDP.
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


def source_of(function: Callable[..., Any]) -> str:
    """Returns the source of a function; "" if it cannot be read."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""
