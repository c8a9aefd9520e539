"""Reads photos and clips from files, pipes and addresses as RGB pictures; every failure raises one error.

docs/media.md says which files are read, how frames are chosen, and what is rejected.

| file | holds |
|---|---|
| `frames.py` | `Media`, and the choice of frames by time |
| `sources.py` | files, pipes and addresses, opened as seekable files |
| `photos.py` | photos and animations, by Pillow and pillow-heif |
| `films.py` | films, by PyAV |
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from . import films, photos, sources
from .frames import Media
from .sources import is_address, is_file, shown, stem

__all__ = ["Media", "decode", "is_address", "is_file", "read", "shown", "stem"]


def read(source: str | Path, frames: int) -> Media:
    """Reads a photo, or `frames` frames of a clip, evenly spaced in time.

    Args:
        source: a path, "-" (standard input), or an address that begins with http:// or https://.
        frames: number of frames taken from a clip; a clip with no more than that gives all of them.

    Raises: ApetError if the source cannot be opened, is neither a photo nor a clip, or is damaged.
    """
    with sources.opened(source) as file:
        return decode(file, shown(source), frames)


def decode(file: BinaryIO, name: str, frames: int) -> Media:
    """Reads a photo or clip from an open seekable file, for example `io.BytesIO` of an upload. name: for errors."""
    sources.reject_text(file, name)
    return photos.read(file, name, frames) or films.read(file, name, frames)
