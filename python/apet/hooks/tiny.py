"""Tiny random models of any image-text class of transformers, made from a configuration by rule, and inputs for them.

The self-check runs them on a user's machine, and so do the tests. A configuration (the user's, or the default one of a
type) is shrunk by the names of its fields: widths, heads, layers, experts, vocabulary. What tells one architecture from
another stays: every kind of decoder layer, the rotary scheme, windows, chunks, deepstack, bidirectional images. Where
the rule cannot know, `SPECIAL` has the fields of a type.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

PAD, EOS, START, END, VIDEO, IMAGE = 0, 2, 123, 124, 125, 126  # token ids; text uses 3..119
VOCABULARY = 128
LAYERS = 4
SIDE = 48  # pixels a side of an image or tile
PATCH = 8
TILE = (SIDE // PATCH) ** 2  # 36 tokens
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
WINDOW = 8  # of sliding and chunked attention: shorter than what is left of a prompt
HEAD = 16
LIMIT = 30_000_000  # parameters; a tiny model has one million or less
LARGE = 1024  # top-k of indexed attention: ties among random scores would tell two right results apart

# The fields of a decoder's configuration, by name. (Those of an encoder that differ follow.)
TEXT: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "intermediate_size_mlp": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "moe_hidden_size": 64,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "share_expert_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "num_sliding_attention_heads": 4,
    "head_dim": HEAD,
    "global_head_dim": HEAD,
    "swa_head_dim": HEAD,
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": HEAD,
    "qk_rope_head_dim": HEAD,
    "qk_head_dim": 2 * HEAD,
    "v_head_dim": HEAD,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": LARGE,
    "index_topk_blocks": LARGE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_num_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "loop_gate_rank": 8,
    "rotary_dim": 8,
    "hc_lowrank": 8,
    "ple_embed_dim": 16,
    "block_multiple_of": 8,
    "num_nextn_predict_layers": 0,
    "query_pre_attn_scalar": HEAD,
    "max_window_layers": LAYERS,
}
ENCODER: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 48,
    "encoder_ffn_dim": 48,
    "mlp_dim": 48,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "encoder_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": HEAD,
    "image_size": SIDE,
    "num_position_embeddings": 144,
    "num_patches": 144,
    "conv_channels": 8,
    "output_channels": 16,
    "downsample_hidden_size": 16,
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "max_source_positions": 64,
}
# Widths of what an encoder or a projector hands on, which are the decoder's.
OUTPUT = ("out_hidden_size", "text_hidden_size", "output_dim", "projector_output_dim", "adapter_out_dim")
PROJECTOR = ("projector_hidden_size", "projection_hidden_size", "projection_dim", "alignment_intermediate_size")
DEPTH = ("num_hidden_layers", "num_layers", "n_layers", "depth", "encoder_layers")
MERGES = ("spatial_merge_size", "downsample_ratio", "downsample_factor", "pixel_shuffle_ratio", "scale_factor")
TOKEN = re.compile(r"(_token_id|_token_index|_patch_id|_(start|end|newline|sep|eod)_id)$")


def config(source: PretrainedConfig | str, decoder: str | None = None) -> PretrainedConfig:
    """A tiny configuration of the same type.

    source: the configuration of a model, or the name of a type for its default one; decoder: the `model_type` of
    another decoder in it, for types that take any.
    """
    default = isinstance(source, str)
    if isinstance(source, str):
        source = transformers.AutoConfig.for_model(source)
    given = source.to_dict()
    if decoder is not None:
        given["text_config"] = transformers.AutoConfig.for_model(decoder).to_dict()
    for path, value in SPECIAL.get(source.model_type, {}).items():
        if path.startswith("+") and default:
            _put(given, path[1:], value)
    chosen = _shrink(given, "text" if "text_config" not in given else "")
    for path, value in SPECIAL.get(source.model_type, {}).items():
        if not path.startswith("+"):
            _put(chosen, path, value)
    _name_tokens(chosen)
    chosen["tie_word_embeddings"] = False
    made = type(source).from_dict(chosen)
    if source.model_type in TOWERS:
        object.__setattr__(made, "vision_config", TOWERS[source.model_type](made))  # past the check of its type
    return made


def _convolutions(made: PretrainedConfig) -> PretrainedConfig:
    """An encoder that gives a picture of features [B, 32, 6, 6], as those of timm do."""
    tower = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", downsample_in_first_stage=False
    )
    for name in ("vocab_offset", "rms_norm_eps"):
        setattr(tower, name, getattr(made.vision_config, name, None))
    tower.hidden_size, tower.vocab_size = 32, VOCABULARY
    return tower


def _tokens(made: PretrainedConfig) -> PretrainedConfig:
    """An encoder that gives tokens [B, 1 + 36, 32], the first of which is of the whole image."""
    tower = transformers.CLIPVisionConfig(**_shrink(transformers.CLIPVisionConfig().to_dict(), "encoder"))
    tower.model_args = {"embed_dim": 32}
    return tower


# Encoders of timm: a check of the hooks of a decoder must not need that package, so others take their place.
TOWERS = {"fast_vlm": _convolutions, "gemma3n": _convolutions, "perception_lm": _tokens}


def _put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Sets the field at a dotted path; a function gives it from what is there."""
    *parents, name = path.split(".")
    for parent in parents:
        settings = settings[parent]
    settings[name] = value(settings.get(name)) if callable(value) else value


