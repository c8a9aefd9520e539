"""The model that hooks and serving are measured with: the vision encoder of LLaVA-1.5, a decoder as wide as a 1B Llama.

It has PARAMETERS parameters in all. The weights are random, since the measurements do not depend on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TOKENS = 576  # an image of 336 x 336 pixels in patches of 14 x 14
PICTURE = {"image_size": 336, "patch_size": 14}
PARAMETERS = "1.15B"


@dataclass(frozen=True, eq=False)
class Size:
    """Dimensions of a model: of its vision encoder, and of its decoder."""

    vision: dict[str, int]
    text: dict[str, int]

    @classmethod
    def of(cls, *, vision: tuple[int, int, int, int], text: tuple[int, int, int, int, int]) -> Size:
        """Returns a size from hidden and intermediate size, layers and heads; for the decoder also the number of key
        heads."""
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return cls(dict(zip(names, vision, strict=False)), dict(zip(names, text, strict=True)))


REAL = Size.of(vision=(1024, 4096, 24, 16), text=(2048, 5632, 16, 32, 4))
SMOKE = Size.of(vision=(64, 96, 2, 2), text=(128, 192, 4, 4, 2))
SPECIAL = ("<pad>", "<s>", "</s>", "<image>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the text tokens of the model that `save` writes; "!" to "~" first
ENDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VOCABULARY = 512
LETTERS = range(len(SPECIAL), len(SPECIAL) + 94)  # their ids
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def config(size: Size, vocabulary: int, image: int, **more: Any) -> Any:
    """Returns a LlavaConfig of this size; image: the id of its placeholder; more: further fields of the decoder."""
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**size.vision, **PICTURE, projection_dim=768),
        text_config=transformers.LlamaConfig(**size.text, vocab_size=vocabulary, max_position_embeddings=4096, **more),
        image_token_index=image,
        architectures=["LlavaForConditionalGeneration"],
    )


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns a tokenizer to which each byte of text is a token."""
    pad, bos, eos, *more = SPECIAL
    ids = {word: number for number, word in enumerate([*SPECIAL, *BYTES])}
    tokens = Tokenizer(models.BPE(ids, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=more,
        chat_template=TEMPLATE,
    )


def save(folder: Path, size: Size) -> None:
    """Writes config and processor for a server with dummy weights."""
    side = PICTURE["image_size"]
    images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    config(size, VOCABULARY, SPECIAL.index("<image>"), **ENDS).save_pretrained(folder)
    transformers.LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PICTURE["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
