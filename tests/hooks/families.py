"""One tiny random model per family: real architectures of transformers, no network, 16 to 64 visual tokens an image.

Weights are wide (standard deviation 0.15), so that a wrong position, mask or token moves the logits by far more than
rounding does; `test_families.py` measures that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

V5 = int(transformers.__version__.split(".")[0]) >= 5
PAD, EOS, START, END, VIDEO, IMAGE = 0, 2, 123, 124, 125, 126  # token ids; text uses 3..119
UNSAID = [EOS, START, END, VIDEO, IMAGE]  # what tiny models are kept from generating
VOCABULARY = 128
LAYERS = 4
SIDE = 48  # pixels a side of a LLaVA-style image or tile
PATCH = 8
TILE = (SIDE // PATCH) ** 2  # 36 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@dataclass(frozen=True)
class Family:
    """How the models of one `model_type` take their images.

    Attributes:
        name: the `model_type`.
        model: name of the class in transformers, or of the one in `postcard.py`.
        tiles: images come as several tiles with `image_sizes`.
        ragged: images come as packed patches with grids, positions are M-RoPE.
        video: videos have placeholders of their own.
        parts: the names of the core model, and of the language model in it.
        projector: the name of the module in the core model before which the first stage is, if there is such.
    """

    name: str
    model: str
    tiles: bool = False
    ragged: bool = False
    video: bool = True
    parts: tuple[str, str] = ("model", "language_model")
    projector: str | None = None

    def __str__(self) -> str:
        return self.name


PROJECTOR = "multi_modal_projector"
FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration", video=False, projector=PROJECTOR),
        Family("llava_next", "LlavaNextForConditionalGeneration", tiles=True, video=False, projector=PROJECTOR),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", ragged=True),
        Family("video_llava", "VideoLlavaForConditionalGeneration"),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", ragged=True),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", ragged=True),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", tiles=True),
        Family("llava_next_video", "LlavaNextVideoForConditionalGeneration", tiles=True),
        Family("internvl", "InternVLForConditionalGeneration", video=False),
    )
}

# No adapter of the package knows these.
OTHERS = {
    "aya_vision": Family("aya_vision", "AyaVisionForConditionalGeneration", video=False),
    "gemma3": Family("gemma3", "Gemma3ForConditionalGeneration", video=False),
    "postcard": Family("postcard", "PostcardForGeneration", video=False, parts=("album", "reader")),
}


def core(model: PreTrainedModel) -> nn.Module:
    """The module that puts image features among text embeddings."""
    return getattr(model, family_of(model).parts[0])


def reader(model: PreTrainedModel) -> nn.Module:
    """The language model."""
    return getattr(core(model), family_of(model).parts[1])


def family_of(model: PreTrainedModel) -> Family:
    return (FAMILIES | OTHERS)[model.config.model_type]


def reads_positions_as_packed(family: Family) -> bool:
    """Qwen3-VL of transformers 4 takes the temporal M-RoPE row for text positions: without a mask, images are torn from
    their text, patched or not."""
    return family.name == "qwen3_vl" and not V5


def _text(**more: object) -> dict:
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


def _vision(**more: object) -> dict:
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return {**size, "image_size": SIDE, "patch_size": PATCH, **more}


def _llava(name: str, text: str = "llama", vision: str = "clip_vision_model", **more: object) -> dict:
    ids = {"image_token_index": IMAGE, "image_token_id": IMAGE}
    if FAMILIES[name].video:
        ids |= {"video_token_index": VIDEO, "video_token_id": VIDEO}
    tower = _vision(model_type=vision)
    if vision == "clip_vision_model":
        tower["projection_dim"] = 32
    return {"vision_config": tower, "text_config": _text(model_type=text), "tie_word_embeddings": False, **ids, **more}


def _qwen(name: str) -> dict:
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    rope = {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]}
    text = {"rope_scaling": rope}
    if name == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2}
    elif name == "qwen2_5_vl":
        vision |= {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64, "tokens_per_second": 2}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1]}
    else:
        vision |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 64}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
        text = {"head_dim": 16, "rope_scaling": {**rope, "mrope_interleaved": True}}
    ids = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    return {"vision_config": vision, "text_config": _text(**text), "tie_word_embeddings": False, **ids}


def _other(name: str) -> dict:
    ids = {"image_token_index": IMAGE, "image_token_id": IMAGE, "tie_word_embeddings": False}
    if name == "postcard":
        return {"text_config": _text(), **ids}
    vision = _vision(model_type="siglip_vision_model", patch_size=4)
    if name == "aya_vision":  # two of its layers see the last 16 tokens only
        text = _text(model_type="cohere2", sliding_window=16, logit_scale=1.0)
        text["layer_types"] = ["sliding_attention", "full_attention"] * 2
        return {"vision_config": vision, "text_config": text, **ids}
    text = _text(model_type="gemma3_text", head_dim=16, sliding_window=16)
    text["layer_types"] = ["sliding_attention", "full_attention"] * 2
    return {"vision_config": vision, "text_config": text, "mm_tokens_per_image": 36, **ids}


def settings(name: str) -> dict:
    """The arguments of a tiny configuration of that family."""
    if name in OTHERS:
        return _other(name)
    if FAMILIES[name].ragged:
        return _qwen(name)
    if name == "llava":
        return _llava(name)
    if name == "llava_next":
        return _llava(name, image_grid_pinpoints=PINPOINTS)
    if name == "video_llava":
        return _llava(name)
    if name == "llava_onevision":
        more = {"image_grid_pinpoints": PINPOINTS, "vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_9"}
        return _llava(name, "qwen2", "siglip_vision_model", vision_feature_select_strategy="full", **more)
    if name == "llava_next_video":
        return _llava(name, image_grid_pinpoints=PINPOINTS)
    vision = _vision(model_type="internvl_vision", image_size=[SIDE, SIDE], patch_size=[4, 4])
    text = _text(model_type="qwen2")
    return {"vision_config": vision, "text_config": text, "image_token_id": IMAGE, "tie_word_embeddings": False}


def build(
    name: str,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    layers: int = LAYERS,
) -> PreTrainedModel:
    """A fresh model; the same weights for the same seed, whatever the attention and up to rounding the dtype."""
    if name == "postcard":
        from postcard import PostcardForGeneration as cls
    else:
        cls = getattr(transformers, (FAMILIES | OTHERS)[name].model)
    chosen = settings(name)
    chosen["text_config"]["num_hidden_layers"] = layers
    torch.manual_seed(seed)
    model = cls._from_config(cls.config_class(**chosen), attn_implementation=attention)
    torch.manual_seed(seed)
    for _, parameter in sorted(model.named_parameters()):
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=0.15)
        elif parameter.ndim == 1:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def hooks_of(model: PreTrainedModel, package: str) -> list[str]:
    """The modules of a model that carry a hook of that package. (transformers installs some of its own.)"""
    found = []
    for name, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            while isinstance(hook, functools.partial):
                hook = hook.func
            if (hook.__module__ or "").split(".")[0] == package:
                found.append(name)
    return found


built: dict[tuple, PreTrainedModel] = {}


def shared(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model that tests share. Patch it inside `with apet.patched(...)` only; `conftest.py` checks that."""
    key = (name, attention, dtype)
    if key not in built:
        built[key] = build(*key)
    return built[key]


@functools.cache
def twin(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same weights once more, in a model that is never patched: for the recompute."""
    return build(name, dtype=dtype)
