"""Finds the parts of a vision-language model by their type and their arguments, not by their names.

A model that the hooks can patch puts visual features at placeholder tokens of a decoder. So:
- the decoder is the module with a list of layers that is called with embeddings, a mask, positions and a cache;
- the core model is the innermost module around it that takes pixels;
- the placeholders of a modality are a token id in the core model's configuration;
- positions are kept if the model counts them along several axes (M-RoPE), else they are renumbered.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from .calling import NAMES, Arguments, is_pixels, within

PLACEHOLDERS: Mapping[str, tuple[str, ...]] = {
    modality: (*names, *(f"vision_config.{name}" for name in names))
    for modality in ("image", "video")
    for names in [tuple(f"{modality}_{ending}" for ending in ("token_id", "token_index", "patch_id"))]
}
DECODER = ("embeds", "mask", "positions", "cache")  # the roles by which a decoder is recognised
CROSS = ("encoder_hidden_states", "cross_attention_states", "image_hidden_states", "encoder_outputs")


def core(model: nn.Module) -> nn.Module:
    """Returns the innermost module around the decoder whose forward takes pixels. Raises ValueError if there is
    none."""
    whole = [name for name, child in model.named_children() if hasattr(child, "generate") and _takes_pixels(child)]
    if whole and not _takes_pixels(model):
        raise ValueError(
            f"{type(model).__name__} takes no images itself, its part '{whole[0]}' does: apet.patch(model.{whole[0]}, "
            "...)"
        )
    found = list(_decoders(model, len(DECODER))) or [_decoder(model)]
    if any(_takes_pixels(decoder) for _, decoder in found):
        raise ValueError(
            f"{type(found[0][1]).__name__} takes pixels and runs its decoder layers itself: there is no call of a "
            "decoder with embeddings in between, where tokens could leave"
        )
    around = [[model.get_submodule(".".join(path[:n])) for n in range(len(path))] for path, _ in found]
    taking = [takers[-1] for modules in around if (takers := [m for m in modules if _takes_pixels(m)])]
    if taking and all(module is taking[0] for module in taking):
        return taking[0]
    if taking:
        names = ", ".join(sorted({type(module).__name__ for module in taking}))
        raise ValueError(
            f"{type(model).__name__} has several parts that take images: {names}. An adapter's `core` says which of "
            "them is meant (docs/add-a-model.md)"
        )
    nearest = (around[0] or [model])[-1]
    taken = ", ".join(inspect.signature(nearest.forward).parameters)
    raise ValueError(f"{type(nearest).__name__} takes no images: its forward has no pixel_values, but {taken}")


def decoder(core: nn.Module) -> nn.Module:
    """Returns the module with decoder layers that a core model calls with embeddings. Raises ValueError if there is
    none."""
    return _decoder(core)[1]


def layers(decoder: nn.Module) -> nn.ModuleList | None:
    """Returns the decoder layers of a module; None if it has none of its own."""
    lists = {name: child for name, child in decoder.named_children() if isinstance(child, nn.ModuleList) and len(child)}
    if "layers" in lists:
        return lists["layers"]
    fitting = [child for child in lists.values() if all("hidden" in Arguments.of(layer).names for layer in child)]
    return fitting[0] if len(fitting) == 1 else None


def tokens(core: nn.Module) -> dict[str, str]:
    """Returns the name of the configuration field with the placeholder of each modality that a core model has."""
    names = {m: next((n for n in names if of(core, n) is not None), None) for m, names in PLACEHOLDERS.items()}
    found = {m: name for m, name in names.items() if name is not None}
    if not found:
        raise ValueError(
            f"{type(core).__name__} puts no features at placeholder tokens as far as apet can tell: "
            f"{type(core.config).__name__} has no {', '.join(PLACEHOLDERS['image'])}. If it has a placeholder, an "
            "adapter's `tokens` says what it is called (docs/add-a-model.md)"
        )
    return found


def of(core: nn.Module, name: str) -> int | None:
    """Returns a token id in the configuration of a core model, by its dotted name; None if it has none."""
    value: Any = core.config
    for part in name.split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, int) else None


def positions(core: nn.Module) -> str:
    """Returns "keep" if a model counts positions along several axes, else "renumber"."""
    return "keep" if hasattr(core, "get_rope_index") else "renumber"


def axes(decoder: nn.Module) -> int:
    """Returns the number of position axes that the rotary embedding of a decoder takes: 3, or as its configuration
    says."""
    given = [getattr(decoder.config, name, None) or {} for name in ("rope_parameters", "rope_scaling")]
    by_type = [one for rope in given for one in rope.values() if isinstance(one, Mapping)]
    sections = [rope["mrope_section"] for rope in (*given, *by_type) if rope.get("mrope_section")]
    return len(sections[0]) if sections else 3


def takes_text_row(decoder: nn.Module) -> bool:
    """Returns whether a decoder takes the positions of the text as a row before the three axes, and recognises it by
    the number of rows. All decoders of transformers do, except GLM's in version 4."""
    if axes(decoder) != 3:
        return False
    try:
        return "shape[0] == 4" in inspect.getsource(within(decoder).forward)
    except (OSError, TypeError):  # the class was made at run time and has no source
        return True