def _shrink(given: Mapping[str, Any], role: str, merges: bool | None = None) -> dict[str, Any]:
    """A configuration's fields, smaller. role: "text" for a decoder, "encoder", or "" for what holds both."""
    if merges is None:
        merges = any(name in MERGES for name in _names(given))
    sizes = {"text": TEXT, "encoder": ENCODER, "": {}}[role]
    depth = next((name for name in DEPTH if isinstance(given.get(name), int)), None)
    layers = _layers(given, given[depth], LAYERS if role == "text" else 3) if depth and role else None
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        part = isinstance(value, dict) and (str(name).endswith("config") or "model_type" in value)
        if part and name != "per_layer_config":
            inner = "text" if name in ("text_config", "decoder") else "encoder"
            chosen[name] = _shrink(value, inner, merges)
        elif layers is not None and name == depth:
            chosen[name] = len(layers)
        elif (
            depth is not None
            and layers is not None
            and (found := _of_layers(name, value, given[depth], layers, sizes)) is not None
        ):
            chosen[name] = found
        elif name in ("rope_parameters", "rope_scaling") and isinstance(value, dict):
            chosen[name] = _rope(value, role)
        elif isinstance(value, bool) or value is None or value == 0:
            chosen[name] = value
        elif name in OUTPUT or name in PROJECTOR:
            chosen[name] = 64
        elif name == "patch_size" and isinstance(value, int | list):
            patch = PATCH // 2 if merges else PATCH
            chosen[name] = [patch] * len(value) if isinstance(value, list) else patch
        elif name == "image_size" and isinstance(value, list) and role == "encoder":
            chosen[name] = [SIDE] * len(value)
        elif name == "image_grid_pinpoints":
            chosen[name] = PINPOINTS
        elif name == "vision_feature_layer":
            many = value if isinstance(value, list) else [value]
            near = [max(-2, v) if v < 0 else min(v, 1) for v in many]
            chosen[name] = near if isinstance(value, list) else near[0]
        elif name in sizes and isinstance(value, int):
            chosen[name] = sizes[name]
        elif name in sizes and isinstance(value, list):
            chosen[name] = [sizes[name]] * len(value)
        else:
            chosen[name] = value
    several_axes = re.search(r"vl|glm4v|omni", str(given.get("model_type")))
    if role == "text" and "rope_parameters" not in given and given.get("rope_scaling", 0) is None and several_axes:
        chosen["rope_scaling"] = _rope({"type": "default", "rope_type": "default", "mrope_interleaved": True}, role)
    chosen = _equal_heads(given, chosen)
    for name in ("dtype", "torch_dtype", "quantization_config"):
        chosen.pop(name, None)
    return chosen


