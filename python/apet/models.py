"""Vision-language models of `apet generate` and `apet eval`: loads one with its processor, and asks it a question."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from apet import Refused
from apet.hub import first_line, load_config, need

if TYPE_CHECKING:
    from PIL import Image
    from torch import nn


def load(name: str, trials: Sequence[Mapping[str, Any]], dtype: str, device: str | None) -> tuple[nn.Module, Any]:
    """A model (a folder or a hub id) and its processor.

    trials: options of `apet.patch` that will be used; they are checked on a model without weights before the weights
    are read.

    Raises: Refused, if the model cannot be loaded or the options do not fit it.
    """
    transformers = need("transformers")
    import torch

    from apet import hooks

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where = _device(device)
    config, local = load_config(name)
    kind = getattr(transformers, (config.architectures or [""])[0], None)
    if not hasattr(kind, "generate"):
        raise Refused(f"model {name!r} is a {config.model_type!r} of class {config.architectures}, with no generate()")
    try:
        with torch.device("meta"):
            empty = kind(config)
    except Exception as error:
        raise Refused(f"cannot make a {kind.__name__} from the config.json of {name!r}: {first_line(error)}") from error
    try:
        for options in trials:
            hooks.patch(empty, **options)
    except ValueError as error:
        raise Refused(first_line(error)) from error
    try:
        processor = transformers.AutoProcessor.from_pretrained(name, local_files_only=local)
    except Exception as error:
        hint = "" if find_spec("torchvision") else " (many processors need torchvision, which is not installed)"
        raise Refused(f"cannot load the processor of model {name!r}{hint}: {first_line(error)}") from error
    try:
        model, report = kind.from_pretrained(name, dtype=dtype, local_files_only=local, output_loading_info=True)
        model = model.eval().to(where)
    except Exception as error:
        raise Refused(f"cannot load the weights of model {name!r}: {first_line(error)}") from error
    if report["missing_keys"]:
        raise Refused(f"model {name!r} lacks {len(report['missing_keys'])} of its weights")
    return model, processor


def question(
    model: nn.Module, processor: Any, prompt: str, images: Sequence[Image.Image], frames: Sequence[Image.Image]
) -> dict[str, Any]:
    """The inputs of a question about images, or about the frames of a clip.

    Raises: Refused, if the processor does not accept the prompt.
    """
    import numpy as np

    kinds = ["image"] * len(images) + ["video"] * bool(frames)
    try:
        if getattr(processor, "chat_template", None):
            content = [*({"type": kind} for kind in kinds), {"type": "text", "text": prompt}]
            text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        else:
            text = "".join(getattr(processor, f"{kind}_token") + "\n" for kind in kinds) + prompt
        given: dict[str, Any] = {"images": list(images)} if images else {"videos": [np.stack(frames)]}
        inputs = processor(text=[text], return_tensors="pt", **given)
    except Exception as error:  # every processor has its own ways to fail
        raise Refused(f"the processor of this model cannot take such a prompt: {first_line(error)}") from error
    return dict(inputs.to(model.device, model.dtype))


def answer(
    model: nn.Module,
    processor: Any,
    inputs: Mapping[str, Any],
    max_new_tokens: int,
    write: Callable[[str], object] | None = None,
) -> None:
    """Writes the greedy answer to a question while it is generated. write: takes parts of it; None: print them."""
    from transformers import TextStreamer

    from apet.model_report import GREEDY

    streamer = TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    if write is not None:
        streamer.on_finalized_text = lambda text, stream_end=False: write(text)
    model.generate(**inputs, **GREEDY, max_new_tokens=max_new_tokens, streamer=streamer)


def _device(name: str | None) -> Any:
    """The device of that name; for None an accelerator, if there is one. Raises: Refused, if it is not available."""
    import torch

    there = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise Refused(f"device={name!r} is no device of torch") from error
    usable = device.type == "cpu" or (there is not None and device.type == there.type)
    if not usable or (device.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise Refused(f"device={name!r} is not available: torch finds {there or 'no accelerator'}")
    return device
