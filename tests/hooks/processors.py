"""Processors for the tiny models, made here: a tokenizer of the words w3 to w119 and every placeholder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import apet
import families
import numpy as np
import torch
from conversations import Sample, Visual, collate
from families import END, IMAGE, PAD, PATCH, PINPOINTS, SIDE, START, VIDEO
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchFeature, PreTrainedTokenizerFast

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer in which token 5 is "w5"."""
    special = {
        "<pad>": PAD,
        "<s>": 1,
        "</s>": 2,
        "<vision>": START,
        "</vision>": END,
        "<video>": VIDEO,
        "<image>": IMAGE,
    }
    words = {**{f"w{i}": i for i in range(3, 120)}, **special, "<unk>": families.VOCABULARY - 1}
    level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=level,
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=list(special)[3:],
        model_input_names=["input_ids", "attention_mask"],
    )


def llava_folder(folder: Path, name: str) -> Path:
    """Saves a tiny LLaVA-1.5 or LLaVA-NeXT with its processor in a folder, in the format of the hub."""
    from transformers import CLIPImageProcessor, LlavaNextImageProcessor, LlavaNextProcessor, LlavaProcessor

    size = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    size |= {"image_mean": MEAN, "image_std": STD}
    if name == "llava":
        images, kind = CLIPImageProcessor(**size), LlavaProcessor
    else:
        images, kind = LlavaNextImageProcessor(**size, image_grid_pinpoints=PINPOINTS), LlavaNextProcessor
    families.build(name).save_pretrained(folder)
    processor = kind(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    processor.save_pretrained(folder)
    return folder


def answer(folder: Path, photos: Sequence[Path], prompt: str, length: int, **options: Any) -> str:
    """Returns the answer by generate() of the LLaVA-1.5 in a folder, patched with these options."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, processor = LlavaForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    images = [Image.open(photo).convert("RGB") for photo in photos]
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    if options:
        apet.patch(model, **options)
    tokens = model.generate(**inputs, max_new_tokens=length, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(tokens, skip_special_tokens=True)


class Processor:
    """A replacement for the processors of Qwen2.5-VL and Video-LLaVA, which transformers makes only with
    torchvision."""

    image_token, video_token = "<image>", "<video>"
    image_mean, image_std = MEAN, STD

    def __init__(self, family: families.Family):
        self.family, self.tokenizer = family, tokenizer()
        self.named: dict[str, Any] = {}  # its other arguments

    def __call__(
        self, text: Sequence[str], images: Any = (), videos: Any = (), return_tensors: str = "pt", **named: Any
    ) -> Any:
        self.named = named
        visuals = [self.visual("image", [np.asarray(image) for image in images][i]) for i in range(len(images))]
        visuals += [self.visual("video", frames) for frames in videos]
        row, waiting = Sample(visuals=visuals), iter(visuals)
        for token in self.tokenizer(text[0])["input_ids"]:
            row.ids += [token] * (next(waiting).count if token in (IMAGE, VIDEO) else 1)
        return BatchFeature(collate(self.family, [row]))

    def visual(self, kind: str, pictures: np.ndarray) -> Visual:
        """Prepares pictures: [H, W, 3] of bytes, or [frames, H, W, 3]."""
        if self.family.ragged:
            from transformers import Qwen2VLImageProcessor

            edge = {"min_pixels": 64, "max_pixels": 96 * 64, "image_mean": MEAN, "image_std": STD}
            images = Qwen2VLImageProcessor(patch_size=4, merge_size=2, temporal_patch_size=2, **edge)
            made = images(Image.fromarray(pictures), return_tensors="pt")
            grid = tuple(made["image_grid_thw"][0].tolist())
            return Visual(kind, made["pixel_values"], grid, grid[1] * grid[2] // 4)
        frames = pictures if pictures.ndim == 4 else pictures[None]
        small = np.stack([np.asarray(Image.fromarray(frame).resize((SIDE, SIDE))) for frame in frames])
        pixels = (torch.from_numpy(small / 255) - torch.tensor(MEAN)) / torch.tensor(STD)
        each = families.TILE + (kind == "video")
        return Visual(kind, pixels.permute(0, 3, 1, 2).float(), (), len(frames) * each)
