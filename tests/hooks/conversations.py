"""Conversations for the tiny models: samples with no, one or several images and videos, and batches of them.

A sample is a list of parts: a number (of text tokens), `"image"`, `"image1"`, `"image2"` (three sizes, if images of the
family have sizes) or `"video"`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import transformers
from families import END, IMAGE, PAD, PATCH, SIDE, START, TILE, VIDEO, Family, takes
from postcard import PATCHES
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

# Some versions read a duration for each image too, from those of the videos, and raise StopIteration if there are no
# more (transformers' issue 45325). All are 1.0 here, which is the default.
_positions = inspect.getsource(transformers.Qwen2_5_VLModel.get_rope_index)
IMAGES_HAVE_SECONDS = "mm_token_type_ids" in _positions and "if modality_type == 2" not in _positions

Part = int | str
FRAMES = 4
GRIDS = [(1, 8, 12), (1, 12, 8), (1, 8, 8)]  # patches; four of them make a token: 24, 24, 16
VIDEO_GRID = (3, 8, 8)  # 16 tokens for each of 3 pairs of frames
SIZES = [(60, 90), (96, 40), (80, 84)]  # pixels: two tiles and four, all of them with some padding to cut off


@dataclass(frozen=True)
class Visual:
    """One image or video."""

    kind: str  # "image" or "video"
    pixels: Tensor  # the result of the family's processor
    size: tuple[int, ...]  # (height, width) in pixels with tiles, (t, h, w) in patches where ragged, else ()
    count: int  # its placeholders


@dataclass
class Sample:
    """One row of a batch: token ids with placeholders, and the visuals of the placeholders, in order."""

    ids: list[int] = field(default_factory=list)
    visuals: list[Visual] = field(default_factory=list)


def sources(model: PreTrainedModel, size: tuple[int, int], tiles: int) -> Tensor:
    """Returns where each packed token of a tiled image comes from: tile * TILE + position, or -1 for a newline
    token."""
    index = torch.arange(tiles * TILE, dtype=torch.float32).view(tiles, TILE, 1)
    newline = -torch.ones(1)
    if model.config.model_type == "llava_onevision":
        packed, _ = model.model.pack_image_features([index], [list(size)], image_newline=newline)
    else:
        packed, _ = model.model.pack_image_features([index], [list(size)], "default", image_newline=newline)
    return packed[0].flatten().long()


def visual(model: PreTrainedModel, family: Family, kind: str, which: int, alone: bool, make: torch.Generator) -> Visual:
    """Makes a random image or video. `alone`: it is the only image of its sample (LLaVA-OneVision tiles only those)."""
    if family.ragged:
        grid = VIDEO_GRID if kind == "video" else GRIDS[which]
        patches = grid[0] * grid[1] * grid[2]
        return Visual(kind, torch.randn(patches, 3 * 2 * 4 * 4, generator=make), grid, patches // 4)
    if kind == "video":
        pixels = torch.randn(FRAMES, 3, SIDE, SIDE, generator=make)
        each = {"video_llava": TILE + 1, "llava_onevision": TILE // 4, "llava_next_video": TILE // 4}[family.name]
        return Visual(kind, pixels, (), FRAMES * each + (family.name == "llava_onevision"))
    if family.tiles:
        size, tiles = SIZES[which], 1
        if family.name != "llava_onevision" or alone:
            pinpoints = model.config.image_grid_pinpoints
            tiles = image_size_to_num_patches(image_size=list(size), grid_pinpoints=pinpoints, patch_size=SIDE)
        pixels = torch.randn(tiles, 3, SIDE, SIDE, generator=make)
        return Visual(kind, pixels, size, len(sources(model, size, tiles)))
    if family.name == "postcard":
        return Visual(kind, torch.randn(1, PATCHES, 12, generator=make), (), 1 + PATCHES)
    if family.name == "aya_vision":  # 12 x 12 patches, four of them make a token
        return Visual(kind, torch.randn(1, 3, SIDE, SIDE, generator=make), (), 36)
    if family.name == "internvl":
        tiles = 1 + which  # crops of an image, each with (SIDE // 4 // 2)^2 tokens
        return Visual(kind, torch.randn(tiles, 3, SIDE, SIDE, generator=make), (), tiles * (SIDE // 8) ** 2)
    return Visual(kind, torch.randn(1, 3, SIDE, SIDE, generator=make), (), (SIDE // PATCH) ** 2)


def sample(model: PreTrainedModel, family: Family, parts: Sequence[Part], seed: int = 0) -> Sample:
    """Makes a random conversation of these parts."""
    make = torch.Generator().manual_seed(seed)
    images = sum(str(part).startswith("image") for part in parts)
    row = Sample()
    for part in parts:
        if isinstance(part, int):
            row.ids += torch.randint(3, 120, (part,), generator=make).tolist()
            continue
        kind, which = part[:5], int(part[5:] or 0)
        one = visual(model, family, kind, which, images == 1, make)
        row.visuals.append(one)
        token = IMAGE if kind == "image" else VIDEO
        if family.name == "qwen3_vl" and kind == "video":  # a time stamp before every frame
            for _ in range(one.size[0]):
                stamp = torch.randint(3, 120, (2,), generator=make).tolist()
                row.ids += [*stamp, START, *[token] * (one.count // one.size[0]), END]
        elif family.ragged:
            row.ids += [START, *[token] * one.count, END]
        else:
            row.ids += [token] * one.count
    return row


def collate(
    family: Family, rows: Sequence[Sample], side: str = "left", pad_to: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Returns the inputs of a model for these samples, padded on one side to the longest of them, or to `pad_to`
    tokens."""
    width = max(pad_to, *(len(row.ids) for row in rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for b, row in enumerate(rows):
        where = slice(width - len(row.ids), width) if side == "left" else slice(0, len(row.ids))
        ids[b, where] = torch.tensor(row.ids)
        mask[b, where] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    if family.ragged and takes(getattr(transformers, family.model), "mm_token_type_ids"):
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    for kind in ("image", "video"):
        found = [one for row in rows for one in row.visuals if one.kind == kind]
        if found:
            inputs |= _pixels(family, kind, found, dtype)
    if family.name == "llava_onevision" and "pixel_values" in inputs:
        counts = [sum(one.kind == "image" for one in row.visuals) for row in rows]
        inputs["batch_num_images"] = torch.tensor([n for n in counts if n])
    return inputs


def _pixels(family: Family, kind: str, found: list[Visual], dtype: torch.dtype) -> dict[str, Tensor]:
    name = "pixel_values" if kind == "image" else "pixel_values_videos"
    pixels = [one.pixels.to(dtype) for one in found]
    if family.ragged:
        inputs = {name: torch.cat(pixels), f"{kind}_grid_thw": torch.tensor([one.size for one in found])}
        if family.name == "qwen2_5_vl" and kind == "video" and not IMAGES_HAVE_SECONDS:
            inputs["second_per_grid_ts"] = torch.full((len(found),), 1.0)
        return inputs
    if kind == "video":
        return {name: torch.stack(pixels)}
    if family.tiles:
        most = max(len(one) for one in pixels)
        padded = [torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one in pixels]
        return {name: torch.stack(padded), "image_sizes": torch.tensor([one.size for one in found])}
    if family.name == "video_llava" and takes(transformers.VideoLlavaForConditionalGeneration, "pixel_values_images"):
        name = "pixel_values_images"
    return {name: torch.cat(pixels)}


def mixed(family: Family) -> list[list[Part]]:
    """Returns a batch of different samples: one image, two (of other sizes), none, and a video if the family has
    any."""
    parts: list[list[Part]] = [[3, "image", 5], [2, "image1", 3, "image2", 4], [9]]
    if family.video:
        parts += [[4, "video", 3], [2, "image", 2, "video", 4]]
    return parts
