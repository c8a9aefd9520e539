"""What an answer is worth, by three rules that the data sets' own evaluations follow.

- exact: 1 where the answer equals one of those given, but for case, spaces and a full stop at the end (GQA).
- vqa: the share of people who would agree, with answers normalised and scored as in the VQA challenge (VQAv2, TextVQA,
  VizWiz): leave out each given answer in turn, count how many of the others equal the answer, at most 3 of 3; the mean.
- pope: whether yes or no was meant, as POPE reads it: "no" where the first sentence holds "no" or "not", else "yes".
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from apet import Refused
from apet.evaluation.questions import Question

AGREEING = 3  # people who make an answer right

# Spelled without its apostrophes, a contraction gets them back, unless it is another word then (ill, shell, were).
# fmt: off
CONTRACTIONS = (
    "ain't", "aren't", "can't", "could've", "couldn't", "couldn't've", "didn't", "doesn't", "don't", "hadn't",
    "hadn't've", "hasn't", "haven't", "he'd've", "he's", "how'd", "how'll", "how's", "i'd've", "i'm", "i've",
    "isn't", "it'd", "it'd've", "it'll", "ma'am", "mightn't", "mightn't've", "might've", "mustn't", "must've",
    "needn't", "not've", "o'clock", "oughtn't", "shan't", "she'd've", "should've", "shouldn't", "shouldn't've",
    "somebody'd", "somebody'd've", "somebody'll", "somebody's", "someone'd", "someone'd've", "someone'll",
    "someone's", "something'd", "something'd've", "something'll", "that's", "there'd", "there'd've", "there're",
    "there's", "they'd", "they'd've", "they'll", "they're", "they've", "'twas", "wasn't", "we'd've", "we've",
    "weren't", "what'll", "what're", "what's", "what've", "when's", "where'd", "where's", "where've", "who'd",
    "who'd've", "who'll", "who's", "who've", "why'll", "why're", "why's", "won't", "would've", "wouldn't",
    "wouldn't've", "y'all", "y'all'll", "y'all'd've", "you'd", "you'd've", "you'll", "you're", "you've",
)
# fmt: on
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'


def _spellings(word: str) -> set[str]:
    """A contraction without some or all of its apostrophes."""
    parts = word.split("'")
    joints = itertools.product(("'", ""), repeat=len(parts) - 1)
    return {"".join(itertools.chain(*zip(parts, (*joint, ""), strict=True))) for joint in joints} - {word}


RESPELLED = {spelling: word for word in CONTRACTIONS for spelling in _spellings(word)}


def plain(text: str) -> str:
    """Small letters, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def consensus(text: str) -> str:
    """As the VQA challenge normalises an answer: no punctuation, articles or spelled-out numbers, contractions with
    their apostrophes."""
    text = " ".join(text.lower().split())
    comma_in_number = re.search(r"\d,\d", text) is not None
    given = text
    for sign in PUNCTUATION:
        beside_space = f"{sign} " in given or f" {sign}" in given
        text = text.replace(sign, "" if beside_space or comma_in_number else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = (NUMBERS.get(word, word) for word in text.split())
    return " ".join(RESPELLED.get(word, word) for word in words if word not in ARTICLES)


def yes_or_no(text: str) -> str:
    """What POPE takes an answer for."""
    words = text.partition(".")[0].replace(",", "").lower().split()
    return "no" if {"no", "not"} & set(words) else "yes"


def _exact(answer: str, answers: Sequence[str]) -> float:
    return float(answer in answers)


def _consensus(answer: str, answers: Sequence[str]) -> float:
    same = sum(a == answer for a in answers)
    right = sum(min((same - (a == answer)) / AGREEING, 1.0) for a in answers)
    return right / len(answers)


@dataclass(frozen=True)
class Metric:
    """read: the text of an answer as it is compared; score: of an answer that was read, against those given, read too.

    least: answers that a question needs; only: the answers that may be given, empty for any.
    """

    name: str
    read: Callable[[str], str]
    score: Callable[[str, Sequence[str]], float]
    least: int = 1
    only: tuple[str, ...] = ()

    def worth(self, answer: str, question: Question) -> float:
        """0 to 1."""
        return self.score(self.read(answer), [self.read(a) for a in question.answers])

    def check(self, questions: Sequence[Question]) -> None:
        """Raises: Refused, with file and line, where a question cannot be scored so."""
        for question in questions:
            if len(question.answers) < self.least:
                raise Refused(
                    f"{question.where}: metric {self.name} needs at least {self.least} answers, this question has "
                    f"{len(question.answers)}"
                )
            for answer in question.answers:
                if self.only and plain(answer) not in self.only:
                    raise Refused(f"{question.where}: metric {self.name} knows no answer {answer!r}")
            if self.only and len(question.answers) > 1:
                raise Refused(f"{question.where}: metric {self.name} wants one answer, not {len(question.answers)}")


METRICS = {
    metric.name: metric
    for metric in (
        Metric("exact", plain, _exact),
        Metric("vqa", consensus, _consensus, least=AGREEING + 1),
        Metric("pope", yes_or_no, _exact, only=("yes", "no")),
    )
}


def f1(answered: Sequence[str], right: Sequence[str]) -> float:
    """Of "yes"; 0 where nothing was rightly answered so."""
    both = sum(a == r == "yes" for a, r in zip(answered, right, strict=True))
    either = sum(a == "yes" for a in answered) + sum(r == "yes" for r in right)
    return 2 * both / either if either else 0.0
