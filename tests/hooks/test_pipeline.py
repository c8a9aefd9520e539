"""transformers' own code that calls `generate`: its pipeline, and a thread whose answer is streamed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import apet
import pytest
import torch
from PIL import Image
from running import BOTH
from transformers import AutoProcessor, LlavaForConditionalGeneration, TextIteratorStreamer, pipeline

TEXTS = ["w5 <image> w7 w8", "w9 w10 w11 <image> w12 w3"]  # of different lengths: a batch has padding
HOW: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture
def model(llava: Path) -> LlavaForConditionalGeneration:
    return LlavaForConditionalGeneration.from_pretrained(llava)


@pytest.fixture
def processor(llava: Path) -> Any:
    processor = AutoProcessor.from_pretrained(llava)
    processor.tokenizer.padding_side = "left"
    return processor


@pytest.fixture
def photos() -> list[Image.Image]:
    """Returns two pictures of noise."""
    drawn = torch.Generator().manual_seed(0)
    size = (2, 60, 80, 3)
    return [Image.fromarray(x.numpy()) for x in torch.randint(256, size, dtype=torch.uint8, generator=drawn)]


def answers(model: Any, processor: Any, photos: list[Image.Image], rows: slice) -> list[list[int]]:
    """Returns the new tokens of each row, by the model's own generate()."""
    inputs = processor(text=TEXTS[rows], images=photos[rows], return_tensors="pt", padding=True)
    out = model.generate(**inputs, **HOW)
    return out[:, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("order", ["patch, then pipeline", "pipeline, then patch"])
def test_pipeline(order: str, model: Any, processor: Any, photos: list[Image.Image]) -> None:
    """One prompt, two prompts in a call, and two that the pipeline puts into a batch."""
    if order.startswith("patch"):
        apet.patch(model, **BOTH)
    pipe = pipeline("image-text-to-text", model=model, processor=processor, device="cpu")
    if order.startswith("pipeline"):
        apet.patch(pipe.model, **BOTH)
    whole = len(processor(text=TEXTS[1], images=photos[1], return_tensors="pt")["input_ids"][0])
    one = pipe(images=photos[1], text=TEXTS[1], generate_kwargs=HOW, return_tensors=True)
    kept = apet.kept(model)
    assert kept.lengths[0] == whole > kept.lengths[1] > kept.lengths[2]
    assert [new_tokens(said, whole) for said in one] == answers(model, processor, photos, slice(1, 2))
    both = answers(model, processor, photos, slice(0, 2))
    two = pipe(images=photos, text=TEXTS, generate_kwargs=HOW, return_tensors=True)
    assert [new_tokens(said, whole) for said in two] == both
    each = ({"images": photo, "text": text} for photo, text in zip(photos, TEXTS, strict=True))
    batch = pipe(each, batch_size=2, generate_kwargs=HOW, return_tensors=True)
    assert [new_tokens(said, whole) for row in batch for said in row] == both
    assert {visual.row for visual in apet.kept(model).visuals} == {0, 1}


def new_tokens(said: dict[str, Any], prompt: int) -> list[int]:
    return torch.as_tensor(said["generated_token_ids"])[prompt:].tolist()


def test_streamer_in_a_thread(model: Any, processor: Any, photos: list[Image.Image]) -> None:
    """generate() runs in a thread of its own, and the caller reads its words."""
    apet.patch(model, **BOTH)
    (tokens,) = answers(model, processor, photos, slice(1))
    lengths = apet.kept(model).lengths
    apet.patch(model, **BOTH)  # forgets what was kept
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True)
    inputs = processor(text=TEXTS[:1], images=photos[:1], return_tensors="pt")
    thread = threading.Thread(target=model.generate, kwargs={**inputs, **HOW, "streamer": streamer})
    thread.start()
    words = "".join(streamer)
    thread.join()
    assert words.split() == processor.tokenizer.decode(tokens, skip_special_tokens=True).split()
    assert words
    assert apet.kept(model).lengths == lengths  # of another thread, since this one ran no prefill
