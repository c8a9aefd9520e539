"""Photos and clips from files, as RGB pictures; a file that cannot be read raises one error."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from apet import Refused
from apet.hub import first_line, need

if TYPE_CHECKING:
    from PIL import Image


@dataclass
class Media:
    """One file: a photo (one frame) or a clip (several, all of one size)."""

    path: Path
    frames: list[Image.Image]
    times: list[float]  # seconds into the clip; [] for a photo

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames[0].size


def read(path: Path, frames: int) -> Media:
    """A photo, or `frames` evenly spaced frames of a clip.

    Raises: Refused where the file is missing, is neither, or is damaged.
    """
    if path.exists() and not path.is_file():  # opening a named pipe would wait for a writer
        raise Refused(f"not a file: {path}")
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise Refused(f"the file is empty: {path}")
    except OSError as error:
        raise Refused(f"cannot read {path}: {error.strerror}") from error
    photo = _photo(path)
    return Media(path, [photo], []) if photo is not None else _clip(path, frames)


def _photo(path: Path) -> Image.Image | None:
    """An RGB photo, upright, transparency on white; None if PIL does not know the format."""
    need("PIL")
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about odd metadata and sizes are not for this command's user
            with Image.open(path) as image:
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError:
        return None
    except Exception as error:  # PIL's decoders raise many kinds for a damaged file
        raise Refused(f"cannot read the photo {path}: {first_line(error)}") from error


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # 16- and 32-bit grey: PIL would clip it to white
        import numpy as np

        grey = np.asarray(image, np.float64)
        low, high = float(np.nanmin(grey)), float(np.nanmax(grey))
        grey = np.nan_to_num((grey - low) / (high - low or 1.0) * 255)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _clip(path: Path, count: int) -> Media:
    """`count` evenly spaced frames, the middle frames of equal segments; all frames if the clip has no more."""
    av = need("av")
    try:
        with av.open(str(path)) as file:
            if not file.streams.video:
                raise Refused(f"neither a photo nor a video: {path}")
            total = sum(1 for _ in file.decode(video=0))  # containers often state no count, or a wrong one
        wanted = sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
        frames, times = [], []
        with av.open(str(path)) as file:
            for position, frame in enumerate(file.decode(video=0)):
                if position in wanted:
                    frames.append(frame.to_image().convert("RGB"))
                    times.append(float(frame.time or 0.0))
    except av.error.InvalidDataError as error:
        raise Refused(f"neither a photo nor a video, or damaged: {path}") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise Refused(f"cannot read the video {path}: {first_line(error)}") from error
    if not frames:
        raise Refused(f"the video {path} has no frames")
    return Media(path, [f.resize(frames[0].size) if f.size != frames[0].size else f for f in frames], times)