def _equal_heads(given: Mapping[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """As many heads of keys as of queries where there were: some take nothing else."""
    if "num_key_value_heads" in given and given["num_key_value_heads"] == given.get("num_attention_heads"):
        return chosen | {"num_key_value_heads": chosen["num_attention_heads"]}
    return chosen


def _names(given: Mapping[str, Any]) -> set[str]:
    return {*given}.union(*(_names(value) for value in given.values() if isinstance(value, dict)))


def _layers(given: Mapping[str, Any], depth: int, wanted: int) -> list[int]:
    """Which layers of a stack stay: each kind that there is, if possible twice, in order."""
    kinds: list[tuple[Any, ...]] = [()] * depth
    for name, value in sorted(given.items()):
        if isinstance(value, list) and _indexes(name):
            kinds = [(*kind, i in value) for i, kind in enumerate(kinds)]
        elif isinstance(value, list) and len(value) == depth and name != "kv_source_layers":
            kinds = [(*kind, repr(v)) for kind, v in zip(kinds, value, strict=True)]
        elif name == "per_layer_config" and isinstance(value, dict):
            kinds = [(*kind, repr(_of_layer(value, i))) for i, kind in enumerate(kinds)]
        elif name == "first_k_dense_replace" and isinstance(value, int):
            kinds = [(*kind, i < value) for i, kind in enumerate(kinds)]
        elif name == "num_kv_shared_layers" and isinstance(value, int):
            kinds = [(*kind, i >= depth - value) for i, kind in enumerate(kinds)]
    every = {*kinds}
    chosen: list[int] = []
    taken: set[tuple[Any, ...]] = set()
    for i, kind in enumerate(kinds):
        if kind not in taken:
            chosen.append(i)
            taken.add(kind)
        if taken >= {*kinds[i + 1 :]}:  # a round is over
            taken = set()
        seen = {kinds[c] for c in chosen}
        if len(chosen) >= wanted and seen == every:
            break
    if len(chosen) < min(wanted, depth):  # few of the kinds come twice
        rest = [i for i in range(depth) if i not in chosen]
        chosen = sorted([*chosen, *rest[: wanted - len(chosen)]])
    return chosen


def _of_layers(name: str, value: Any, depth: int, layers: list[int], sizes: Mapping[str, Any]) -> Any:
    """A field that speaks of layers, for those that stay; None for any other field."""
    if isinstance(value, list) and _indexes(name):
        return [layers.index(i) for i in value if i in layers]
    if isinstance(value, list) and name == "kv_source_layers":
        return [max(new for new, old in enumerate(layers) if old <= value[i]) for i in layers]
    if isinstance(value, list) and len(value) == depth:
        return [sizes[name] if name in sizes else value[i] for i in layers]
    if name == "per_layer_config" and isinstance(value, dict):
        return {
            str(new): _equal_heads(found, {n: sizes.get(n, v) for n, v in found.items()})
            for new, old in enumerate(layers)
            if (found := _of_layer(value, old))
        }
    if name == "first_k_dense_replace" and isinstance(value, int):
        return sum(i < value for i in layers)
    if name == "num_kv_shared_layers" and isinstance(value, int):
        return sum(i >= depth - value for i in layers)
    return None


def _indexes(name: str) -> bool:
    return name in ("moe_layers", "ple_layer_ids", "full_attn_idxs", "rope_scaling_layers", "mlp_only_layers") or (
        name.endswith("indexes")
    )


def _of_layer(value: Mapping[Any, Any], index: int) -> Any:
    return next((v for k, v in value.items() if int(k) == index), None)


def _rope(value: dict[str, Any], role: str) -> dict[str, Any]:
    """A rotary scheme for small heads."""
    if any(isinstance(v, dict) for v in value.values()):  # one for each type of layers
        return {k: _rope(v, role) if isinstance(v, dict) else v for k, v in value.items()}
    chosen = dict(value)
    if role == "text" and chosen:
        if "partial_rotary_factor" in chosen:
            chosen["partial_rotary_factor"] = max(0.5, chosen["partial_rotary_factor"])
        half = int(HEAD * chosen.get("partial_rotary_factor", 1.0)) // 2
        sections = [half // 4, half // 4 + half // 8, half - half // 4 - half // 4 - half // 8]
        if len(chosen.get("mrope_section", [])) == 4:
            sections = [half // 4] * 4
        chosen["mrope_section"] = sections
        for name in ("short_factor", "long_factor"):
            if name in chosen:
                chosen[name] = chosen[name][:half]
    if "original_max_position_embeddings" in chosen:
        chosen["original_max_position_embeddings"] = 512
    return chosen


def _name_tokens(chosen: dict[str, Any]) -> None:
    """Gives special tokens small ids, equal ones where they were equal: the five named, and others from 122 down."""
    names: dict[int, int] = {}
    others = iter(range(START - 1, 98, -1))

    def walk(part: dict[str, Any]) -> None:
        ordered = sorted(part.items(), key=lambda item: not str(item[0]).startswith(("image_token", "image_patch_id")))
        for name, value in ordered:
            if isinstance(value, dict):
                walk(value)
            elif not isinstance(name, str):
                continue
            elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                part[name] = {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": EOS}[name]
            elif TOKEN.search(name) and isinstance(value, int) and not isinstance(value, bool):
                if name.startswith(("vision_start", "vision_end")):
                    names[value] = START if name.startswith("vision_start") else END
                elif name in ("image_token_id", "image_token_index", "image_patch_id"):
                    names[value] = IMAGE
                elif name in ("video_token_id", "video_token_index"):
                    names.setdefault(value, VIDEO)
                part[name] = names[value] if value in names else names.setdefault(value, next(others))
            elif name.endswith("token_ids") and isinstance(value, list):
                part[name] = [names[v] if v in names else names.setdefault(v, next(others)) for v in value]

    walk(chosen)


# What the rule cannot know, by type: fields by dotted path; "+" is for default configurations, before the rule. Most
# repeat what a width follows from, or what the default configuration leaves open and every checkpoint says.
_ALTERNATING = ["sliding_attention", "full_attention"]
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_SQUARE = {"vision_config.patch_size": 4}  # 12 x 12 patches, of which four make a token
_STARTS = {"vision_start_token_id": START, "vision_end_token_id": END}
_OMNI = _STARTS | {"audio_start_token_id": 110, "audio_end_token_id": 111, "audio_token_id": 112}
_SAM = {"vision_config.sam_config.downsample_channels": [16, 32], "vision_config.sam_config.window_size": 4}
_GEMMA = _SQUARE | {"mm_tokens_per_image": 36}
_GEMMA4 = {"+vision_config": lambda _: transformers.AutoConfig.for_model("gemma4_vision").to_dict()}
_MINICPM = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_GOT = {"vision_config.image_size": 96, "vision_config.patch_size": 4}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {36: 24}, "max_value_projector_patch_to_query_dict": 24},
    "chameleon": {"vocabulary_map": {"<image>": IMAGE, "IMGIMGA": 99}},
    "cohere_compass": {
        "+text_config.layer_types": _ALTERNATING * 20,
        "+text_config.rope_parameters": dict.fromkeys(_ALTERNATING, _ROPE),
    },
    "deepseek_ocr2": _SAM
    | {
        "text_config.mlp_layer_types": ["dense", "sparse", "dense", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.n_group": 1,
        "text_config.topk_group": 1,
    },
    "emu3": {"vocabulary_map": {"<image>": IMAGE, "<|extra_200|>": 98, "<|visual token 000000|>": 99}},
    "diffusion_gemma": _GEMMA4
    | {"text_config.num_experts": 4, "text_config.top_k_experts": 2, "text_config.moe_intermediate_size": 32},
    "dots3_note": {"text_config.head_dim": 2 * HEAD},
    "ernie4_5_vl_moe": {"text_config.rope_parameters.mrope_section": [3, 3, 2]},
    "gemma3": _GEMMA,
    "shieldgemma2": _GEMMA,
    "gemma4": _GEMMA4,
    "gemma4_unified": {
        "+vision_config": lambda _: transformers.AutoConfig.for_model("gemma4_unified_vision").to_dict(),
        "vision_config.mm_embed_dim": 32,
        "vision_config.output_proj_dims": 32,
        "vision_config.mm_posemb_size": 16,
    },
    "glm5_next": {"+text_config.mlp_layer_types": ["dense"] * 2 + ["sparse"] * 43},
    "got_ocr2": _GOT,
    "pp_chart2table": _GOT,
    "gemma3n": {
        "vision_soft_tokens_per_image": 36,
        "vision_config.vocab_offset": 200,
        "audio_config.vocab_offset": 300,
    },
    "perception_lm": {"vision_use_cls_token": True, "projector_pooling_ratio": 1},
    "granite4_vision": {
        "downsample_rate": "4/8",
        "deepstack_layer_map": [[-2, 0], [-1, 1]],
        "spatial_target_layers": [1, 2, 3, 3],
        "vision_config.patch_size": 6,
        "vision_config.hidden_size": 64,  # 64 to a head
        "qformer_config.hidden_size": 64,
        "qformer_config.encoder_hidden_size": 64,
    },
    "hunyuan_vl": {
        "text_config.head_dim": HEAD,
        "text_config.rope_parameters.mrope_section": [2, 2, 2, 2],
        "vision_config.max_image_size": SIDE,
        "vision_config.min_image_size": 8,
    },
    "janus": {"vq_config.base_channels": 32, "vq_config.channel_multiplier": [1], "vq_config.num_res_blocks": 1},
    "kimi_k25": {"projection_hidden_size": 32},
    "lfm2_vl": {"+text_config.layer_types": ["conv", "full_attention"] * 16},
    "llama4": {
        "vision_config.projector_input_dim": 64,
        "vision_config.vision_output_dim": 64,
        "vision_config.intermediate_size": 128,
    },
    "minicpm_ocr": _MINICPM,
    "minicpmv4_6": _MINICPM,
    "minicpmv4_7": _MINICPM,
    "muse_glimmer": {"out_hidden_size": 128},
    "muse_spark": {
        "out_hidden_size": 128,
        "audio_config.hidden_sizes": [8, 8, 8, 16],
        "audio_config.depths": [1, 1, 1, 1],
    },
    "nemotron_h_omni": {
        "text_config.layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention", "mlp"],
        "text_config.num_hidden_layers": 5,
        "vision_config.max_img_size": 96,
        "vision_hidden_size": 32,
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
    },
    "ovis2": {"vocab_size": VOCABULARY, "hidden_size": 64, "vision_config.image_size": SIDE},
    "qwen2_vl": {"vision_config.hidden_size": 64, "vision_config.mlp_ratio": 2},
    "qwen2_5_omni_thinker": _OMNI,
    "qwen2_5_vl": {"vision_config.window_size": 16, "vision_config.tokens_per_second": 2},
    "qwen3_omni_moe_thinker": _OMNI,
    "qwen4_exp": {
        "text_config.indexer_n_heads": 2,
        "text_config.indexer_kv_heads": 1,
        "text_config.indexer_head_dim": HEAD,
        "text_config.indexer_budget": LARGE,
        "text_config.indexer_compress_ratio": 4,
    },
    "step3p7": {"text_config.sliding_window": WINDOW},
    "unlimited_ocr": _SAM,
}


def build(cls: Any, settings: PretrainedConfig, attention: str | None = None, seed: int = 0) -> nn.Module:
    """A model of a class of transformers with random weights, the same for the same seed.

    They are wide (standard deviation 0.15), so that a wrong position, mask or token moves the logits by far more than
    rounding does. attention: None for sdpa, or eager where a part of the model has no sdpa.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = None
        for each in ["sdpa", "eager"] if attention is None else [attention]:
            chosen: Any = each
            if settings.model_type in TOWERS:  # convolutions take "eager" only
                chosen = {"": each, "text_config": each, "audio_config": each, "vision_config": "eager"}
            try:
                with torch.device("meta"):  # no memory is allocated for it
                    size = sum(p.numel() for p in cls._from_config(settings, attn_implementation=chosen).parameters())
                if size > LIMIT:
                    raise MemoryError(f"a tiny {cls.__name__} has {size / 1e6:.0f} million parameters")
                model = cls._from_config(settings, attn_implementation=chosen)
                break
            except ValueError as error:
                if each != "sdpa" or attention is not None or "attention implementation" not in str(error):
                    raise
        torch.manual_seed(seed)
        for _, parameter in sorted(model.named_parameters()):
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.15)
            elif parameter.ndim == 1:
                parameter.data.add_(0.05 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.eval()
    return model


# ---- inputs ---------------------------------------------------------------------------------------------------------

GRID = (1, 8, 12)  # of an image in patches, four of which make a token
VIDEO_GRID = (2, 8, 8)
FRAMES = 4


def core_of(model: nn.Module) -> nn.Module:
    """The module that puts image features among text embeddings."""
    return model.base_model


def sample(model: nn.Module, parts: Sequence[int | str], seed: int = 0) -> dict[str, Any]:
    """The inputs of one prompt, not padded: a number is that many text tokens, "image" and "video" are those.

    Raises ValueError where the type's images or videos are not known here.
    """
    make = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []  # of each token: text 0, image 1, video 2
    pixels: list[dict[str, Any]] = []
    images = parts.count("image")
    for part in parts:
        if isinstance(part, int):
            new, kinds = _words(part, make), [0] * part
        else:
            given, rows = _visual(model, part, make, alone=images == 1)
            pixels.append(given)
            new, kinds = _placeholders(model, part, given, rows, make)
        ids += new
        types += kinds
    takes = inspect.signature(core_of(model).forward).parameters
    row: dict[str, Any] = {}
    for name in {n: 0 for given in pixels for n in given}:
        row[name] = _joined(name, [given[name] for given in pixels if name in given], pixels[0])
    if "batch_num_images" in takes and images:
        row["batch_num_images"] = torch.tensor([images])
    row |= {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    if "mm_token_type_ids" in takes:
        row["mm_token_type_ids"] = torch.tensor([types], dtype=torch.int)
    if "moe_mm_token_type_ids" in takes:
        row["moe_mm_token_type_ids"] = (torch.tensor([types]) > 0).int()
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        prefix = model.config.model_type == "paligemma"  # whose types tell the prompt from what follows
        row["token_type_ids"] = ((torch.tensor([types]) > 0) & (not prefix)).int()
    return row


def _words(count: int, make: torch.Generator) -> list[int]:
    return torch.randint(3, 99, (count,), generator=make).tolist()


def token(config: PretrainedConfig, name: str) -> int | None:
    """The id of a special token, by what its field begins with."""
    names = (f"{name}_token_id", f"{name}_token_index", f"{name}_patch_id")
    return next((found for n in names if (found := getattr(config, n, None)) is not None), None)


def _placeholders(
    model: nn.Module, modality: str, given: Mapping[str, Any], rows: int, make: torch.Generator
) -> tuple[list[int], list[int]]:
    """The token ids that stand for an image or video of so many rows, and their types."""
    config = core_of(model).config
    name = config.model_type
    kind = 1 + (modality == "video")
    seen_as = "image" if AS_IMAGES.match(name) else modality
    start, end = (
        next(([found] for n in ("vision", seen_as) if (found := token(config, f"{n}_{e}")) is not None), [])
        for e in ("start", "end")
    )

    def needed(what: str) -> int:
        found = token(config, what)
        if found is None:
            raise ValueError(f"{type(config).__name__} has no {what}_token_id")
        return found

    frames = 1
    if modality == "video" and STAMPED.match(name):
        frames = int(given["video_grid_thw"][0, 0])
    ids: list[int] = []
    types: list[int] = []
    for _ in range(frames):
        before = [*(_words(2, make) if frames > 1 else []), *start]
        ids += [*before, *[needed(seen_as)] * (rows // frames), *end]
        types += [*[0] * len(before), *[kind] * (rows // frames), *[0] * len(end)]
    if modality == "video" and name.startswith("glm"):
        ids = [needed("video_start"), *ids, needed("video_end")]
        types = [0, *types, 0]
    return ids, types


# A video's frames stand apart, each behind its time.
STAMPED = re.compile(r"qwen3_vl|qwen3_5|qwen4_exp|cosmos3|cohere_compass|glm")
# Placeholders of images stand for those of videos, too.
AS_IMAGES = re.compile(r"glm|nemotron_h_omni")


def _visual(model: nn.Module, modality: str, make: torch.Generator, *, alone: bool) -> tuple[dict[str, Any], int]:
    """The pixels of an image or video as the type's processor gives them, and how many tokens they become.

    alone: the only image of its prompt (some cut only those into tiles).
    """
    core = core_of(model)
    names = {"image": ["get_image_features"], "video": ["get_video_features", "get_image_features"]}[modality]
    features = next((f for n in names for m in (core, model) if (f := getattr(m, n, None)) is not None), None)
    if features is None:
        raise ValueError(f"{type(core).__name__} has no {names[0]}")
    parameters = inspect.signature(features).parameters
    takes = {*inspect.signature(core.forward).parameters, *parameters}
    several = "batch_num_images" in parameters and modality == "image" and not alone
    errors = []
    for shapes in _forms(core.config, modality, takes, alone):
        given = {n: torch.randn(v, generator=make) if isinstance(v, tuple) else v for n, v in shapes.items()}
        named = {n: v for n, v in given.items() if n in parameters}
        if not named and "pixel_values_videos" in given:
            named = {"pixel_values": given["pixel_values_videos"]}
        if several:
            named = {n: torch.cat([v, v]) for n, v in named.items()} | {"batch_num_images": torch.tensor([2])}
        try:
            with torch.no_grad():
                found = features(**named)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            continue
        return given, _count(found) // (2 if several else 1)
    raise ValueError(f"apet does not know the {modality}s of {type(core).__name__}: {'; '.join(errors)[:1000]}")


def _count(found: Any) -> int:
    pooled = getattr(found, "pooler_output", None)
    if pooled is not None:
        found = pooled
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if isinstance(found, tuple) and isinstance(found[0], list | tuple):  # features of later layers beside them
        found = found[0]
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    return sum(_count(one) for one in found)


def _forms(config: PretrainedConfig, modality: str, takes: set[str], alone: bool) -> list[dict[str, Any]]:
    """How a processor may give an image or video: shapes of random pixels (tuples), and what else goes with them."""
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


def _joined(name: str, values: Sequence[Any], beside: Mapping[str, Any]) -> Any:
    """The images of a prompt, or of a batch, as one argument."""
    if isinstance(values[0], list):
        return [one for value in values for one in value]
    if name.endswith("_token_pooling"):  # rows of all the patches of the call
        before = [0, *torch.tensor([int(value.max()) + 1 for value in values]).cumsum(0).tolist()]
        values = [value + start for value, start in zip(values, before, strict=False)]
    packed = name.startswith("pixel_values") and ("target_sizes" in beside or "target_sizes_videos" in beside)
    return torch.cat(list(values), dim=-1 if packed else 0)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several samples as one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name in {n: 0 for row in rows for n in row}:
        values = [row[name] for row in rows if name in row]
        if name in ALONG:
            values = [nn.functional.pad(v, (width - v.shape[1], 0), value=PAD) for v in values]
        batch[name] = _joined(name, values, rows[0])
    return batch


ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
