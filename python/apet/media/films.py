"""Films."""

from __future__ import annotations

from typing import BinaryIO

from .frames import Media


def read(file: BinaryIO, name: str, count: int) -> Media:
    """`count` frames of a film. Raises: Refused, if it is none, or no frame of it can be decoded."""
    raise NotImplementedError
