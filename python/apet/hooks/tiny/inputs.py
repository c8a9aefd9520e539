"""Makes inputs of tiny models: prompts of random words, images and videos, in the form that processors give."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from .fields import PAD
from .forms import forms


def core_of(model: nn.Module) -> nn.Module:
    """Returns the module that puts image features among text embeddings."""
    return model.base_model


def sample(model: nn.Module, parts: Sequence[int | str], seed: int = 0) -> dict[str, Any]:
    """Returns the inputs of one prompt without padding. A part is a number of text tokens, "image" or "video".

    Raises ValueError if the pixels of this type of model are not known here.
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
        prefix = model.config.model_type == "paligemma"  # its types distinguish the prompt from the answer
        row["token_type_ids"] = ((torch.tensor([types]) > 0) & (not prefix)).int()
    return row


def _words(count: int, make: torch.Generator) -> list[int]:
    return torch.randint(3, 99, (count,), generator=make).tolist()


def token(config: PretrainedConfig, name: str) -> int | None:
    """Returns the id of a special token, by the beginning of its field's name."""
    names = (f"{name}_token_id", f"{name}_token_index", f"{name}_patch_id", f"{name}_id")
    return next((found for n in names if (found := getattr(config, n, None)) is not None), None)


def _placeholders(
    model: nn.Module, modality: str, given: Mapping[str, Any], rows: int, make: torch.Generator
) -> tuple[list[int], list[int]]:
    """Returns the token ids that stand for an image or video of `rows` tokens, and their types."""
    config = core_of(model).config
    name = config.model_type
    kind = 1 + (modality == "video")
    seen_as = "image" if AS_IMAGES.match(name) else modality
    framed, stamped = (modality == "video" and bool(models.match(name)) for models in (FRAMED, STAMPED))
    marks = ("vision", "image" if framed else seen_as)
    start, end = (
        next(([found] for n in marks if (found := token(config, f"{n}_{e}")) is not None), []) for e in ("start", "end")
    )

    def needed(what: str) -> int:
        found = token(config, what)
        if found is None:
            raise ValueError(f"{type(config).__name__} has no {what}_token_id")
        if found < 0:
            raise ValueError(f"{type(config).__name__} has {what}_token_id={found}, which is not the id of a token")
        return found

    frames = int(given["video_grid_thw"][0, 0]) if stamped else len(given["target_sizes_videos"]) if framed else 1
    ids: list[int] = []
    types: list[int] = []
    for _ in range(frames):
        before = [*(_words(2, make) if stamped and frames > 1 else []), *start]
        ids += [*before, *[needed(seen_as)] * (rows // frames), *end]
        types += [*[0] * len(before), *[kind] * (rows // frames), *[0] * len(end)]
    if modality == "video" and name.startswith("glm"):
        ids = [needed("video_start"), *ids, needed("video_end")]
        types = [0, *types, 0]
    return ids, types


# Models in which the frames of a video stand apart, each after its time stamp.
STAMPED = re.compile(r"qwen3_vl|qwen3_5|qwen4_exp|cosmos3|cohere_compass|glm")
# Models in which each frame of a video is marked as an image is.
FRAMED = re.compile(r"minicpmv4_7")
# Models in which the placeholders of images also stand for videos.
AS_IMAGES = re.compile(r"glm|nemotron_h_omni")


def _visual(model: nn.Module, modality: str, make: torch.Generator, *, alone: bool) -> tuple[dict[str, Any], int]:
    """Returns the pixels of an image or video as the processor gives them, and the number of its tokens.

    alone: it is the only image of its prompt (some models cut only such images into tiles).
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
    for shapes in forms(core.config, modality, takes, alone):
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
    why = "; ".join(errors)[:1000] or f"{features.__name__} takes ({', '.join(parameters)})"
    raise ValueError(f"the {modality}s of {type(core).__name__} are not supported: {why}")


def _count(found: Any) -> int:
    pooled = getattr(found, "pooler_output", None)
    if pooled is not None:
        found = pooled
    elif by_layer := getattr(found, "deepstack_features", None):  # pairs of a layer and its features
        found = by_layer[0][1]
    elif hasattr(found, "last_hidden_state"):
        found = found.last_hidden_state
    if isinstance(found, tuple) and isinstance(found[0], list | tuple):  # features of later layers follow
        found = found[0]
    if isinstance(found, Tensor):
        return found.numel() // found.shape[-1]
    return sum(_count(one) for one in found)


def _joined(name: str, values: Sequence[Any], beside: Mapping[str, Any]) -> Any:
    """Joins the images of a prompt, or of a batch, into one argument."""
    if isinstance(values[0], list):
        return [one for value in values for one in value]
    if name.endswith("_token_pooling"):  # rows of all the patches of the call
        before = [0, *torch.tensor([int(value.max()) + 1 for value in values]).cumsum(0).tolist()]
        values = [value + start for value, start in zip(values, before, strict=False)]
    packed = name.startswith("pixel_values") and ("target_sizes" in beside or "target_sizes_videos" in beside)
    return torch.cat(list(values), dim=-1 if packed else 0)


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins several samples into one batch, padded on the left."""
    width = max(row["input_ids"].shape[1] for row in rows)
    batch: dict[str, Any] = {}
    for name in {n: 0 for row in rows for n in row}:
        values = [row[name] for row in rows if name in row]
        if name in ALONG:
            values = [nn.functional.pad(v, (width - v.shape[1], 0), value=PAD) for v in values]
        batch[name] = _joined(name, values, rows[0])
    return batch


ALONG = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids")
