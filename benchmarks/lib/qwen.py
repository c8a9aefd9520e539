"""The model that serving of videos is measured with: the shape of Qwen2.5-VL, with the decoder of llava.py.

A video of FRAMES frames of SIDE x SIDE pixels has as many tokens as an image there, in STEPS temporal steps. So many
steps allow EVS, which keeps the whole first one, to drop as much as the smallest budget asks.
"""

from __future__ import annotations

from pathlib import Path

import transformers

from benchmarks.lib.llava import ENDS, SPECIAL, TEMPLATE, VOCABULARY, Size, tokenizer

FRAMES, SIDE = 18, 224
PATCH, MERGE, TEMPORAL = 14, 2, 2
STEPS = FRAMES // TEMPORAL
TOKENS = STEPS * (SIDE // PATCH // MERGE) ** 2
REAL = Size.of(vision=(1280, 3420, 32, 16), text=(2048, 5632, 16, 32, 4))
SMOKE = Size.of(vision=(64, 96, 2, 2), text=(128, 192, 4, 4, 2))


def save(folder: Path, size: Size) -> None:
    """Writes config and processor for a server with dummy weights."""
    vision, text = size.vision, size.text
    half = text["hidden_size"] // text["num_attention_heads"] // 2
    depth, full = vision["num_hidden_layers"], 8  # every eighth layer attends to the whole frame, and the last
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    transformers.Qwen2_5_VLConfig(
        vision_config={
            "depth": depth,
            "num_heads": vision["num_attention_heads"],
            "hidden_size": vision["hidden_size"],
            "intermediate_size": vision["intermediate_size"],
            "out_hidden_size": text["hidden_size"],
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "fullatt_block_indexes": sorted({*range(full - 1, depth, full), depth - 1}),
        },
        text_config={
            **text,
            **ENDS,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": sections},
            "tie_word_embeddings": False,
        },
        image_token_id=SPECIAL.index("<|image_pad|>"),
        video_token_id=SPECIAL.index("<|video_pad|>"),
        vision_start_token_id=SPECIAL.index("<|vision_start|>"),
        vision_end_token_id=SPECIAL.index("<|vision_end|>"),
        architectures=["Qwen2_5_VLForConditionalGeneration"],
    ).save_pretrained(folder)
    sizes = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": TEMPORAL}
    pixels = {"min_pixels": SIDE**2, "max_pixels": 16 * SIDE**2}
    transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes, **pixels),
        tokenizer(),
        transformers.Qwen2VLVideoProcessor(**sizes, **pixels),
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
