"""LLaVA-OneVision in vLLM (`LlavaOnevisionForConditionalGeneration`).

Modifications: those of `compress.Model`; an image is a unit, its tiles put together and scaled by the model, and so is
each frame of a video; newlines stay. Embeddings given instead of an image are not compressed.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_onevision.modeling_llava_onevision import get_anyres_image_grid_shape, unpad_image
from vllm.model_executor.models import llava_onevision
from vllm.multimodal.inputs import MultiModalKwargsItem

from . import processing
from .compress import Model


class Images(processing.Processor):
    """An image or a frame is a unit."""

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        units = torch.full_like(ids, -1)
        config = self.info.get_hf_config()
        side = config.vision_config.image_size // config.vision_config.patch_size
        if modality == "video":  # one newline at its end
            units[:-1] = processing.equal_units(ids[:-1], (len(ids) - 1) // len(item["pixel_values_videos"].data))
        elif "pixel_values" in item:
            units[: side * side] = 0  # the whole image in small
            if len(item["pixel_values"].data) > 1:
                units[side * side :] = rows(config, item["image_sizes"].data.tolist(), side)
        return units


def rows(config: Any, image: list[int], side: int) -> Tensor:
    """Returns the units of the tiles of an image put together: rows of unit 0, each with a newline (-1) at its end."""
    down, across = get_anyres_image_grid_shape(image, config.image_grid_pinpoints, config.vision_config.image_size)
    height, width = unpad_image(torch.empty(1, down * side, across * side), image).shape[1:]
    ratio = math.sqrt(height * width / (9 * side**2))
    if ratio > 1.1:
        height, width = int(height // ratio), int(width // ratio)
    return torch.nn.functional.pad(torch.zeros(height, width, dtype=torch.int64), (0, 1), value=-1).flatten()


@processing.serve(Images)
class LlavaOnevision(Model, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """vLLM's LLaVA-OneVision, with compression between projector and language model."""
