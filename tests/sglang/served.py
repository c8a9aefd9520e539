"""An engine of SGLang on the CPU, and the same model in transformers with the hooks of this package."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apet
import numpy as np
import torch
import transformers
from PIL import Image

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
LIKELY = 8  # tokens whose probabilities are compared
# Options of an engine without a GPU. Its own CPU engine needs kernels that no package on PyPI has.
ENGINE: dict[str, Any] = {
    "device": "cpu",
    "dtype": "float32",
    "attention_backend": "torch_native",
    "mm_attention_backend": "sdpa",
    "disable_overlap_schedule": True,
    "disable_cuda_graph": True,
    "mem_fraction_static": 0.2,
    "max_total_tokens": 4096,
    "context_length": 2048,
    "chunked_prefill_size": 64,  # less than a prompt, so pictures are prefilled in parts
    "log_level": "warning",
}


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """Returns a smooth picture, in which neighbouring patches resemble each other, as in a photo."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def url(image: Image.Image) -> str:
    """Returns a picture as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def clip(height: int, width: int, frames: int, seed: int = 0) -> torch.Tensor:
    """Returns frames of a video [T, 3, H, W] uint8, which change slowly."""
    first, last = (np.asarray(picture(height, width, seed + i), float) for i in range(2))
    mixed = [first + (last - first) * i / frames for i in range(frames)]
    return torch.from_numpy(np.stack(mixed).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()


def asked(images: list[Image.Image], text: str = "what is it?", videos: Sequence[torch.Tensor] = ()) -> str:
    """Returns a prompt about these pictures and videos."""
    return "see " + "".join(f"{token} and " for token in [IMAGE] * len(images) + [VIDEO] * len(videos)) + text


@dataclass
class Answer:
    """What was generated for a request: tokens, the log-probabilities of the likeliest ones at the first place, the
    length of the prompt, and how much of it was cached."""

    ids: list[int]
    likely: dict[int, float]
    prompt: int
    cached: int


class Served:
    """An engine, and the model in transformers."""

    def __init__(self, name: str, folder: Path, **more: Any) -> None:
        import sglang

        self.name, self.folder = name, folder
        self.engine = sglang.Engine(model_path=str(folder), **{**ENGINE, **more})
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = transformers.AutoProcessor.from_pretrained(folder)

    def close(self) -> None:
        """Ends the engine."""
        self.engine.shutdown()

    def forget(self) -> None:
        """Empties the prefix cache."""
        self.engine.flush_cache()

    def ask(
        self,
        images: list[Image.Image],
        text: str = "what is it?",
        tokens: int = 4,
        videos: Sequence[torch.Tensor] = (),
        **kwargs: Any,
    ) -> Answer:
        """Asks the engine. kwargs: the request's `mm_processor_kwargs`."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            text=asked(images, text, videos),
            image_data=[url(image) for image in images] or None,
            video_data=list(videos) or None,
            sampling_params={"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
            return_logprob=True,
            top_logprobs_num=LIKELY,
            mm_processor_kwargs=kwargs or None,
        )
        answers = self.engine.tokenizer_manager.generate_request(request, None)
        found = self.engine.loop.run_until_complete(answers.__anext__())
        about = found["meta_info"]
        likely = {token: value for value, token, *_ in about["output_top_logprobs"][0]}
        return Answer(list(found["output_ids"]), likely, about["prompt_tokens"], about["cached_tokens"])

    @torch.no_grad()
    def expect(
        self,
        images: list[Image.Image],
        text: str = "what is it?",
        tokens: int = 4,
        videos: Sequence[torch.Tensor] = (),
        **options: Any,
    ) -> Answer:
        """Asks the model in transformers. options: those of `apet.patch`; without any it is not patched."""
        media = {name: list(given) for name, given in (("images", images), ("videos", videos)) if given}
        inputs = self.processor(text=asked(images, text, videos), return_tensors="pt", **media)
        patched = apet.patch(self.model, **options) if options else None
        try:
            found = self.model.generate(
                **inputs,
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                output_logits=True,
                return_dict_in_generate=True,
            )
        finally:
            if patched is not None:
                apet.unpatch(self.model)
        first = found.logits[0][0].log_softmax(-1)
        likely = {int(token): float(first[token]) for token in first.topk(LIKELY).indices}
        length = inputs["input_ids"].shape[1]
        return Answer(found.sequences[0, length:].tolist(), likely, length, 0)


def agree(one: Answer, other: Answer, within: float = 2e-3) -> bool:
    """Returns whether the likeliest tokens at the first place, and their log-probabilities, are the same."""
    common = one.likely.keys() & other.likely.keys()
    return len(common) >= LIKELY - 1 and all(abs(one.likely[t] - other.likely[t]) <= within for t in common)
