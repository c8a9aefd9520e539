"""The units of images and videos, from what a call says about their sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

# One entry for every placeholder of one image or video, in order: the number of its unit within that image or video,
# or -1 for a token that always stays. On the CPU, int64.
Units = Tensor


def one_unit(tokens: int) -> Units:
    """An image of `tokens` placeholders that are compressed together."""
    return torch.zeros(tokens, dtype=torch.int64)


def equal_units(units: int, tokens: int) -> Units:
    """A video of so many units, one after another, of `tokens` placeholders each."""
    return torch.arange(units).repeat_interleave(tokens)


def visuals(core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
    """The images and videos of a call whose sizes explain its placeholders, by modality. counts: the placeholders."""
    found = {m: _of_patches(inputs.get(f"{m}_grid_thw"), n) for m, n in counts.items()}
    if found.get("image") is None and "image" in counts:
        found["image"] = _of_pixels(core, inputs.get("image_sizes"), counts["image"])
    return {m: units for m, units in found.items() if units is not None}


def unit_names(core: nn.Module) -> dict[str, str]:
    """What a unit of each modality is called."""
    steps = "video_grid_thw" in inspect.signature(core.forward).parameters
    return {"image": "image", "video": "temporal step" if steps else "video"}


def _of_patches(grid: Any, placeholders: int) -> list[Units] | None:
    """Grids of patches [steps, height, width], of which the model makes one token of every so many; a step is a unit.

    None where the grids do not explain the placeholders.
    """
    if grid is None or not placeholders:
        return None
    sizes = [tuple(map(int, thw)) for thw in grid]
    merged, rest = divmod(sum(t * h * w for t, h, w in sizes), placeholders)
    if rest or any(h * w % merged for _, h, w in sizes):
        return None
    return [equal_units(t, h * w // merged) for t, h, w in sizes]


def _of_pixels(core: nn.Module, sizes: Any, placeholders: int) -> list[Units] | None:
    """Images of [height, width] pixels in patches, as Pixtral's are; between their rows may stand other tokens."""
    config = core.config
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if sizes is None or not isinstance(patch, int):
        return None
    side = patch * (getattr(config, "spatial_merge_size", None) or 1)
    counts = [int(h) // side * (int(w) // side) for h, w in sizes]
    return [one_unit(n) for n in counts] if sum(counts) == placeholders else None
