"""In SGLang's tokenizer process: shortens the prompt's placeholders, and attaches plans to the items that lose tokens.

How many rows stay is known before the encoder runs, which ones is not. So placeholders are removed from the end of each
unit; `model` corrects the positions (M-RoPE) of the others when it knows which rows they stand for.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..engines import options, plan

POSITIONS = "apet_positions"  # an item's data: the positions [3, N] of all its tokens
GRID = "video_grid_thw"  # an item's data: the grid of each video, [videos, 3]
IMAGES = "image_grid_thw"  # an item's data: the grid of each image, [images, 3]
CONFIG = "apet"  # the key of `--mm-process-config` that holds options of the start-up
MODELS = {
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
}

# Of these videos, too. The others place them by times, about which SGLang and transformers did not agree.
VIDEOS = {"Qwen2VLForConditionalGeneration"}


def serve(processor: Any, hf_config: Any, *_: Any, **__: Any) -> Any:
    """Lets a processor of SGLang, for a model with this configuration, shorten the prompts that it makes."""
    from sglang.srt.runtime_context import get_disagg, get_mm, get_parallel

    at_start = of_start(get_mm().mm_process_config or {})
    reason = unsupported(hf_config.architectures, get_parallel().pp_size, get_disagg().language_only)
    if options.of(at_start) is not None and reason:
        raise ValueError(reason)
    process = processor.process_mm_data_async
    processor.process_mm_data_async = functools.partial(_process, process, at_start, reason, hf_config)
    return processor


def unsupported(architectures: list[str], stages: int, language_only: bool) -> str | None:
    """Returns why a server with this model cannot compress; None: it can."""
    if MODELS.isdisjoint(architectures):
        return f"ApET does not support {architectures[0]} in SGLang; it supports {', '.join(sorted(MODELS))}"
    if stages > 1:
        return f"apet_keep: with pp_size={stages} later stages get no M-RoPE positions"
    if language_only:
        return "apet_keep: with language_only another process encodes the images, and nothing compresses them"
    return None


def of_start(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the plugin's options in `--mm-process-config`.

    Raises: ValueError for options where SGLang or the plugin would not look for them.
    """
    at_start = config.get(CONFIG, {})
    if not isinstance(at_start, dict):
        raise ValueError(f'--mm-process-config has {CONFIG}={at_start!r}: must be options, such as {{"apet_keep": 64}}')
    if other := [name for name in at_start if not name.startswith(options.PREFIX)]:
        raise ValueError(f"{CONFIG}={at_start}: {other[0]} does not begin with {options.PREFIX}")
    elsewhere = {name: value for name, value in config.items() if name != CONFIG}
    scopes = [elsewhere, *(value for value in elsewhere.values() if isinstance(value, dict))]
    if found := [name for scope in scopes for name in scope if str(name).startswith(options.PREFIX)]:
        raise ValueError(f'--mm-process-config has {found[0]} outside of "{CONFIG}": put it there')
    return at_start


def of_request(given: dict[str, Any]) -> dict[str, Any]:
    """Returns `mm_processor_kwargs` of a request. Raises: ValueError for the key that only the start-up has."""
    if CONFIG in given:
        raise ValueError(f"{CONFIG}={given[CONFIG]}: a request has its options directly in mm_processor_kwargs")
    return given


async def _process(
    process: Callable[..., Awaitable[Any]],
    at_start: dict[str, Any],
    reason: str | None,
    hf_config: Any,
    *args: Any,
    request_obj: Any,
    **kwargs: Any,
) -> Any:
    """Processes a request, with the options of the start-up and its own, which override them.

    reason: why this server cannot compress, if it cannot. Raises: ValueError for invalid options, and for options that
        cannot be followed.
    """
    wanted = options.of({**at_start, **of_request(getattr(request_obj, "mm_processor_kwargs", None) or {})})
    if wanted is not None and reason:
        raise ValueError(reason)
    if wanted is not None and getattr(request_obj, "session_params", None):
        raise ValueError("apet_keep is not supported in sessions: SGLang counts the places of earlier turns itself")
    output = await process(*args, request_obj=request_obj, **kwargs)
    if output is not None and wanted is not None:
        shorten(output, wanted, request_obj, videos=not VIDEOS.isdisjoint(hf_config.architectures))
    return output


