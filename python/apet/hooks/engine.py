"""The hooks of one patched model, and the state that they share: docs/hooks.md draws the data flow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import encoder, prefill
from .adapter import Adapter
from .config import Options
from .state import Prompt, Run, Trace

STATE = "_apet"  # the attribute of a cache that holds its Prompt


class Engine:
    """Patches one model with one adapter and one set of options. No module itself: it has no part in state_dict().

    Hooks are its bound methods, so that a deep copy or a pickle of the model carries an engine of its own.
    """

    def __init__(self, model: nn.Module, adapter: Adapter, options: Options):
        self.model, self.adapter, self.options = model, adapter, options
        self.core = adapter.core(model)
        self.language_model = adapter.language_model(self.core)
        self.core_names, self.language_model_names = _names(self.core), _names(self.language_model)
        self.handles: list[Any] = []
        self.generate_before: Any = None
        self.inputs: Mapping[str, Any] | None = None  # of the forward that is running, if it brings visuals
        self.generating: Mapping[str, Any] | None = None  # what generate() was called with, while it runs
        self.rows = 0  # of the batch that generate() was called with
        self.projected: encoder.Projected | None = None  # between the projector's two hooks
        self.run: Run | None = None  # of the language model's forward that is running
        self.trace: Trace | None = None  # of the last prefill with visuals

    # ---- on and off

    def install(self) -> None:
        """Registers every hook."""
        pre = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        self.handles = [
            pre(self.model, self.before_model),
            pre(self.core, self.before_core),
            pre(self.language_model, self.before_language_model),
            self.language_model.register_forward_hook(self.after_language_model, with_kwargs=True),
        ]
        if self.adapter.projector is not None and self.options.keep is not None:
            projector = self.core.get_submodule(self.adapter.projector)
            self.handles.append(projector.register_forward_pre_hook(self.before_projector))
            self.handles.append(projector.register_forward_hook(self.after_projector))
        for index, layer in enumerate(self.language_model.layers):
            self.handles.append(pre(layer, functools.partial(self.before_layer, index)))
        # transformers 5 encodes images in generate(), before any forward that a hook could see.
        self.generate_before = self.model.__dict__.get("generate")
        self.model.generate = self.generate

    def remove(self) -> None:
        """Removes every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if self.generate_before is None:
            del self.model.generate
        else:
            self.model.generate = self.generate_before

    # ---- what the model is like

    @property
    def flash(self) -> bool:
        """Whether attention takes sequence lengths instead of masks."""
        return "flash" in self.language_model.config._attn_implementation

    @property
    def window(self) -> int | None:
        """The attention window of layers that slide, if there are such."""
        config = self.language_model.config
        return config.sliding_window if any(map(self.slides, range(len(self.language_model.layers)))) else None

    def slides(self, index: int) -> bool:
        """Whether a decoder layer attends to a window only, as transformers decides it."""
        config = self.language_model.config
        types = getattr(config, "layer_types", None)
        return types[index] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None

    # ---- hooks, in the order in which they run

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` of this instance: the same, with what it was called with at hand for the encoder's hooks."""
        refuse_generation(kwargs | ({"generation_config": args[1]} if len(args) > 1 else {}), self)
        given = dict(kwargs)
        prompt = next(
            t for t in (*args[:1], *map(given.get, ("inputs", "input_ids", "inputs_embeds"))) if t is not None
        )
        before = self.generating, self.rows
        self.generating, self.rows = given, len(prompt)
        try:
            generate = self.generate_before or functools.partial(type(self.model).generate, self.model)
            return generate(*args, **kwargs)
        finally:
            self.generating, self.rows = before

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs.get("labels") is not None and self.adapter.brings(kwargs):
            raise ValueError("labels cannot be used while visual tokens are dropped; unpatch the model to train it")

    def before_core(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self.core_names, args, strict=False)) | kwargs
        self.inputs = inputs if self.adapter.brings(inputs) else None

    def before_projector(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        self.projected = None
        inputs = self.inputs or self.generating
        if inputs is None:  # get_image_features(), called by somebody else
            return None
        x = encoder.project_fewer(self, inputs, args[0])
        return None if x is None else (x,)

    def after_projector(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        projected, self.projected = self.projected, None
        return y if projected is None else encoder.project_back(projected, y)

    def before_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        kwargs = dict(zip(self.language_model_names, args, strict=False)) | kwargs
        inputs, self.inputs = self.inputs, None
        self.run = encoder.begin(self, inputs, kwargs) if inputs is not None else self.proceed(kwargs)
        return (), kwargs

    def proceed(self, kwargs: dict[str, Any]) -> Run | None:
        """A forward without visuals: text, or more tokens on the cache of a prompt."""
        cache = kwargs.get("past_key_values")
        prompt: Prompt | None = getattr(cache, STATE, None)
        if prompt is None:
            return None
        past = cache.get_seq_length()
        if not torch.compiler.is_compiling() and int(past) == 0:  # a cache that was reset
            delattr(cache, STATE)
            return None
        x = kwargs["inputs_embeds"]
        batch, new = x.shape[:2]
        if batch != prompt.batch:
            raise ValueError(
                f"a batch of {batch} cannot go on from a cache that was filled by a batch of {prompt.batch}"
            )
        if prompt.early is not None:
            steps = torch.arange(new, device=x.device)
            kwargs["attention_mask"] = prompt.early.columns(past, new).long()
            kwargs["position_ids"] = prompt.early.next + (past - prompt.early.length) + steps
            if kwargs.get("cache_position") is not None:
                kwargs["cache_position"] = steps + past
        return Run(prompt)

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        run = self.run
        if run is None:
            return None
        if index == self.options.llm_layer:
            x = prefill.enter(self, run, args[0] if args else kwargs["hidden_states"], kwargs)
            args, kwargs = (x, *args[1:]), {k: v for k, v in kwargs.items() if k != "hidden_states"}
        if run.late is not None:
            return args, prefill.arguments(self, run.late, index, kwargs)
        if run.prompt.early is not None:  # position_ids with gaps would be read as packed sequences
            return args, kwargs | {"position_ids": None}
        return args, kwargs

    def after_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        run, self.run = self.run, None
        cache = getattr(output, "past_key_values", None)
        if run is None or run.tokens is None or cache is None:
            return
        if run.prompt.early is not None or run.prompt.late is not None:
            setattr(cache, STATE, run.prompt)


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)


def refuse_generation(kwargs: Mapping[str, Any], engine: Engine) -> None:
    """What generate() would do wrong, in a sentence."""
    visuals = bool(engine.adapter.brings(kwargs))
    config = kwargs.get("generation_config") or engine.model.generation_config
    chunk = kwargs.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if chunk is not None and visuals:
        raise ValueError(f"prefill_chunk_size={chunk} would compress images in pieces; leave it out")
    cache = kwargs.get("past_key_values")
    if getattr(cache, STATE, None) is not None and int(cache.get_seq_length()) > 0:
        raise ValueError("...")
