"""Derives the units of images and videos from the grids and sizes among the arguments of a call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .calling import is_pixels, modality_of

# One entry for every placeholder of one image or video, in order: the number of its unit within that image or video,
# or -1 for a token that always stays. On the CPU, int64.
Units = Tensor


def one_unit(tokens: int) -> Units:
    """Returns the units of an image whose `tokens` placeholders are compressed together.

    Args:
        tokens: the number of its placeholders.

    Returns:
        [tokens] int64 on the CPU, all 0.

    Example:
        >>> apet.one_unit(3)
        tensor([0, 0, 0])
    """
    return torch.zeros(tokens, dtype=torch.int64)


def equal_units(units: int, tokens: int) -> Units:
    """Returns the units of a video: so many units, one after another, of `tokens` placeholders each.

    Args:
        units: the number of its units.
        tokens: the number of placeholders of each.

    Returns:
        [units * tokens] int64 on the CPU, ascending from 0.

    Example:
        >>> apet.equal_units(2, 3)
        tensor([0, 0, 0, 1, 1, 1])
    """
    return torch.arange(units).repeat_interleave(tokens)


def units(core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
    """Returns the units of the images and videos of a call, for each modality whose sizes agree with its placeholders.
    counts: the number of placeholders by modality."""
    found = {m: of_patches(core, inputs.get(f"{m}_grid_thw"), n) for m, n in counts.items()}
    if found.get("image") is None and "image" in counts:
        found["image"] = of_pixels(core, inputs.get("image_sizes"), counts["image"])
    return {m: units for m, units in found.items() if units is not None}


def split_runs(inputs: Mapping[str, Any], modality: str, lengths: list[int]) -> list[int]:
    """Splits runs of placeholders into images, if images of equal size [n, channels, height, width] stand side by
    side."""
    pixels = [x for name, x in inputs.items() if is_pixels(name) and modality_of(name) == modality]
    images = [len(x) for x in pixels if isinstance(x, Tensor) and x.dim() == 4]
    packed = inputs.get(f"{modality}_grid_thw") is not None  # then an entry is a patch
    if packed or len(images) != 1 or sum(lengths) % images[0]:
        return lengths
    each = sum(lengths) // images[0]
    return lengths if each < 2 or any(n % each for n in lengths) else [each] * images[0]


def unit_names(core: nn.Module) -> dict[str, str]:
    """Returns the name of a unit of each modality, for messages."""
    taken = inspect.signature(core.forward).parameters
    image = "image" if {"image_grid_thw", "image_sizes"} & {*taken} else "image or tile"
    return {"image": image, "video": "temporal step" if "video_grid_thw" in taken else "frame"}


def of_patches(core: nn.Module, grid: Any, placeholders: int) -> list[Units] | None:
    """Returns the units of grids of patches [steps, height, width], which a model merges into tokens; a step is a unit.

    A model may merge several steps, end each row with an additional token, or put one before and one after an image:
    these tokens always stay. Returns None if the grids do not agree with the number of placeholders.
    """
    if grid is None or not placeholders:
        return None
    sizes = [tuple(map(int, thw)) for thw in grid]
    side = 1 if sum(map(math.prod, sizes)) == placeholders else _merge(core)
    if side is None:
        side = math.isqrt(sum(math.prod(thw) for thw in sizes) // placeholders)
    if not side or any(h % side or w % side for _, h, w in sizes):
        return None
    merged = [(t, h // side, w // side) for t, h, w in sizes]
    together = sum(math.prod(thw) for thw in merged) // placeholders
    plain = together and all(t % together == 0 for t, _, _ in merged)
    if plain and sum(t // together * h * w for t, h, w in merged) == placeholders:
        return [equal_units(t // together, h * w) for t, h, w in merged]
    lines = [torch.arange(w + 1).lt(w).repeat(t * h) for t, h, w in merged]
    units = [torch.arange(t).repeat_interleave(h * (w + 1)) for t, h, w in merged]
    units = [torch.where(line, unit, -1) for line, unit in zip(lines, units, strict=True)]
    around = placeholders - sum(map(len, units))
    if around == 2 * len(units):
        units = [torch.nn.functional.pad(unit, (1, 1), value=-1) for unit in units]
    return units if around in (0, 2 * len(units)) else None


def _merge(core: nn.Module) -> int | None:
    """Returns the side, in patches, of the square that a model merges into a token, from its configuration."""
    for config in (getattr(core.config, "vision_config", None), core.config):
        for name in ("spatial_merge_size", "merge_size", "merge_kernel_size"):
            value = getattr(config, name, None)
            if isinstance(value, list | tuple) and len({*value}) == 1:
                value = value[0]
            if isinstance(value, int):
                return value
    return None


def of_pixels(core: nn.Module, sizes: Any, placeholders: int) -> list[Units] | None:
    """Returns the units of images of [height, width] pixels cut into patches (Pixtral); other tokens may stand between
    rows."""
    config = core.config
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if sizes is None or not isinstance(patch, int):
        return None
    side = patch * (getattr(config, "spatial_merge_size", None) or 1)
    counts = [int(h) // side * (int(w) // side) for h, w in sizes]
    return [one_unit(n) for n in counts] if sum(counts) == placeholders else None
