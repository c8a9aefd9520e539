"""Finds the running call of generate(), and rejects calls that would be wrong with images or a compressed prompt."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import Cache

from . import state
from .calling import versions
from .patching import Patch
from .state import RunningCall
from .target import Target


def check(target: Target, given: Mapping[str, Any]) -> None:
    """Raises ValueError for arguments with which generate() would treat images wrongly."""
    if not target.adapter.modalities(given):
        prompts = {"input_ids": next((p for p in map(given.get, ("inputs", "input_ids")) if p is not None), None)}
        unknown = target.core_arguments.unknown(given)
        if unknown:
            target.check_no_images(target.core(), prompts, unknown)
        return
    check_no_speech(target, given)
    config = given.get("generation_config") or getattr(target.model(), "generation_config", None)
    chunk = given.get("prefill_chunk_size") or getattr(config, "prefill_chunk_size", None)
    if chunk is not None:
        raise ValueError(f"prefill_chunk_size={chunk} would split images between chunks; leave it out")
    for name in ("use_mtp", "speculation_type", "penalty_alpha"):
        if (value := given.get(name) or getattr(config, name, None)) is not None and value is not False:
            raise ValueError(f"{name}={value!r} reads hidden states at the places of dropped tokens; leave it out")
    beams = given.get("num_beams") or getattr(config, "num_beams", None) or 1
    if target.options.adaptive and beams > 1:  # beams of a prompt must have the same tokens, to take turns in a cache
        named = "share=True" if target.options.share else "guard='keep'"
        raise ValueError(f"{named} may give copies of an image other budgets, so not with num_beams={beams}")


def check_no_speech(target: Target, given: Mapping[str, Any]) -> None:
    """Raises ValueError if this generate() runs within that of a larger model that speaks: its talker goes on from the
    hidden states at the places of the prompt as given, where dropped tokens are missing."""
    model = target.model()
    config = given.get("generation_config") or getattr(model, "generation_config", None)
    if not given.get("output_hidden_states", getattr(config, "output_hidden_states", None)):
        return
    frame = sys._getframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "generate" else None
        if isinstance(getattr(owner, "talker", None), nn.Module) and any(part is model for part in owner.modules()):
            raise ValueError(
                f"{type(owner).__name__}.generate would make speech from hidden states of {type(model).__name__}, "
                "whose visual tokens are dropped: call it with return_audio=False, or unpatch the model"
            )
        frame = frame.f_back


def current(patch: Patch) -> RunningCall | None:
    """Returns the call of generate() that runs in this thread: through this instance, or directly through its class."""
    return state.current(patch, "generate") or of_the_class(patch)


def of_the_class(patch: Patch) -> RunningCall | None:
    """Finds a running `type(model).generate(model, ...)` on the stack; no hook sees such a call."""
    model = patch.target.model()
    code = getattr(inspect.unwrap(getattr(type(model), "generate", None) or type), "__code__", None)
    frame = sys._getframe()
    while frame is not None and code is not None:
        if frame.f_code is code and frame.f_locals.get("self") is model:
            taken, _, rest, values = inspect.getargvalues(frame)
            return call_of(patch, {name: values.get(name) for name in taken} | values.get(rest or "", {}))
        frame = frame.f_back
    return None


def check_core_runs(patch: Patch, owner: str) -> None:
    """Raises ValueError if generate() was called with images or videos, and has called the language model (a class
    `owner`) without a call of the core model, which has the placeholders."""
    call = current(patch)
    if call is not None and patch.adapter.modalities(call.inputs):
        model, core = type(patch.model).__name__, type(patch.core).__name__
        raise ValueError(
            f"{model}.generate was called with images and calls {owner} without a forward of {core}, so the images "
            f"cannot be found, and nothing would be dropped: call {core}.forward in a loop, or load a port that "
            f"transformers has ({versions()})"
        )


def check_kept_cache(patch: Patch, cache: Cache) -> None:
    """Raises ValueError if the class's generate() continues a compressed prompt: it would take dropped tokens as new
    ones. The instance's generate() counts the tokens as given."""
    if state.current(patch, "generate") is None:
        call = of_the_class(patch)
        if call is not None and any(value is cache for value in call.inputs.values()):
            name = type(patch.model).__name__
            raise ValueError(
                f"{name}.generate(model, ...) was called with a cache that holds a compressed prompt, and counts "
                "its tokens wrongly; call model.generate(...)"
            )


def named(generate: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call of generate() by name. Functions that do not name them are taken for wrappers of
    transformers' generate()."""
    parameters = inspect.signature(generate).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    found = dict(zip(names or ("inputs", "generation_config"), args, strict=False)) | dict(kwargs)
    ids = found.get("inputs")
    if found.get("input_ids") is None and isinstance(ids, Tensor) and not ids.is_floating_point():
        found["input_ids"] = ids
    return found


def columns(call: RunningCall) -> int | None:
    """Returns the number of tokens of a prompt that generate() was called with, including those that a cache holds and
    only the attention mask shows; None if it was called without any."""
    given = [call.inputs.get(name) for name in ("inputs", "input_ids", "inputs_embeds")]
    found = [p.shape[1] for p in given if isinstance(p, Tensor) and p.dim() > 1]
    mask = call.inputs.get("attention_mask")
    if found and isinstance(mask, Tensor) and mask.dim() == 2:
        found.append(mask.shape[1])
    return max(found, default=None)


def call_of(patch: Patch, given: Mapping[str, Any]) -> RunningCall:
    """Returns the record of a call of generate() with these arguments."""
    prompts = next((p for p in map(given.get, ("inputs", "input_ids", "inputs_embeds")) if p is not None), ())
    return RunningCall(weakref.ref(patch), "generate", given, rows=len(prompts))
