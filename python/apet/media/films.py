"""Reads films by PyAV: finds the stream of the film, and takes frames by time, upright and with square pixels."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any, BinaryIO

from apet import ApetError
from apet.hub import first_line, need

from .frames import MOST_PIXELS, Media, choose, timeline

if TYPE_CHECKING:
    from PIL import Image

# The demuxers of ffmpeg that read films. Others render text, or open the files and addresses that a playlist names.
FILMS = (
    *("3gp", "asf", "avi", "dv", "flv", "h264", "hevc", "ivf", "m4v", "matroska", "mjpeg", "mov", "mp4", "mpeg"),
    *("mpegts", "mpegvideo", "mxf", "nut", "obu", "av1", "ogg", "rm", "webm", "yuv4mpegpipe"),
)
SOUND = ("aac", "flac", "mp3", "wav")  # opened only to say in the error that the file holds sound
OPTIONS = {"format_whitelist": ",".join(FILMS + SOUND), "protocol_whitelist": "none"}

# How a display matrix maps (x, y) in the coded picture to (a x + c y, b x + d y) on screen -> Pillow's operation.
UPRIGHT = {
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): "ROTATE_270",  # Pillow counts anticlockwise
    (-1, 0, 0, -1): "ROTATE_180",
    (0, -1, 1, 0): "ROTATE_90",
    (-1, 0, 0, 1): "FLIP_LEFT_RIGHT",
    (1, 0, 0, -1): "FLIP_TOP_BOTTOM",
    (0, 1, 1, 0): "TRANSPOSE",
    (0, -1, -1, 0): "TRANSVERSE",
}


def read(file: BinaryIO, name: str, count: int) -> Media:
    """Reads `count` frames of a film. Raises: ApetError, if it is no film, or no frame of it can be decoded."""
    av = need("av", "demo", "a clip")
    try:
        with _opened(av, file) as container:
            index = _film(container, name)
        decoder = _Decoder(av, file, index)
        starts, lasts = [], Fraction(0)
        for frame in decoder.frames():
            starts.append(None if frame.pts is None else frame.pts * frame.time_base)
            lasts = (frame.duration or 0) * frame.time_base
        if not starts:
            raise ApetError(f"no frame of the video {name} can be decoded{decoder.because}")
        step = lasts or decoder.step
        times = timeline(starts, step)
        end = times[-1] + step
        chosen = choose(times, end, count)
        notes = decoder.notes(float(end))
        found = _pictures(decoder, {number for number, _ in chosen})
    except av.error.InvalidDataError as error:
        raise ApetError(f"neither a photo nor a video, or damaged: {name}") from error
    except (av.error.FFmpegError, OSError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EINVAL:  # a format that is not among the films
            raise ApetError(f"neither a photo nor a video: {name}") from error
        raise ApetError(f"cannot read the video {name}: {first_line(error)}") from error
    size = found[chosen[0][0]].size
    frames = [found[number] if found[number].size == size else found[number].resize(size) for number, _ in chosen]
    return Media(name, frames, [time for _, time in chosen], len(times), float(end), notes)


@contextmanager
def _opened(av: Any, file: BinaryIO) -> Iterator[Any]:
    file.seek(0)
    with av.open(file, container_options=OPTIONS, metadata_errors="replace") as container:
        yield container


def _film(container: Any, name: str) -> int:
    """Returns the index of the film among the streams: of those with several frames, the one that lasts longest.

    Raises: ApetError, if there is none.
    """
    from av.stream import Disposition

    still = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
    films = [stream for stream in container.streams.video if not stream.disposition & still]
    if not films:
        what = "sound" if container.streams.audio else "no video"
        cover = " with a cover picture" if container.streams.video else ""
        raise ApetError(f"neither a photo nor a video: {name} holds {what}{cover}")
    if len(films) == 1:
        return films[0].index
    packets = dict.fromkeys((stream.index for stream in films), 0)
    last = dict.fromkeys(packets, Fraction(0))
    for packet in container.demux(films):
        if packet.size and packet.pts is not None:
            packets[packet.stream_index] += 1
            last[packet.stream_index] = max(last[packet.stream_index], packet.pts * packet.time_base)
    return max(packets, key=lambda index: (packets[index] > 1, last[index], packets[index], -index))


class _Decoder:
    """Decodes one stream of a file, any number of times with the same frames; counts the damaged ones that it skips."""

    def __init__(self, av: Any, file: BinaryIO, index: int):
        self.av, self.file, self.index = av, file, index
        self.step = Fraction(1, 25)  # between frames, where the file does not say how long one lasts
        self.aspect = Fraction(1)  # width of a pixel / its height
        self.skipped = 0  # damaged packets or frames, in the latest round
        self.cause: Exception | None = None  # the error of the first one
        self.cut: Exception | None = None  # the error after which nothing could be read

    def frames(self) -> Iterator[Any]:
        """Yields the undamaged frames, in the order in which they are shown."""
        self.skipped, self.cause, self.cut = 0, None, None
        with _opened(self.av, self.file) as container:
            stream = container.streams[self.index]
            if stream.width * stream.height > MOST_PIXELS:
                raise ValueError(f"its {stream.width} x {stream.height} pixels are more than {MOST_PIXELS}")
            rate = stream.guessed_rate or stream.average_rate
            self.step = 1 / rate if rate else self.step
            self.aspect = stream.sample_aspect_ratio or Fraction(1)
            packets = container.demux(stream)
            while (packet := self._next(packets)) is not None:
                try:
                    decoded = packet.decode()
                except self.av.error.EOFError:
                    return
                except self.av.error.FFmpegError as error:
                    self._skip(error)
                    continue
                for frame in decoded:
                    if frame.is_corrupt:
                        self._skip(None)
                    else:
                        yield frame

    def _next(self, packets: Iterator[Any]) -> Any:
        try:
            return next(packets, None)
        except self.av.error.FFmpegError as error:
            self.cut = error
            return None

    def _skip(self, error: Exception | None) -> None:
        self.skipped += 1
        self.cause = self.cause or error

    @property
    def because(self) -> str:
        """The cause of the first damage, as the end of a message."""
        cause = self.cause or self.cut
        return f": {first_line(cause)}" if cause else ""

    def notes(self, seconds: float) -> list[str]:
        """Returns messages about what was skipped in the latest round."""
        notes = []
        if self.skipped:
            notes.append(f"{self.skipped} damaged packet{'s' if self.skipped > 1 else ''} skipped")
        if self.cut is not None:
            notes.append(f"the file is cut off or damaged after {seconds:.2f} s: {first_line(self.cut)}")
        return notes


def _pictures(decoder: _Decoder, wanted: set[int]) -> dict[int, Image.Image]:
    """Returns the frames of these numbers, as they are shown."""
    found: dict[int, Image.Image] = {}
    for number, frame in enumerate(decoder.frames()):
        if number in wanted:
            found[number] = _upright(frame, decoder.aspect)
            if len(found) == len(wanted):
                break
    return found


def _upright(frame: Any, aspect: Fraction) -> Image.Image:
    from PIL import Image

    picture = frame.to_image().convert("RGB")
    if aspect > 1:
        picture = picture.resize((round(picture.width * aspect), picture.height))
    elif 0 < aspect < 1:
        picture = picture.resize((picture.width, round(picture.height / aspect)))
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix))
    turn = max(UPRIGHT, key=lambda to: a * to[0] + b * to[1] + c * to[2] + d * to[3])  # the nearest quarter turn
    operation = UPRIGHT[turn]
    return picture if operation is None else picture.transpose(Image.Transpose[operation])
