"""The vision-language models of `apet generate` and `apet eval`: loads one with its processor, and asks it a
question."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apet import ApetError
from apet.hub import config_file, first_line, load_config, model_class, need, why

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn

    from apet.media import Media


def load(name: str, trials: Sequence[Mapping[str, Any]], dtype: str, device: str | None) -> tuple[nn.Module, Any]:
    """Loads a model (a folder or a hub id) and its processor.

    trials: the options of `apet.patch` that will be used. They are checked on a model without weights before the
    weights are read.

    Raises: ApetError, if the model cannot be loaded or the options do not fit it.
    """
    transformers = need("transformers")
    import torch

    from apet import hooks

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = device_of(device)
    config, local = load_config(name)
    kind = model_class(name, config)
    try:
        with torch.device("meta"):
            empty = kind(config)
    except Exception as error:
        raise ApetError(
            f"cannot make a {kind.__name__} from the config.json of {name!r}: {first_line(error)}"
        ) from error
    try:
        for options in trials:
            hooks.patch(empty, **options)
    except (ValueError, torch.OutOfMemoryError) as error:
        raise ApetError(first_line(error)) from error
    try:
        processor = transformers.AutoProcessor.from_pretrained(name, local_files_only=local, trust_remote_code=False)
    except Exception as error:
        hint = "" if find_spec("torchvision") else " (many processors need torchvision, which is not installed)"
        raise ApetError(f"cannot load the processor of model {name!r}{hint}: {why(error, name)}") from error
    try:
        model, report = kind.from_pretrained(name, dtype=dtype, local_files_only=local, output_loading_info=True)
        model = model.eval().to(where)
    except Exception as error:
        raise ApetError(f"cannot load the weights of model {name!r}: {why(error, name)}") from error
    if report["missing_keys"]:
        raise ApetError(f"model {name!r} lacks {len(report['missing_keys'])} of its weights")
    return model, processor


def question(
    model: nn.Module, processor: Any, prompt: str, images: Sequence[Image.Image], clip: Media | None = None
) -> dict[str, Any]:
    """Returns the inputs of a question about images, or about a clip: all of its frames, at their times.

    Raises: ApetError, if the processor does not accept the prompt, or takes other frames.
    """
    import numpy as np

    kinds = ["image"] * len(images) + ["video"] * (clip is not None)
    if clip is not None and not hasattr(processor, "video_processor") and not hasattr(processor, "video_token"):
        raise ApetError(f"this model takes no clips: its {type(processor).__name__} has no video processor")
    try:
        if getattr(processor, "chat_template", None):
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = "".join(getattr(processor, f"{kind}_token") + "\n" for kind in kinds) + prompt
        given: dict[str, Any] = {"images": list(images)} if images else {}
        first = getattr(getattr(processor, "tokenizer", None), "bos_token", None)
        if first and text.startswith(first):  # the template has written it, and the tokenizer may add another one
            given["add_special_tokens"] = False
        if clip is not None:
            # Otherwise some processors select from these frames again, at times that they assume.
            given |= {
                "videos": [np.stack(clip.frames)],
                "video_metadata": [metadata(clip)],
                "do_sample_frames": False,
            }
        inputs = dict(processor(text=[text], return_tensors="pt", **given))
    except Exception as error:  # processors raise many kinds of errors
        raise ApetError(f"the processor of this model cannot take such a prompt: {first_line(error)}") from error
    inputs.pop("video_metadata", None)
    if clip is not None:
        _check_frames(processor, inputs, clip)
    return {name: _placed(name, value, model) for name, value in inputs.items()}


TICKS = 1000  # per second: a clock that is fine enough for any frame rate


def metadata(clip: Media) -> dict[str, Any]:
    """Describes a clip as `transformers.video_utils.VideoMetadata` does, on a clock of `TICKS` frames a second.

    With it the time of each frame, index / fps, is right under a variable frame rate, too, and so is the mean distance
    between frames, total / fps / number of frames.
    """
    width, height = clip.size
    return {
        "total_num_frames": max(round(clip.seconds * TICKS), len(clip.frames)),
        "fps": float(TICKS),
        "width": width,
        "height": height,
        "duration": clip.seconds,
        "video_backend": "pyav",
        "frames_indices": [round(time * TICKS) for time in clip.times],
    }


def _check_frames(processor: Any, inputs: dict[str, Any], clip: Media) -> None:
    """Raises ApetError if the inputs do not have all frames; sets the seconds of a temporal step for Qwen2.5-VL.

    Versions of its processor compute these seconds in different ways; all of them pass them to the model.
    """
    frames = len(clip.frames)
    each = getattr(getattr(processor, "video_processor", None), "temporal_patch_size", None) or 1
    found, wanted = _frames_of(inputs, frames), -(-frames // each) if "video_grid_thw" in inputs else frames
    if found is None:
        raise ApetError(
            f"the inputs that {type(processor).__name__} makes of a clip do not show how many frames it took: "
            f"{', '.join(inputs)}"
        )
    if found != wanted:
        raise ApetError(f"the processor of this model made {found} steps of {frames} frames, where {wanted} are right")
    if "second_per_grid_ts" in inputs:
        inputs["second_per_grid_ts"] = [each * clip.seconds / frames]


def _frames_of(inputs: Mapping[str, Any], frames: int) -> int | None:
    """Returns how many temporal steps the inputs of a clip have; None if they are in no form that is known here."""
    for name in ("video_grid_thw", "video_grids"):  # [clips, (time, height, width)]; video_grids: Molmo2
        if name in inputs:
            return int(inputs[name][0][0])
    if "num_frames_per_video" in inputs:  # Gemma 4
        return int(inputs["num_frames_per_video"][0])
    if "target_sizes_videos" in inputs:  # MiniCPM-V: of each frame, or of each of its equally many slices
        slices = len(inputs["target_sizes_videos"])
        return frames if slices % frames == 0 else slices
    pixels = inputs.get("pixel_values_videos", inputs.get("pixel_values"))
    if pixels is None or pixels.dim() not in (4, 5):
        return None
    # [clips, frames, C, H, W], or, in InternVL, [frames, C, H, W]: frames are images.
    return int(pixels.shape[1] if pixels.dim() == 5 else pixels.shape[0])


def _placed(name: str, value: Any, model: nn.Module) -> Any:
    """Moves a value to the model's device, and pixels to its dtype (times and sizes stay exact)."""
    import torch

    if name == "second_per_grid_ts":
        value = torch.as_tensor(value, dtype=torch.float32)
    if not isinstance(value, torch.Tensor):
        return value
    pixels = name.startswith("pixel_values") and value.is_floating_point()
    return value.to(model.device, model.dtype if pixels else None)


