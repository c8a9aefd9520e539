"""Reads and encodes the files of the page, once for all users."""

from __future__ import annotations

import base64
import io
import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apet import ApetError, media

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from apet.encoders import Encoder

REMEMBERED = 32  # files; the tokens of eight frames of 576 x 384 take 7 MB
MOST_PIXELS = 80_000_000  # of a photo, which takes three bytes for each pixel while it is read
MOST_TOKENS = 4096  # of an image: more would be too small to draw or to see
PATCH = 28  # pixels of the photo on the page to an edge of a patch
SEEN = 14  # pixels to an edge of a patch in the picture whose patches are averaged


@dataclass(frozen=True, eq=False)
class Encoded:
    """A photo, or frames of a clip, as the page needs them. It is shared, so it must not be changed."""

    name: str
    grid: tuple[int, int]  # rows and columns of patches
    tokens: torch.Tensor  # [B, N, D]
    views: list[Image.Image]  # B pictures of what the encoder sees, SEEN pixels to an edge of a patch
    photos: list[str]  # the same as data URIs, PATCH pixels to an edge of a patch
    times: list[float]  # seconds into the clip; [] for a photo


class Files:
    """Reads and encodes files. Threads may share it: a file is read once even if several threads ask for it at the same
    time, and a request for a file that is known does not wait for another file."""

    def __init__(self, encoder: Encoder, frames: int) -> None:
        self.encoder = encoder
        self.frames = frames
        self._known: OrderedDict[tuple[str, int, int], Future[Encoded]] = OrderedDict()
        self._lock = threading.Lock()  # guards the dictionary
        self._encoding = threading.Lock()  # files are encoded one at a time, since each uses all cores

    def get(self, path: Path) -> Encoded:
        """Returns a file, read and encoded. Raises: ApetError, if the file cannot be read or is too large."""
        try:
            stat = path.stat()
        except OSError as error:
            raise ApetError(f"cannot read {path.name}: {error.strerror}") from error
        key = (str(path), stat.st_mtime_ns, stat.st_size)
        with self._lock:
            future = self._known.get(key)
            mine = future is None
            if future is None:
                future = self._known[key] = Future()
            self._known.move_to_end(key)
            while len(self._known) > REMEMBERED:
                self._known.popitem(last=False)
        if mine:
            try:
                future.set_result(self._read(path))
            except BaseException as error:  # also raised in the threads that wait for this file
                with self._lock:
                    self._known.pop(key, None)
                future.set_exception(error)
        return future.result()

    def _read(self, path: Path) -> Encoded:
        _check_size(path)
        found = media.read(path, self.frames)
        rows, cols = self.encoder.grid(*found.size)
        if rows * cols > MOST_TOKENS:
            raise ApetError(
                f"{path.name} would become {rows * cols} tokens, more than {MOST_TOKENS}: choose a smaller size"
            )
        with self._encoding:
            tokens = self.encoder.encode([self.encoder.view(frame) for frame in found.frames])
        large = [self.encoder.view(frame, PATCH) for frame in found.frames]
        views = [view.resize((cols * SEEN, rows * SEEN)) for view in large]
        return Encoded(path.name, (rows, cols), tokens, views, [data_uri(view) for view in large], found.times)


def data_uri(picture: Image.Image) -> str:
    """Returns a picture as a data URI that holds a JPEG."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _check_size(path: Path) -> None:
    """Rejects a photo with too many pixels from the head of its file, since decoding it takes much more memory."""
    from PIL import Image, UnidentifiedImageError

    from apet.media import photos

    most = f"more than {MOST_PIXELS // 1_000_000}: scale it down first"
    try:
        with open(path, "rb") as file, photos.opened(file) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise ApetError(
            f"{path.name} has over {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} megapixels, {most}"
        ) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return  # it is a clip, or it is damaged and reading it will raise the error
    if width * height > MOST_PIXELS:
        raise ApetError(f"{path.name} has {width * height / 1e6:.1f} megapixels, {most}")
