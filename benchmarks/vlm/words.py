"""The tokenizer: a token for every word of questions and answers, and, for words in capitals, one for every letter at
every place of a word.

So a letter's token says which letter comes next. Otherwise a decoder has to count the letters that it has written,
which a small one needs thousands of steps to learn.
"""

from __future__ import annotations

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from benchmarks.vlm import questions, sources

PAD, BEGIN, END, UNKNOWN, IMAGE = SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
INNER = "##"  # before a letter that is not a word's first, with its number: ##2A
# A question follows its picture, and an answer its question; a conversation may continue after </s>.
TEMPLATE = (
    "<s>{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{% if message['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
)


def letters() -> Tensor:
    """Returns the ids of letters, [places, 26]: as a word's first letter, as its second, and so on."""
    known = tokenizer().get_vocab()
    ids = [[known[letter] for letter in sources.LETTERS]]
    ids += [[known[f"{INNER}{place}{letter}"] for letter in sources.LETTERS] for place in range(2, sources.LONGEST + 1)]
    return torch.tensor(ids)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Returns the tokenizer, made anew; it is the same every time."""
    numbers = range(2, sources.LONGEST + 1)
    inner = [f"{INNER}{number}{letter}" for number in numbers for letter in sources.LETTERS]
    known = dict.fromkeys([*SPECIAL, *questions.vocabulary(), *inner])
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(known)}, unk_token=UNKNOWN))
    # The last letters first: a number would end the run of capitals before the letters after it.
    words.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(rf"(?<=\b[A-Z]{{{number - 1}}})(?=[A-Z])"), f"{INNER}{number}")
            for number in reversed(numbers)
        ]
    )
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(rf"{INNER}\d[A-Z]"), "isolated")]
    )
    words.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix=INNER, cleanup=False), decoders.Replace(Regex(r"\d(?=[A-Z])"), "")]
    )
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
