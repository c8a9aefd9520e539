"""Reads photos and animations, by Pillow, and by pillow-heif for HEIC. The file's contents decide, not its name."""

from __future__ import annotations

import warnings
from fractions import Fraction
from itertools import accumulate
from typing import TYPE_CHECKING, Any, BinaryIO

from apet import ApetError
from apet.hub import first_line, need

from .frames import MOST_PIXELS, Media, choose

if TYPE_CHECKING:
    from PIL import Image

# Pillow knows more formats. Left out are those that it passes to other programs (EPS), those without a signature by
# which a file is recognised (TGA), and films (MPEG).
FORMATS = (
    *("AVIF", "BMP", "DDS", "FLI", "GIF", "ICO", "JPEG", "JPEG2000", "PCX", "PNG", "PPM", "PSD", "QOI", "SGI", "TIFF"),
    "WEBP",
)
ANIMATIONS = ("AVIF", "FLI", "GIF", "PNG", "WEBP")  # here several frames are a clip; in other formats pages or views
HEIC = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
AVIF = {b"avif", b"avis"}
UNSET = 10  # milliseconds: a frame with this duration or less is shown for 100, as in browsers


def read(file: BinaryIO, name: str, count: int) -> Media | None:
    """Reads a photo, or `count` frames of an animation; returns None if the format is not one of photos.

    Raises: ApetError, if it is damaged, or needs a package that is not installed.
    """
    need("PIL")
    from PIL import UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about odd metadata and sizes are not for this command's user
            with opened(file) as image:
                if image.format in ANIMATIONS and getattr(image, "n_frames", 1) > 1 + _stand_in(image):
                    return _animation(image, name, count)
                return _photo(image, name)
    except UnidentifiedImageError:
        if _brands(file) & AVIF:
            raise ApetError(
                f"{name} is an AVIF photo, which needs Pillow 11.3 or newer: pip install -U pillow"
            ) from None
        file.seek(0)
        return None
    except ApetError:
        raise
    except Exception as error:  # decoders raise many kinds for a damaged file
        raise ApetError(f"cannot read the photo {name}: {first_line(error)}") from error


def opened(file: BinaryIO) -> Image.Image:
    """Opens a photo or an animation, of which only the head is read.

    Raises: PIL.UnidentifiedImageError, if the format is not one of photos; ApetError, if it needs a package that is not
    installed; other errors for a damaged head, and for more than `MOST_PIXELS`.
    """
    from PIL import Image

    if _brands(file) & HEIC:
        image: Image.Image = need("pillow_heif", "heif", "a HEIC photo").HeifImageFile(file)
        width, height = image.size
        if width * height > MOST_PIXELS:  # Pillow checks what it opens itself
            raise Image.DecompressionBombError(f"its {width} x {height} pixels are more than {MOST_PIXELS}")
        return image
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]  # older releases of Pillow lack some
    return Image.open(file, formats=known)


def _brands(file: BinaryIO) -> set[bytes]:
    """Returns the brands in the header of a file of the ISO family (MP4, HEIC, AVIF)."""
    file.seek(0)
    head = file.read(256)
    file.seek(0)
    if head[4:8] != b"ftyp":
        return set()
    end = int.from_bytes(head[:4], "big")
    return {head[8:12]} | {head[at : at + 4] for at in range(16, min(end, len(head)), 4)}


def _stand_in(image: Any) -> int:
    """Returns 1 if the first frame of an APNG is only a replacement for programs that show no animations."""
    return int(getattr(image, "default_image", False))


def _photo(image: Image.Image, name: str) -> Media:
    from PIL import ImageOps

    pages = getattr(image, "n_frames", 1)
    image.load()
    notes = []
    if pages > 1 and image.format == "TIFF":
        notes.append(f"only the first of {pages} pages was read")
    return Media(name, [_rgb(ImageOps.exif_transpose(image))], notes=notes)


def _animation(image: Any, name: str, count: int) -> Media:
    """Reads one round of an animation."""
    first, notes = _stand_in(image), []
    lasts: list[Fraction] = []  # milliseconds that each frame is on screen
    for number in range(first, image.n_frames):
        try:
            image.seek(number)
            image.load()
        except Exception as error:  # decoders raise many kinds for a damaged file
            if not lasts:
                raise
            notes.append(f"damaged after frame {len(lasts)}, the rest was skipped: {first_line(error)}")
            break
        duration = Fraction(image.info.get("duration") or 0)
        lasts.append(duration if duration > UNSET else Fraction(100))
    starts = [time / 1000 for time in accumulate(lasts, initial=Fraction(0))]
    chosen = choose(starts[:-1], starts[-1], count)
    frames = []
    for number, _ in chosen:
        image.seek(first + number)
        frames.append(_rgb(image.copy()))
    return Media(name, frames, [time for _, time in chosen], len(lasts), float(starts[-1]), notes)


def _rgb(image: Image.Image) -> Image.Image:
    """Converts to RGB. Transparency is put on white; grey of 16 or 32 bits is scaled from its darkest to its lightest
    value."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):  # PIL would clip it to white
        import numpy as np

        grey = np.asarray(image, np.float64)
        low, high = float(np.nanmin(grey)), float(np.nanmax(grey))
        grey = np.nan_to_num((grey - low) / (high - low or 1.0) * 255)
        image = Image.fromarray(grey.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
