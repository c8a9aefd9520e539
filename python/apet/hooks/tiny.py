"""Tiny random models of the families that have an adapter, for the self-check."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter

PAD, EOS, START, END, VIDEO, IMAGE = 0, 2, 123, 124, 125, 126  # token ids; text uses 3..119
VOCABULARY = 128
LAYERS = 4
SIDE = 48  # pixels a side of a LLaVA-style image or tile
PATCH = 8
TILE = (SIDE // PATCH) ** 2  # 36 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
PROMPTS = ((3, 5), (1, 2))  # of two rows: so many text tokens before the image, and after it
GRID = (1, 8, 8)  # of an image in patches, four of which make a token


def text(**more: Any) -> dict[str, Any]:
    """The arguments of a tiny decoder's configuration."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "pad_token_id": PAD,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
        **more,
    }


def vision(**more: Any) -> dict[str, Any]:
    """The arguments of a tiny vision encoder's configuration."""
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {**size, "image_size": SIDE, "patch_size": PATCH, **more}


def _llava(decoder: str | None, encoder: str = "clip_vision_model", **more: Any) -> dict[str, Any]:
    ids = {"image_token_index": IMAGE, "image_token_id": IMAGE}
    tower = vision(model_type=encoder)
    if encoder == "clip_vision_model":
        tower["projection_dim"] = 32
    return {"vision_config": tower, "text_config": text(model_type=decoder or "llama"), **ids, **more}


def _qwen(name: str) -> dict[str, Any]:
    encoder: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}
    encoder |= {"spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    more: dict[str, Any] = {"rope_scaling": rope}
    if name == "qwen2_vl":
        encoder |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif name == "qwen2_5_vl":
        encoder |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "tokens_per_second": 2}
        encoder |= {"window_size": 16, "fullatt_block_indexes": [1]}
    else:
        encoder |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        encoder |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        more = {"head_dim": 16, "rope_scaling": {**rope, "mrope_interleaved": True}}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return {"vision_config": encoder, "text_config": text(**more), **ids}


def settings(name: str, decoder: str | None = None) -> dict[str, Any] | None:
    """The arguments of a tiny configuration of a family, by its `model_type`; None where there is none here.

    decoder: the `model_type` of the language model, for families that take any.
    """
    video = {"video_token_index": VIDEO, "video_token_id": VIDEO}
    tiles = {"image_grid_pinpoints": PINPOINTS}
    if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl"):
        chosen = _qwen(name)
    elif name == "llava":
        chosen = _llava(decoder)
    elif name == "llava_next":
        chosen = _llava(decoder, **tiles)
    elif name == "llava_next_video":
        chosen = _llava(decoder, **tiles, **video)
    elif name == "video_llava":
        chosen = _llava(decoder, **video)
    elif name == "llava_onevision":
        more = {"vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"}
        more |= {"vision_feature_select_strategy": "full"}
        chosen = _llava(decoder or "qwen2", "siglip_vision_model", **tiles, **video, **more)
    elif name == "internvl":
        encoder = vision(model_type="internvl_vision", image_size=[SIDE, SIDE], patch_size=[4, 4])
        chosen = {"vision_config": encoder, "text_config": text(model_type=decoder or "qwen2"), "image_token_id": IMAGE}
    else:
        return None
    return chosen | {"tie_word_embeddings": False}


def build(cls: type, arguments: Mapping[str, Any], attention: str = "sdpa", seed: int = 0) -> nn.Module:
    """A model of a class of transformers with random weights, the same for the same seed.

    They are wide (standard deviation 0.15), so that a wrong position, mask or token moves the logits by far more than
    rounding does.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = cls._from_config(cls.config_class(**arguments), attn_implementation=attention)
        torch.manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.15)
            elif parameter.ndim == 1:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def inputs(name: str, model: nn.Module, core: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    """What a tiny model is called with: two rows with an image each, of different lengths, padded on the left."""
    make = torch.Generator().manual_seed(0)
    given: dict[str, Tensor]
    if name.startswith("qwen"):
        patches = GRID[0] * GRID[1] * GRID[2]
        given = {"pixel_values": torch.randn(2 * patches, 3 * 2 * 4 * 4, generator=make)}
        given["image_grid_thw"] = torch.tensor([GRID, GRID])
        around, counts = ([START], [END]), [patches // 4] * 2
    elif name in ("llava_next", "llava_next_video", "llava_onevision"):
        given = {"pixel_values": torch.randn(2, 3, 3, SIDE, SIDE, generator=make)}  # base image and two tiles
        given["image_sizes"] = torch.tensor([[40, 90], [40, 90]])
        if name == "llava_onevision":
            given["batch_num_images"] = torch.tensor([1, 1])
        around, counts = ([], []), [len(units) for units in adapter.visuals(core, given, {"image": 0})["image"]]
    else:
        given = {"pixel_values": torch.randn(2, 3, SIDE, SIDE, generator=make)}
        if name == "video_llava" and "pixel_values_images" in inspect.signature(core.forward).parameters:
            given = {"pixel_values_images": given["pixel_values"]}
        around, counts = ([], []), [TILE] * 2
    rows = []
    for (before, after), count in zip(PROMPTS, counts, strict=True):
        words = torch.randint(3, 120, (before + after,), generator=make).tolist()
        rows.append([*words[:before], *around[0], *[IMAGE] * count, *around[1], *words[before:]])
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    given |= {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if "mm_token_type_ids" in inspect.signature(core.forward).parameters:
        given["mm_token_type_ids"] = (ids == IMAGE).int()
    return given
