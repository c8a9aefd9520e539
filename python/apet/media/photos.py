"""Photos and animations."""

from __future__ import annotations

from typing import BinaryIO

from .frames import Media


def read(file: BinaryIO, name: str, count: int) -> Media | None:
    """A photo, or `count` frames of an animation; None if it is in no format of photos.

    Raises: Refused, if it is damaged, or needs a package that is not installed.
    """
    raise NotImplementedError
