"""Makes films and photos for the tests of media. Frame i is grey of level `level(i)`, so it can be recognised."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from apet import ApetError, media
from PIL import Image

av = pytest.importorskip("av")

WIDE, HIGH = 64, 48


def level(number: int) -> int:
    return 20 + 8 * number


def number(picture: Image.Image) -> int:
    """Returns the number of the frame in a picture."""
    return round((float(np.asarray(picture, np.float64).mean()) - 20) / 8)


def numbers(clip: media.Media) -> list[int]:
    return [number(picture) for picture in clip.frames]


def grey(i: int, size: tuple[int, int] = (WIDE, HIGH)) -> np.ndarray:
    return np.full((size[1], size[0], 3), level(i), np.uint8)


def film(
    pictures: Sequence[np.ndarray],
    kind: str = "mp4",
    codec: str = "mpeg4",
    pixels: str = "yuv420p",
    starts: Sequence[int] | None = None,
    aspect: Fraction | None = None,
    options: dict[str, str] | None = None,
) -> bytes:
    """Makes a film with 10 frames a second, or with frames at these hundredths of a second."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind, options=options or {}) as container:
        stream = container.add_stream(codec, rate=10 if starts is None else 100)
        stream.width, stream.height, stream.pix_fmt = pictures[0].shape[1], pictures[0].shape[0], pixels
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if starts is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if starts is not None:
                frame.pts, frame.time_base = starts[i], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def read(data: bytes, count: int = 4) -> media.Media:
    return media.decode(io.BytesIO(data), "file", count)


def rejected(data: bytes, count: int = 4) -> str:
    with pytest.raises(ApetError) as error:
        read(data, count)
    return str(error.value)


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()
