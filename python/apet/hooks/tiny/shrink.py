"""Makes the fields of a configuration small, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from .fields import (
    BACKBONE,
    DEPTH,
    ENCODER,
    END,
    EOS,
    HEAD,
    IMAGE,
    LAYERS,
    MERGES,
    OUTPUT,
    PAD,
    PATCH,
    PINPOINTS,
    PROJECTOR,
    SIDE,
    START,
    TEXT,
    TOKEN,
    VIDEO,
)


def put(settings: dict[str, Any], path: str, value: Any) -> None:
    """Sets the field at a dotted path. If `value` is a function, it is given the old value and returns the new one."""
    *parents, name = path.split(".")
    for parent in parents:
        settings = settings[parent]
    settings[name] = value(settings.get(name)) if callable(value) else value


def shrink(given: Mapping[str, Any], role: str, merges: bool | None = None) -> dict[str, Any]:
    """Returns the fields of a configuration made small. role: "text" for a decoder, "encoder", or "" for one of
    both."""
    if merges is None:
        merges = any(name in MERGES for name in _names(given))
    sizes = {"text": TEXT, "encoder": ENCODER, "": {}}[role]
    depth = next((name for name in DEPTH if isinstance(given.get(name), int)), None)
    layers = _layers(given, given[depth], LAYERS if role == "text" else 3) if depth and role else None
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if layers is not None and name in BACKBONE:  # names of layers, which follow from their number
            continue
        part = isinstance(value, dict) and (str(name).endswith("config") or "model_type" in value)
        if part and name != "per_layer_config":
            inner = "text" if name in ("text_config", "decoder") else "encoder"
            chosen[name] = shrink(value, inner, merges)
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
    """Makes the number of key heads equal to that of query heads, if they were equal: some models require that."""
    if "num_key_value_heads" in given and given["num_key_value_heads"] == given.get("num_attention_heads"):
        return chosen | {"num_key_value_heads": chosen["num_attention_heads"]}
    return chosen


def _names(given: Mapping[str, Any]) -> set[str]:
    return {*given}.union(*(_names(value) for value in given.values() if isinstance(value, dict)))


def _layers(given: Mapping[str, Any], depth: int, wanted: int) -> list[int]:
    """Returns the layers of a stack that stay, in order: each kind of layer, twice if possible."""
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
        if taken >= {*kinds[i + 1 :]}:  # every kind that is still to come was taken: begin again
            taken = set()
        seen = {kinds[c] for c in chosen}
        if len(chosen) >= wanted and seen == every:
            break
    if len(chosen) < min(wanted, depth):  # too few kinds come twice: fill up with the first layers left out
        rest = [i for i in range(depth) if i not in chosen]
        chosen = sorted([*chosen, *rest[: wanted - len(chosen)]])
    return chosen


def _of_layers(name: str, value: Any, depth: int, layers: list[int], sizes: Mapping[str, Any]) -> Any:
    """Returns a field that has one entry for each layer, or lists layers, for those that stay; None for any other
    field."""
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
    """Returns a rotary scheme for small heads."""
    if any(isinstance(v, dict) for v in value.values()):  # there is one scheme for each type of layers
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


def name_tokens(chosen: dict[str, Any]) -> None:
    """Gives special tokens small ids: fixed ones to five names, and 122 downwards to others. Equal ids stay equal."""
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
