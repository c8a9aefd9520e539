"""The hooks of one patched model, and the state that they share: docs/hooks.md draws the data flow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import caches, encoder, prefill
from .adapter import Adapter
from .config import Options
from .state import Prompt, Run, Trace


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
        self.counted: Any = None  # the cache that generate() is told the given length of
        self.projected: encoder.Projected | None = None  # between the projector's two hooks
        self.run: Run | None = None  # of the language model's forward that is running
        self.trace: Trace | None = None  # of the last prefill with visuals
        if options.llm_layer is not None:
            self.check_rotary()

    # ---- on and off

    def install(self) -> None:
        """Registers every hook."""
        pre = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        self.handles = [
            pre(self.model, self.before_model),
            pre(self.core, self.before_core),
            self.core.register_forward_hook(self.after_core, always_call=True),
            pre(self.language_model, self.before_language_model),
            self.language_model.register_forward_hook(self.after_language_model, with_kwargs=True),
        ]
        if self.adapter.projector is not None and self.options.keep is not None:
            projector = self.core.get_submodule(self.adapter.projector)
            self.handles.append(projector.register_forward_pre_hook(self.before_projector))
            self.handles.append(projector.register_forward_hook(self.after_projector))
        for index, layer in enumerate(self.language_model.layers):
            self.handles.append(pre(layer, functools.partial(self.before_layer, index)))
        if hasattr(self.model, "generate"):
            # transformers 5 encodes images in generate(), before any forward that a hook could see.
            self.generate_before = self.model.__dict__.get("generate")
            self.model.generate = self.generate

    def remove(self) -> None:
        """Removes every hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        self.model.__dict__.pop("generate", None)
        if self.generate_before is not None:
            self.model.generate = self.generate_before

    # ---- what the model is like

    def check_rotary(self) -> None:
        """The second stage gives all layers from `llm_layer` on the same new rotary embeddings."""
        rotary = getattr(self.language_model, "rotary_emb", None)
        taken = all("position_embeddings" in _names(layer) for layer in self.language_model.layers)
        if rotary is None or not taken or "layer_type" in _names(rotary):
            raise ValueError(
                f"llm_layer={self.options.llm_layer} cannot be used with {type(self.language_model).__name__}: its "
                "layers do not share one rotary embedding"
            )

    @property
    def flash(self) -> bool:
        """Whether attention takes sequence lengths instead of masks."""
        return "flash" in self.language_model.config._attn_implementation

    @property
    def window(self) -> int | None:
        """The attention window, if every layer has one: then the only mask is of its kind."""
        slide = all(self.slides(index) for index in range(len(self.language_model.layers)))
        return self.language_model.config.sliding_window if slide else None

    def slides(self, index: int) -> bool:
        """Whether a decoder layer attends to a window only, as transformers decides it."""
        config = self.language_model.config
        types = getattr(config, "layer_types", None)
        return types[index] == "sliding_attention" if types else getattr(config, "sliding_window", None) is not None

    # ---- hooks, in the order in which they run

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """`model.generate` of this instance: the same, with what it was called with at hand for the encoder's hooks."""
        given = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        self.refuse_generation(given)
        prompts = next((p for p in map(given.get, ("inputs", "input_ids", "inputs_embeds")) if p is not None), ())
        before = self.generating, self.rows
        self.generating, self.rows = given, len(prompts)
        cache = given.get("past_key_values")
        self.counted = cache if caches.count_prompt(cache) else None
        try:
            generate = self.generate_before or functools.partial(type(self.model).generate, self.model)
            return generate(*args, **kwargs)
        finally:
            self.generating, self.rows = before
            self.stop_counting()

    def refuse_generation(self, given: Mapping[str, Any]) -> None:
        """What generate() would do wrong with images, in a sentence."""
        if not self.adapter.brings(given):
            return
        config = given.get("generation_config") or self.model.generation_config
        chunk = given.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
        if chunk is not None:
            raise ValueError(
                f"prefill_chunk_size={chunk} would tear images apart before they are compressed; leave it out"
            )
        caches.check_empty(given.get("past_key_values"))

    def stop_counting(self) -> None:
        """generate() has told old tokens from new ones: from here on the cache is as long as it is."""
        if self.counted is not None:
            caches.count_cache(self.counted)
            self.counted = None

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.stop_counting()
        if kwargs.get("labels") is not None and self.adapter.brings(kwargs):
            raise ValueError("labels cannot be used while visual tokens are dropped; unpatch the model to train it")

    def before_core(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        inputs = dict(zip(self.core_names, args, strict=False)) | kwargs
        self.inputs = inputs if self.adapter.brings(inputs) else None
        if self.inputs is not None:
            caches.check_empty(inputs.get("past_key_values"))

    def after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        self.inputs = self.projected = self.run = None  # whatever was raised on the way

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
        cache = kwargs.get("past_key_values")
        prompt = caches.prompt_of(cache)
        if prompt is not None and not torch.compiler.is_compiling() and int(cache.get_seq_length()) == 0:
            caches.forget(cache)
            prompt = None
        if inputs is not None:
            self.run = encoder.begin(self, inputs, kwargs)
        elif prompt is not None:
            self.run = self.go_on(prompt, cache, kwargs)
        else:
            self.run = None
        return (), kwargs

    def go_on(self, prompt: Prompt, cache: Any, kwargs: dict[str, Any]) -> Run:
        """More tokens after a prompt."""
        batch, new = kwargs["inputs_embeds"].shape[:2]
        caches.check(prompt, cache, batch)
        past = cache.get_seq_length()
        tail = caches.tail(prompt, cache, kwargs.get("attention_mask"), past, new)
        if prompt.early is not None:
            kwargs["attention_mask"] = prompt.early.columns(past, new, tail).long()
            kwargs["position_ids"] = prompt.early.positions(past, new, tail)
            if kwargs.get("cache_position") is not None:
                kwargs["cache_position"] = torch.arange(new, device=kwargs["cache_position"].device) + past
        return Run(prompt, tail=tail)

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
            caches.remember(cache, run.prompt)


def _names(module: nn.Module) -> list[str]:
    return list(inspect.signature(module.forward).parameters)
