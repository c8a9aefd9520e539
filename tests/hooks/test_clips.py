"""The processors of transformers with clips: each passes all frames of a clip to its model, at their times.

The video processors need torchvision, which `make test` does not install; `make test-vllm` runs this file, too. The
processors are configured to choose frames themselves, as in checkpoints, but must use the frames that apet passes.
"""

from __future__ import annotations

import re
from typing import Any

import apet
import numpy as np
import pytest
import torch
import transformers
from apet import ApetError, models
from apet.media import Media
from families import END, IMAGE, PATCH, PINPOINTS, SIDE, START, TILE, VIDEO, build, core
from PIL import Image
from processors import tokenizer

pytest.importorskip("torchvision")

FAMILIES = (
    *("qwen2_vl", "qwen2_5_vl", "qwen3_vl"),
    *("llava_next_video", "llava_onevision", "video_llava", "internvl"),
)
TIMES, SECONDS = [0.5, 2.5, 4.5, 6.5], 8.0
CHOOSES = {"do_sample_frames": True, "num_frames": 2}
SQUARE = {"height": SIDE, "width": SIDE}


@pytest.fixture
def clip() -> Media:
    """Returns four frames, each brighter than the one before."""
    frames = [Image.fromarray(np.full((64, 96, 3), 40 + 50 * i, np.uint8)) for i in range(4)]
    return Media("clip", frames, TIMES, total=160, seconds=SECONDS)


def words() -> Any:
    """Returns the tiny models' tokenizer, with the names that processors look for."""
    made = tokenizer()
    names = {"image": ("<image>", IMAGE), "video": ("<video>", VIDEO), "context_image": ("<image>", IMAGE)}
    names |= {"vision_start": ("<vision>", START), "vision_end": ("</vision>", END)}
    names |= {"start_image": ("<vision>", START), "end_image": ("</vision>", END)}
    for name, (token, number) in names.items():
        setattr(made, f"{name}_token", token)
        setattr(made, f"{name}_token_id", number)
    return made


def processor(name: str) -> Any:
    hf = transformers
    around = ("<vision>", "</vision>") if name.startswith("qwen") else ("", "")
    template = (
        "{% for m in messages %}{% for c in m.content %}{% if c.type == 'text' %} {{ c.text }}{% else %}"
        f"{around[0]}<{{{{ c.type }}}}>{around[1]}" + "{% endif %}{% endfor %}{% endfor %}"
    )
    common: dict[str, Any] = {"tokenizer": words(), "chat_template": template}
    if name.startswith("qwen"):
        grid = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
        size = {"shortest_edge": 64, "longest_edge": 4 * 96 * 64}
        kind = hf.Qwen3VLVideoProcessor if name == "qwen3_vl" else hf.Qwen2VLVideoProcessor
        videos = kind(**grid, size=size, **CHOOSES)
        cls = {"qwen2_vl": hf.Qwen2VLProcessor, "qwen2_5_vl": hf.Qwen2_5_VLProcessor, "qwen3_vl": hf.Qwen3VLProcessor}
        return cls[name](image_processor=hf.Qwen2VLImageProcessor(**grid), video_processor=videos, **common)
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    counts = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if name == "llava_next_video":
        return hf.LlavaNextVideoProcessor(
            image_processor=hf.LlavaNextImageProcessor(**crop, image_grid_pinpoints=PINPOINTS),
            video_processor=hf.LlavaNextVideoVideoProcessor(**crop, **CHOOSES),
            **counts,
            **common,
        )
    if name == "llava_onevision":
        return hf.LlavaOnevisionProcessor(
            image_processor=hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
            video_processor=hf.LlavaOnevisionVideoProcessor(size=SQUARE, **CHOOSES),
            num_image_tokens=TILE,
            vision_feature_select_strategy="full",
            **common,
        )
    if name == "video_llava":
        return hf.VideoLlavaProcessor(
            image_processor=hf.VideoLlavaImageProcessor(**crop),
            video_processor=hf.VideoLlavaVideoProcessor(**crop, **CHOOSES),
            **counts,
            **common,
        )
    return hf.InternVLProcessor(
        image_processor=hf.GotOcr2ImageProcessor(size=SQUARE),
        video_processor=hf.InternVLVideoProcessor(size=SQUARE, **CHOOSES),
        image_seq_length=(SIDE // 4 // 2) ** 2,
        **common,
    )


def brightness(given: dict[str, Any]) -> list[float]:
    """Returns the mean of each frame, or pair of frames, in the input of the model."""
    pixels = given.get("pixel_values_videos", given.get("pixel_values")).float()
    if "video_grid_thw" in given:
        return pixels.view(int(given["video_grid_thw"][0][0]), -1).mean(1).tolist()
    return pixels.view(len(TIMES), -1).mean(1).tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_frame_at_its_time(name: str, clip: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, call = [], transformers.PreTrainedTokenizerFast.__call__

    def spy(self: Any, text: Any, *rest: Any, **named: Any) -> Any:
        texts.append(text)
        return call(self, text, *rest, **named)

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", spy)
    model = build(name)
    given = models.question(model, processor(name), "w3 w4", [], clip)
    steps = 2 if name.startswith("qwen") else 4
    seen = brightness(given)
    assert len(seen) == steps
    assert seen == sorted(set(seen))

    if name == "qwen2_5_vl":
        assert given["second_per_grid_ts"].tolist() == [4.0]  # of a pair of frames
        assert given["second_per_grid_ts"].dtype == torch.float32
        names = ("input_ids", "mm_token_type_ids", "video_grid_thw", "second_per_grid_ts", "attention_mask")
        positions, _ = core(model).get_rope_index(**{name: given[name] for name in names if name in given})
        temporal = positions[0][given["input_ids"] == VIDEO].unique().tolist()
        assert np.diff(temporal).tolist() == [4.0 * core(model).config.vision_config.tokens_per_second]
    if name == "qwen3_vl":
        (text,) = texts[-1]
        assert re.findall(r"<([\d.]+) seconds>", text) == ["1.5", "5.5"]  # the middles of the pairs

    with apet.patched(model, keep=3, basis=2):
        model.generate(**given, max_new_tokens=1, do_sample=False)
        (*visuals,) = apet.kept(model).visuals
    assert sum(len(visual.remaining[0]) for visual in visuals) == 3 * steps + (name in ("llava_onevision",)) + 4 * (
        name == "video_llava"  # CLS of each frame
    )


def test_times_stay_exact_in_low_precision(clip: Media) -> None:
    model = build("qwen2_5_vl", dtype=torch.bfloat16)
    odd = Media("clip", clip.frames, TIMES, total=160, seconds=7.77)
    given = models.question(model, processor("qwen2_5_vl"), "w3", [], odd)
    assert given["pixel_values_videos"].dtype == torch.bfloat16
    assert given["second_per_grid_ts"].item() == pytest.approx(2 * 7.77 / 4)


def test_a_processor_that_takes_other_frames_is_found(clip: Media) -> None:
    made = processor("qwen2_5_vl")

    class Stubborn:
        """A processor that takes only half of the frames."""

        chat_template, video_token, video_processor = None, "<video>", made.video_processor

        def __call__(self, text: Any, videos: Any, video_metadata: Any, **named: Any) -> Any:
            return made(text=text, videos=[videos[0][::2]], **named)

    with pytest.raises(ApetError, match="made 1 steps of 4 frames, where 2 are right"):
        models.question(build("qwen2_5_vl"), Stubborn(), "w3", [], clip)