def deepstack(core: nn.Module) -> int:
    """Returns the number of first decoder layers that visual features are added to again, from the configuration."""
    if by_layer := added_to(core.config):
        return 1 + max(by_layer)
    vision = getattr(core.config, "vision_config", None)
    return len(getattr(vision, "deepstack_visual_indexes", None) or ())


def added_to(config: Any) -> set[int]:
    """Returns the decoder layers before which visual features are added to tokens that are zeros at first (Granite 4
    Vision); none, if the features of a model are the input of its decoder."""
    pairs = getattr(config, "deepstack_layer_map", None) or ()
    return {layer for _, layer in pairs} | {*((pairs and getattr(config, "spatial_target_layers", None)) or ())}


def starts_empty(by_layer: set[int]) -> str:
    """Returns the reason why tokens that are zeros before the first of some layers cannot be dropped."""
    return (
        "its visual tokens are zeros where its decoder begins, and get their features from layer "
        f"{min(by_layer, default='-')} on, so tokens cannot be ranked there"
    )


def why_not(model: nn.Module) -> str | None:
    """Returns the reason why a model has no visual tokens that could be dropped; None if there is no such reason."""
    config = getattr(model, "config", None)
    if config is None:
        return "it has no configuration, as models of transformers have"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder: its decoder cross-attends to encoder outputs and has no visual tokens"
    if getattr(config, "canvas_length", None):
        return "it denoises blocks of tokens over the cache of a prompt, in several passes that apet does not follow"
    if (by_layer := added_to(config)) and 0 not in by_layer:
        return starts_empty(by_layer)
    if any(hasattr(module, "get_image_tokens") for module in (model, *model.children())):
        return (
            "its images become ids of a codebook in its vocabulary: there are no features, and a mean of several ids "
            "corresponds to no id"
        )
    takes_images = any(map(_takes_pixels, (model, *model.children())))
    resamplers = sorted({type(m).__name__ for m in model.modules() if "QFormer" in type(m).__name__})
    if takes_images and resamplers:
        return f"a {min(resamplers, key=len)} leaves a few dozen tokens of an image, fewer than compression would"
    return None


def _takes_pixels(module: nn.Module) -> bool:
    return any(is_pixels(name) for name in inspect.signature(module.forward).parameters)


def _decoder(within: nn.Module) -> tuple[list[str], nn.Module]:
    """Returns the decoder and the names that lead to it. Raises ValueError if there is none, or more than one."""
    found = list(_decoders(within, len(DECODER)))
    if len(found) > 1:
        named = ", ".join(f"{'.'.join(path)} ({type(module).__name__})" for path, module in found)
        raise ValueError(
            f"{type(within).__name__} has {len(found)} decoders: {named}. An adapter's `language_model` says which of "
            "them gets the images (docs/add-a-model.md)"
        )
    if found:
        return found[0]
    for _, near in _decoders(within, len(DECODER) - 1):
        Arguments.of(near, DECODER)  # raises an error that names the missing argument
    crossing = sorted({type(m).__name__ for m in within.modules() if _crosses(m)})
    if crossing:
        raise ValueError(
            f"apet finds no decoder in {type(within).__name__} that is called with embeddings: {crossing[0]} attends "
            "to image states instead of holding visual tokens"
        )
    known = ", ".join(name for role in DECODER for name in NAMES[role])
    raise ValueError(
        f"apet finds no decoder in {type(within).__name__}: no module with a list of layers whose forward takes "
        f"embeddings, a mask, positions and a cache ({known}). An adapter's `language_model` says where it is "
        "(docs/add-a-model.md)"
    )


def _decoders(within: nn.Module, roles: int) -> Iterator[tuple[list[str], nn.Module]]:
    """Yields the modules that have layers and at least `roles` of a decoder's arguments, with the names that lead to
    them."""
    for name, module in within.named_modules():
        if not any(isinstance(child, nn.ModuleList) for child in module.children()) or _crosses(module):
            continue
        names = Arguments.of(module).names
        if sum(role in names for role in DECODER) >= roles and layers(module) is not None:
            yield name.split(".") if name else [], module


def _crosses(module: nn.Module) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return "input_ids" in parameters and any(name in parameters for name in CROSS)
