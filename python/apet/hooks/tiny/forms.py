"""The shapes of the pixels of a random image or video, in each form that a processor may give."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import PretrainedConfig

from .fields import PATCH, SIDE

GRID = (1, 8, 12)  # of an image in patches, four of which make a token
VIDEO_GRID = (2, 8, 8)
FRAMES = 4


def forms(config: PretrainedConfig, modality: str, takes: set[str], alone: bool) -> list[dict[str, Any]]:
    """Returns the forms in which a processor may give an image or video: shapes of random pixels (tuples), and the
    other arguments that go with them."""
    vision = getattr(config, "vision_config", None) or config
    patch = getattr(vision, "patch_size", PATCH)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    side = getattr(vision, "image_size", SIDE)
    side = side if isinstance(side, int) else SIDE
    video = modality == "video"
    pixels = "pixel_values_videos" if video else "pixel_values"
    if "pixel_values_images" in takes and "pixel_values" not in takes:  # of transformers 4
        pixels = pixels if video else "pixel_values_images"
    n_patches, flat = GRID[1] * GRID[2], 3 * patch * patch
    sizes = torch.tensor([GRID[1:]])
    grid, places = f"{modality}_grid_thw", f"{modality}_position_ids"
    if grid in takes:
        size = VIDEO_GRID if video else GRID
        n, more = math.prod(size), {grid: torch.tensor([size])}
        steps = getattr(vision, "temporal_patch_size", None) or getattr(vision, "patch_temporal", None) or 1
        merge = getattr(vision, "spatial_merge_size", 2)
        if f"{modality}_merge_sizes" in takes:
            more[f"{modality}_merge_sizes"] = torch.tensor([merge])
        if video and "video_second_per_grid" in takes:
            more["video_second_per_grid"] = torch.tensor([1.0])
        tokens = torch.tensor([(size[0], size[1] // merge, size[2] // merge)])
        return [
            *({pixels: form} | more for form in ((n, steps * flat), (n, 3, patch, patch), (n, 3, steps, patch, patch))),
            {pixels: (n // merge**2, patch * merge, patch * merge, 3), grid: tokens},
        ]
    if places in takes:
        frames = 2 if video else 1
        where = torch.cartesian_prod(torch.arange(12), torch.arange(12)).flip(1).expand(frames, -1, -1)
        return [
            {pixels: (frames, 144, width), places: where}
            | ({"num_frames_per_video": torch.tensor([2])} if video else {})
            for width in (flat, 9 * flat)
        ]
    if "target_sizes" in takes:
        name = "target_sizes_videos" if video else "target_sizes"
        large = torch.tensor([[16, 24]] * (2 if video else 1))  # sixteen patches make a token
        return [{pixels: (1, 3, patch, patch * 384 * len(large)), name: large}]
    if "image_token_pooling" in takes:
        cells = torch.arange(144).view(6, 2, 6, 2).transpose(1, 2).reshape(36, 4)  # of a crop of 12 x 12 patches
        more = {f"{modality}_token_pooling": torch.cat([cells, 144 + cells])}
        more[f"{modality}_grids"] = torch.tensor([[2, 6, 6] if video else [6, 6, 6, 6]])
        return [{pixels: (2, 144, flat)} | more | ({} if video else {"image_num_crops": torch.tensor([2])})]
    if "image_grid_hw" in takes:
        return [{pixels: (1, 2, 6, SIDE, SIDE)} if video else {pixels: (n_patches, flat), "image_grid_hw": sizes}]
    if video:
        return [{pixels: (1, FRAMES, 3, SIDE, SIDE)}]
    square = {pixels: (1, 3, side, side)}
    if "spatial_shapes" in takes:
        valid = torch.ones(1, n_patches, dtype=torch.int)
        return [{pixels: (1, n_patches, flat), "spatial_shapes": sizes, "pixel_attention_mask": valid}]
    if "tile_fine_mask" in takes:
        return [{pixels: (1, 2, 3, SIDE, SIDE), "pixel_attention_mask": torch.ones(1, 2, dtype=torch.bool)}]
    if "pixel_attention_mask" in takes:
        return [{pixels: (1, 1, 3, side, side), "pixel_attention_mask": torch.ones(1, 1, side, side, dtype=torch.int)}]
    if hasattr(config, "image_grid_pinpoints") or "vision_aspect_ratio" in takes:
        return [{pixels: (1, 3 if alone else 1, 3, SIDE, SIDE), "image_sizes": torch.tensor([[40, 90]])}] + (
            [{pixels: (1, 3, 3, SIDE, SIDE), "image_sizes": torch.tensor([[40, 90]])}] if not alone else []
        )
    if "pixel_values_local" in takes:
        local = square | {"pixel_values_local": (2, 3, SIDE, SIDE)}
        return [
            local | {"num_local_patches": torch.tensor([2])},
            local | {"num_local_patches": [2], "patches_grid": [[2, 1]]},
        ]
    if "image_sizes" in takes:
        sized = square | {"image_sizes": torch.tensor([[side, side]])}
        return [sized, square] if vision.model_type == "pixtral" else [square, sized]
    if "high_res_pixel_values" in takes:
        return [square | {"high_res_pixel_values": (1, 3, side, side)}]
    return [
        square,
        {pixels: (1, 1, 3, side, side)},
        {pixels: (1, 24, flat)},
        {pixels: (24, getattr(vision, "temporal_patch_size", 1), patch, patch, 3)},
    ]
