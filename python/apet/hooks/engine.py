"""The hooks of one patched model, in the order in which they run. docs/hooks.md draws the data flow."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from . import along, caches, first_stage, generation, locate, results, second_stage, state
from .calling import versions
from .patching import Patch
from .state import NOT_COMPILED_REASON, Forward, Prompt, RunningCall


class Engine(Patch):
    """The hooks of one model; `Patch` has the state that they share."""

    def hooks(self) -> list[Any]:
        """Registers every hook."""
        target = self.target
        pre = functools.partial(nn.Module.register_forward_pre_hook, with_kwargs=True)
        post = functools.partial(nn.Module.register_forward_hook, with_kwargs=True, always_call=True)
        model, core, language_model = target.model(), target.core(), target.language_model()
        layers = target.layers()
        handles = [
            pre(model, self.before_model),
            pre(core, self.before_core),
            post(core, self.after_core),  # before the next one, if the model is a core model without a head
            post(model, self.after_model),
            pre(language_model, self.before_language_model),
            post(language_model, self.after_language_model),
            pre(layers[0], self.before_first_layer),
        ]
        if target.projector is not None:
            projector = target.projector()
            handles.append(projector.register_forward_pre_hook(self.before_projector))
            handles.append(projector.register_forward_hook(self.after_projector))
        first = len(layers) if target.options.llm_layer is None else target.options.llm_layer
        for index in range(0 if target.gaps is not None else first, len(layers)):
            handles.append(pre(layers[index], functools.partial(self.before_layer, index)))
        return handles

    # ---- generate()

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Runs `model.generate` of this instance, and makes its arguments available to the hooks that run during
        encoding."""
        model = self.target.model()
        generate = self.generate_before or functools.partial(type(model).generate, model)
        given = generation.named(generate, args, kwargs)
        generation.check(self.target, given)
        cache = next((v for v in given.values() if isinstance(v, Cache)), None)
        caches.check_padding(cache, given.get("attention_mask"))
        caches.count_prompt(cache)
        try:
            with state.running(generation.call_of(self, given)):
                return generate(*args, **kwargs)
        finally:
            caches.count_cache(cache)

    # ---- the model and the core model

    def before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        if not self.installed:
            return None
        arguments = self.target.model_arguments.bind(args, kwargs)
        caches.count_cache(self.target.model_arguments.cache(arguments))
        if not self.target.adapter.modalities(arguments):
            return None
        labels = arguments.get("labels")
        if labels is not None and torch.is_grad_enabled():
            raise ValueError(
                "labels cannot be used with gradients while visual tokens are dropped: score under torch.no_grad(), "
                "and unpatch the model to train it"
            )
        mask = arguments.get("attention_mask")
        of_tokens = isinstance(mask, Tensor) and mask.dim() == 2
        if labels is not None and self.target.masks_labels and of_tokens and not mask[:, -1].all():
            raise ValueError(
                f"{type(module).__name__} leaves out labels by the mask as given ({versions()}): pad on the left"
            )
        if mask is not None and balances_routers(module, arguments):
            raise ValueError(
                "output_router_logits=True computes a loss from the mask as given, in which dropped tokens count: "
                "leave it out, or unpatch the model"
            )
        copied = self.begin_model(labels, self.target.model_arguments.get("places", arguments))
        return None if labels is None or self.target.by_place else ((), arguments | {"labels": copied})

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def begin_model(self, labels: Tensor | None, places: Any) -> Tensor | None:
        """Returns a copy of the labels for the model. They are shortened in place once the kept tokens are known, but
        not if the class reads results by place. places: `logits_to_keep`."""
        state.drop_stale(self)
        labels = None if labels is None else labels.clone()
        last = 0 if places is None or isinstance(places, Tensor) else int(places)
        by_place = self.target.by_place or last > 0 or isinstance(places, Tensor)
        state.begin(RunningCall(weakref.ref(self), "model", {}, labels=labels, by_place=by_place, last=last))
        return labels

    def after_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        arguments = self.target.model_arguments.bind(args, kwargs)
        if not torch.compiler.is_compiling() or self.target.adapter.modalities(arguments):
            self.end_model()

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def end_model(self) -> None:
        state.end(self, "model")

    def before_core(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.installed:
            return
        inputs = self.target.core_arguments.bind(args, kwargs)
        if not torch.compiler.is_compiling():
            self.threads.mask = self.target.core_arguments.get("mask", inputs)
        if self.target.adapter.modalities(inputs):
            self.begin_call(module, inputs)
            return
        if not torch.compiler.is_compiling():
            state.end(self, "core")  # left by a call that raised an error, if hooks could not clean up
            self.threads.text, self.threads.ids = True, inputs.get("input_ids")
        unknown = self.target.core_arguments.unknown(inputs)
        if unknown:
            self.target.check_no_images(module, inputs, unknown)

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def begin_call(self, core: nn.Module, inputs: Mapping[str, Any]) -> None:
        state.end(self, "core")
        whole, running = state.current(self, "model"), generation.current(self)
        call = RunningCall(weakref.ref(self), "core", inputs, core=core, attributes=along.attributes(core))
        if whole is not None and whole.labels is not None and not self.target.by_place:
            call.labels, call.scored = whole.labels, whole.labels != -100
        call.asked = None if running is None else generation.columns(running)
        state.begin(call)

    def after_core(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        compiling = torch.compiler.is_compiling()
        if not compiling:
            self.threads.mask, self.threads.text, self.threads.ids = None, False, None
        if not compiling or self.target.adapter.modalities(self.target.core_arguments.bind(args, kwargs)):
            return self.end_call(output)
        return None

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def end_call(self, output: Any) -> Any:
        """Ends the call of the core model. Returns another output in its place, or None."""
        call = state.current(self, "core")
        state.end(self, "core")
        if output is None or call is None:
            return None
        locate.check_all(call)
        whole = state.current(self, "model")
        if call.trace is None or (whole is not None and not whole.by_place):
            return None
        return results.aligned(output, call.trace, 0 if whole is None else whole.last)

    # ---- the projector

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def before_projector(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor] | None:
        self.threads.projected = None
        call = self.installed and (state.current(self, "core", "generate") or generation.of_the_class(self))
        if not call:  # get_image_features() was called outside of a forward and of generate()
            return None
        if len(args) != 1:
            raise ValueError(
                f"{type(module).__name__} was called with {len(args)} arguments by position, expected one: the "
                f"features to project ({versions()})"
            )
        core = call.core or self.target.core()
        found = first_stage.project_fewer(self.target, core, module, call, args[0])
        if found is None:
            return None
        x, self.threads.projected = found
        return (x,)

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def after_projector(self, module: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        projected, self.threads.projected = getattr(self.threads, "projected", None), None
        return y if projected is None else first_stage.project_back(projected, y)

    # ---- the language model

    def before_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[tuple, dict] | None:
        """Shortens the arguments in a prefill with images; in later steps, replaces mask and positions by those of the
        shortened prompt."""
        if not self.installed:
            return None
        roles = self.target.language_model_arguments
        arguments = roles.bind(args, kwargs)
        cache = roles.cache(arguments)
        caches.count_cache(cache)
        prompt = caches.prompt_of(cache)
        if prompt is not None and not torch.compiler.is_compiling() and int(cache.get_seq_length()) == 0:
            caches.forget(cache)
            prompt = None
        embeds = roles.get("embeds", arguments)
        several = embeds is None or embeds.shape[1] > 1  # a compiled step of one token is no prefill
        call = self.prefilling() if several or not torch.compiler.is_compiling() else None
        if call is not None and self.takes_images(call, embeds, cache):
            return (), self.begin_prefill(module, call, arguments, prompt)
        if prompt is None or not prompt.compressed:
            if call is None and not torch.compiler.is_compiling():
                self.check_no_prompt(roles.owner, cache, prompt)
            return None
        return (), self.go_on(module, prompt, cache, arguments, call is not None)

    def check_no_prompt(self, owner: str, cache: Cache | None, prompt: Prompt | None) -> None:
        """Raises ValueError if a step of generate() comes without the cache of its compressed prompt, or if a call of
        generate() with images or videos begins without a call of the core model."""
        running = state.current(self, "generate")
        if running is not None and running.compressed:
            what = "no cache" if cache is None else f"a {type(cache).__name__} that this prompt did not fill"
            raise ValueError(
                f"{owner} was called with {what} in a step of generate(), whose prompt was compressed. Not supported "
                "are logits processors and stopping criteria that call the model, such as that of guidance_scale, and "
                f"the way in which some models pass their cache to the next step ({versions()})"
            )
        if prompt is None and not getattr(self.threads, "text", False):
            generation.check_core_runs(self, owner)

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def prefilling(self) -> RunningCall | None:
        """Returns the running call of the core model, with images or videos, that this call of the language model is
        part of."""
        return state.current(self, "core")

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def takes_images(self, call: RunningCall, embeds: Any, cache: Cache | None) -> bool:
        return locate.takes_images(self.target, call, embeds, cache)

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def begin_prefill(
        self, module: nn.Module, call: RunningCall, arguments: dict[str, Any], before: Prompt | None
    ) -> dict[str, Any]:
        running = None if state.has_pixels(call.inputs) else generation.current(self)
        forward, arguments = first_stage.begin(self.target, module, call, running, arguments, before)
        call.forward = forward.prompt.forward = forward
        return arguments

    def go_on(
        self, module: nn.Module, prompt: Prompt, cache: Cache, arguments: dict[str, Any], prefill: bool
    ) -> dict[str, Any]:
        """Returns the arguments of a call that adds tokens after a compressed prompt, or after a compressed part of it,
        in a prefill in several calls."""
        roles = self.target.language_model_arguments
        batch, new = roles.get("embeds", arguments).shape[:2]
        caches.check(prompt, cache, batch)
        if prompt.late is not None and prompt.llm_layer != self.options.llm_layer:
            raise ValueError(
                f"the cache holds a prompt compressed at llm_layer={prompt.llm_layer}, but the model is patched "
                f"with llm_layer={self.options.llm_layer} now; start without the cache"
            )
        if prompt.late is not None and prompt.positions != self.target.positions:
            raise ValueError(
                f"the cache holds a prompt compressed with positions='{prompt.positions}' and llm_layer, but the model "
                f"is patched with positions='{self.target.positions}' now; start without the cache"
            )
        past = cache.get_seq_length()
        if new > 1 and prompt.early is not None and not prefill and not torch.compiler.is_compiling():
            generation.check_kept_cache(self, cache)
            self.check_new_tokens(prompt, past)
        tail = caches.tail(prompt, cache, self.mask_given(roles.get("mask", arguments)), past, new)
        prompt.forward = Forward(module, prompt, tail=tail)
        if prompt.early is None:
            return arguments
        position = roles.get("cache_position", arguments)
        if new > 1 and not torch.compiler.is_compiling():
            caches.check_position(prompt, past, position)
        replaced = {
            "mask": prompt.early.columns(past, new, tail).long(),
            "positions": prompt.early.positions(past, new, tail),
        }
        if position is not None:
            replaced["cache_position"] = torch.arange(new, device=position.device) + state.on(past, position.device)
        return roles.replace(arguments, **replaced)

    def check_new_tokens(self, prompt: Prompt, past: int | Tensor) -> None:
        """Raises ValueError if tokens that continue a compressed prompt contain placeholders without pixels: then they
        were given before, and a loop has counted those by the length of the cache."""
        again = state.current(self, "generate") is None
        if again and self.target.holds_placeholders(self.target.core(), getattr(self.threads, "ids", None)):
            raise ValueError(
                "the tokens that continue a compressed prompt contain placeholders of images or videos, without "
                f"pixels. The cache holds {int(past)} tokens, but {int(past) + prompt.dropped} were given: give the "
                "tokens after these"
            )

    def mask_given(self, mask: Any) -> Any:
        """Returns the mask [B, L] over all tokens. Some core models pass another one to their language model."""
        if isinstance(mask, Tensor) and mask.dim() == 2:
            return mask
        return mask if torch.compiler.is_compiling() else getattr(self.threads, "mask", None)

    def before_first_layer(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Marks the cache that the layers write to. Only here is it known even if the language model has made it
        itself."""
        if not self.installed:
            return
        roles = self.target.layer_arguments[0]
        arguments = roles.bind(args, kwargs)
        cache = roles.cache(arguments)
        prompt = caches.prompt_of(cache)
        if cache is not None and (prompt is None or prompt.forward is None):
            self.mark(cache, roles.get("hidden", arguments))

    @torch.compiler.disable(reason="marks a cache that is new to this model")
    def mark(self, cache: Cache, x: Tensor) -> None:
        """Stores on a cache what is known of its tokens."""
        forward, prompt = self.running_forward(), caches.prompt_of(cache)
        if forward is not None:
            forward.cache = cache
            caches.remember(cache, forward.prompt)
        elif prompt is None:
            past = int(cache.get_seq_length())
            if past > 0:
                raise ValueError(
                    f"the cache holds {past} tokens that were not written by this patched model: it was filled before "
                    "patching, by another model, or made from another cache. Tokens may be missing in it, so it cannot "
                    "be continued; start without a cache"
                )
            caches.remember(cache, Prompt(len(x)))

    def running_forward(self) -> Forward | None:
        """Returns the prefill with visual tokens that runs in this thread, or None."""
        call = state.current(self, "core")
        return call and call.forward

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def running_forward_without_cache(self) -> Forward | None:
        return self.running_forward()

    def before_layer(self, index: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Changes the arguments of a layer from `llm_layer` on, and the positions of all layers if they have gaps."""
        if not self.installed:
            return None
        roles = self.target.layer_arguments[index]
        arguments = roles.bind(args, kwargs)
        second = self.target.options.llm_layer
        if second is None or index < second:
            positions = roles.get("positions", arguments)
            if isinstance(positions, Tensor) and positions.shape[-1] == 1:  # a step of one token has no gaps
                return None
        cache = roles.cache(arguments)
        prompt = caches.prompt_of(cache)
        forward = prompt.forward if prompt is not None else self.running_forward_without_cache()
        if forward is None:
            return None
        if index == second:
            arguments = second_stage.enter(self.target, forward, cache, arguments)
        if forward.late is None:
            if forward.positions is None:
                return None
            return (), first_stage.layer_arguments(self.target, forward, index, arguments)
        return (), second_stage.arguments(self.target, forward, index, module, arguments)

    def after_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        roles = self.target.language_model_arguments
        cache = roles.cache(roles.bind(args, kwargs))
        prompt = caches.prompt_of(cache)
        if self.installed and cache is not None and not torch.compiler.is_compiling():
            self.count_held(cache)
        if prompt is not None and prompt.forward is not None and prompt.forward.visual is None:  # not a prefill
            prompt.forward = None
        elif self.installed and (not torch.compiler.is_compiling() or prompt is None or prompt.forward is not None):
            self.end_prefill(output is not None)

    def count_held(self, cache: Cache) -> None:
        """Stores the number of tokens in the cache between two calls of a prefill in several calls."""
        call = state.current(self, "core")
        if call is not None:
            call.held = int(cache.get_seq_length())

    @torch.compiler.disable(reason=NOT_COMPILED_REASON)
    def end_prefill(self, succeeded: bool) -> None:
        """Checks the result of a prefill, and stores on its cache what later steps need."""
        call, forward = state.current(self, "core"), self.running_forward()
        if forward is None:
            return
        call.forward = forward.prompt.forward = None
        if not succeeded:
            return
        running = state.current(self, "generate")
        if running is not None and forward.prompt.compressed:
            running.compressed = True
        if forward.cache is not None:
            if forward.prompt.compressed:
                caches.check_lengths(forward, self.target.options.llm_layer)
            caches.remember(forward.cache, forward.prompt)
        if forward.visual is not None:
            start, length = call.columns - forward.trace.lengths[0], locate.length_of(call.inputs)
            forward.trace.within(start, length, self.target.core_arguments.get("mask", call.inputs))
            self.latest = self.threads.trace = call.trace = forward.trace
            if forward.labels is not None:
                forward.trace.shorten_labels(forward.labels)


def balances_routers(model: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Returns whether a call with these arguments computes the loss that balances the experts of its routers."""
    wanted = arguments.get("output_router_logits")
    config = getattr(model, "config", None)
    return bool(
        getattr(getattr(config, "text_config", config), "output_router_logits", False) if wanted is None else wanted
    )