def answer(model: nn.Module, processor: Any, inputs: Mapping[str, Any], max_new_tokens: int, show: bool) -> str:
    """Returns the greedy answer to a question; with `show` it is printed while it is generated."""
    from transformers import TextStreamer

    from apet.model_report import GREEDY

    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True) if show else None
    (tokens,) = model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens, streamer=streamer)
    return processor.tokenizer.decode(tokens[inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# Endings of files that loading a model may read: weights, settings, tokenizers, templates.
LOADED = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json", ".jinja", ".txt", ".model", ".tiktoken"}


def digest(name: str) -> str:
    """Returns a digest of the names, sizes and times of change of the files of a model's folder that may be loaded; of
    a model of the hub its commit.

    Raises: ApetError, if there is no such model.
    """
    folder = Path(name)
    if not folder.is_dir():
        return config_file(name)[0].parent.name
    depth = len(folder.parts)
    files = sorted(
        (str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.suffix in LOADED and path.is_file() and not any(part.startswith(".") for part in path.parts[depth:])
    )
    return hashlib.sha256(repr(files).encode()).hexdigest()


def describe_device(name: str | None) -> str:
    """Returns the kind of the device of that name, as in `load`."""
    import torch

    device = device_of(name)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def device_of(name: str | None) -> Any:
    """Returns the device of that name; None: an accelerator, if there is one. Raises: ApetError, if it is not
    available."""
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ApetError(f"device={name!r} is not a device of torch") from error
    usable = device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)
    if not usable or (device.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise ApetError(f"device={name!r} is not available: torch finds {accelerator or 'no accelerator'}")
    return device