def shorten(output: Any, wanted: options.Wanted, request: Any = None, videos: bool = False) -> None:
    """Removes from a `MultimodalProcessorOutput` the placeholders of rows that go, and attaches the plans.

    Raises: ValueError for embeddings from outside, which SGLang does not pass through the model, and for a limit of all
        tokens where some items are not compressed.
    """
    chosen = [item.is_image() or (videos and item.is_video()) for item in output.mm_items]
    if wanted.max_tokens is not None and any(
        item.is_video() and not c for item, c in zip(output.mm_items, chosen, strict=True)
    ):
        raise ValueError(
            f"{options.PREFIX}max_tokens={wanted.max_tokens} limits all visual tokens, but videos of this model keep "
            "theirs"
        )
    limit = options.share(wanted, sum(chosen))
    wanted = replace(wanted, max_tokens=limit.get(f"{options.PREFIX}max_tokens", wanted.max_tokens))
    removed = torch.zeros(len(output.input_ids), dtype=torch.bool)
    hashes = getattr(request, "mm_hashes", None)  # SGLang sets these once more, after the plugin
    hashes = list(hashes) if hashes and len(hashes) == len(output.mm_items) else None  # the caller keeps its own
    for number, item in enumerate(output.mm_items):
        if not chosen[number]:
            continue
        made = plan.make(wanted, units(item))
        if not made.gone:
            continue
        if item.precomputed_embeddings is not None:
            raise ValueError("apet_keep is not supported for precomputed embeddings in SGLang")
        at = places(item)
        if hashes is not None:
            item.set_hash(int(hashes[number], 16))
        item.set_pad_value()
        item.set_hash(_hash(item.hash, made))
        if hashes is not None:
            hashes[number] = f"{item.hash:x}"
        item.model_specific_data[plan.FIELD] = made.pack()
        if output.mrope_positions is not None:
            item.model_specific_data[POSITIONS] = output.mrope_positions[:, at].clone()
        removed[at[made.removed]] = True
    if removed.any():
        if hashes is not None:
            request.mm_hashes = hashes
        _remove(output, removed)


def units(item: Any) -> Tensor:
    """Returns the number of each row's unit, [N]: an image, and of a video each temporal step."""
    lengths = [end + 1 - start for start, end in item.offsets]  # several if SGLang bundles images
    grids = item.model_specific_data.get(IMAGES)
    images = len(lengths) if grids is None else torch.as_tensor(grids).numel() // 3
    if item.is_image() and images != len(lengths):
        raise ValueError(
            f"{images} images have placeholders at {item.offsets}: put a token between two images, or leave out "
            "apet_keep"
        )
    if item.is_video():
        steps = [int(grid[0]) for grid in item.model_specific_data[GRID]]
        if len(lengths) != len(steps) or any(n % t for n, t in zip(lengths, steps, strict=True)):
            raise ValueError(f"a video of {steps} temporal steps has placeholders at {item.offsets}")
        lengths = [n // t for n, t in zip(lengths, steps, strict=True) for _ in range(t)]
    return torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))


def places(item: Any) -> Tensor:
    """Returns the places of an item's tokens in the prompt, [N]."""
    return torch.cat([torch.arange(start, end + 1) for start, end in item.offsets])


def _hash(content: int, made: plan.Plan) -> int:
    """Returns the hash of an item with a plan, so that caches distinguish its budgets and options."""
    key = content.to_bytes(max(8, (content.bit_length() + 7) // 8), "big")
    digest = hashlib.blake2b(made.pack().numpy().tobytes(), key=key, digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def _remove(output: Any, removed: Tensor) -> None:
    """Removes these tokens [L] from the prompt."""
    left = ~removed
    before = torch.cat([torch.zeros(1, dtype=torch.long), left.cumsum(0)])  # tokens left before each place
    for item in output.mm_items:
        item.offsets = [(int(before[start]), int(before[end + 1]) - 1) for start, end in item.offsets]
        item.set_pad_value()
    output.input_ids = torch.tensor(output.input_ids)[left].tolist()
    output.padded_input_ids = type(output).build_padded_input_ids(output.input_ids, output.mm_items)
    if output.token_type_ids is not None:
        output.token_type_ids = torch.as_tensor(output.token_type_ids).flatten()[left].tolist()
    if output.mrope_positions is not None:
        output.mrope_positions = output.mrope_positions[:, left]
        output.mrope_position_delta = output.mrope_position_delta + int(removed.sum())
