"""The tokenizer: a token for every word of questions and answers, and one for every letter of words in capitals."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from benchmarks.vlm import questions, sources

PAD, BEGIN, END, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
INNER = "##"  # before a letter that is not a word's first
# A question follows its picture, and an answer its question; a conversation may continue after </s>.
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer, made anew; it is the same every time."""
    known = dict.fromkeys([*SPECIAL, *questions.vocabulary(), *(INNER + letter for letter in sources.LETTERS)])
    words = Tokenizer(
        models.WordPiece(
            {word: number for number, word in enumerate(known)},
            unk_token=UNKNOWN,
            continuing_subword_prefix=INNER,
            max_input_chars_per_word=100,
        )
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix=INNER, cleanup=False)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        chat_template=TEMPLATE,
        padding_side="left",
    )
