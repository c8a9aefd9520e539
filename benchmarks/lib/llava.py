"""The model that hooks and serving are measured with: the vision encoder of LLaVA-1.5, a decoder as wide as a 1B Llama.

1.1B parameters together. Weights are random: what is measured does not depend on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TOKENS = 576  # an image of 336 x 336 pixels in patches of 14 x 14
PICTURE = {"image_size": 336, "patch_size": 14}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
TEXT = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())  # the tokens of text that `save` knows; "!" to "~" come first
LETTERS = range(len(SPECIAL), len(SPECIAL) + 94)  # their ids
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


def config(vision: dict[str, int], text: dict[str, int], vocabulary: int, image: int, **more: Any) -> Any:
    """A LlavaConfig of these dimensions; image: the id of its placeholder, more: of the decoder."""
    return transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, **PICTURE, projection_dim=768),
        text_config=transformers.LlamaConfig(**text, vocab_size=vocabulary, max_position_embeddings=4096, **more),
        image_token_index=image,
        architectures=["LlavaForConditionalGeneration"],
    )


def save(folder: Path, vision: dict[str, int], text: dict[str, int]) -> None:
    """Config and processor, as a server reads them that makes up the weights. A byte of text is a token."""
    pad, bos, eos, image = range(len(SPECIAL))
    ids = {word: number for number, word in enumerate([*SPECIAL, *BYTES])}
    tokens = Tokenizer(models.BPE(ids, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        pad_token=SPECIAL[pad],
        bos_token=SPECIAL[bos],
        eos_token=SPECIAL[eos],
        additional_special_tokens=[SPECIAL[image]],
        chat_template=TEMPLATE,
    )
    side = PICTURE["image_size"]
    images = transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    ends = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos}
    config(vision, text, 512, image, **ends).save_pretrained(folder)
    transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=PICTURE["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
