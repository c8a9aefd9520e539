"""Asks a vision-language model about the photo or clip on the page, with all tokens and with the kept ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import apet
from apet import ApetError, media, models
from apet.explore.settings import METHODS, Settings
from apet.hub import first_line


@dataclass(frozen=True)
class Answer:
    title: str
    text: str


class Asker:
    """A model that answers one question at a time, for all users. It is patched for each answer and restored
    afterwards.

    Raises: ApetError, if it cannot be loaded.
    """

    def __init__(self, model: str, frames: int, max_new_tokens: int, dtype: str, device: str | None) -> None:
        self.name, self._frames, self._length = model, frames, max_new_tokens
        self._model, self._processor = models.load(model, [{"keep": Settings().keep}], dtype, device)
        self._one = threading.Lock()  # held while the model is patched or generates

    def ask(self, path: Path, prompt: str, settings: Sequence[Settings]) -> Iterator[Answer]:
        """Yields the answer with all tokens, then that of each setting. The model sees all frames of a clip.

        Raises: ApetError, if the file, the prompt or a setting does not fit the model.
        """
        if not prompt.strip():
            raise ApetError("the question is empty")
        found = media.read(path, self._frames)
        photos, clip = ([], found) if found.is_clip else (found.frames, None)
        inputs = models.question(self._model, self._processor, prompt, photos, clip)
        yield Answer("All tokens", self._answer(inputs))
        for one in settings:
            if one.method == "apet":
                yield self._compressed(inputs, one)
            else:
                yield Answer(str(one), f"(the model can be compressed with ApET, not with {METHODS[one.method]!r})")

    def _compressed(self, inputs: dict[str, Any], one: Settings) -> Answer:
        try:
            with (
                self._one,
                apet.patched(
                    self._model,
                    keep=one.keep,
                    basis=one.own_basis,
                    layout=one.layout,
                    select=one.select,
                    refine=one.refine,
                ),
            ):
                text = self._generate(inputs)
                counts = [[seen.tokens, *map(len, seen.remaining)] for seen in apet.kept(self._model).visuals]
        except ValueError as error:
            raise ApetError(f"{one}: {first_line(error)}") from error
        tokens = " + ".join(" → ".join(map(str, of)) for of in counts)
        return Answer(f"{one}: {tokens} visual tokens", text)

    def _answer(self, inputs: dict[str, Any]) -> str:
        with self._one:
            return self._generate(inputs)

    def _generate(self, inputs: dict[str, Any]) -> str:
        try:
            return models.answer(self._model, self._processor, inputs, self._length, show=False).strip()
        except RuntimeError as error:  # no memory
            raise ApetError(first_line(error)) from error
