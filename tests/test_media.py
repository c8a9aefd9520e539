"""Films: every kind is read as a player shows it, with the times of its frames; damaged files raise errors.

films.py makes all files.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from apet.media import frames
from PIL import Image

from tests.films import HIGH, WIDE, film, grey, numbers, read, rejected

av = pytest.importorskip("av")

# --- the choice of frames


def seconds(*times: float) -> list[Fraction]:
    return [Fraction(str(time)) for time in times]


def test_frames_are_those_on_screen_in_the_middles_of_equal_spans() -> None:
    ten = seconds(*(i / 10 for i in range(10)))
    assert frames.choose(ten, Fraction(1), 2) == [(2, 0.2), (7, 0.7)]
    assert frames.choose(ten, Fraction(1), 5) == [(i, i / 10) for i in (1, 3, 5, 7, 9)]
    assert (
        frames.choose(ten, Fraction(1), 10) == frames.choose(ten, Fraction(1), 99) == [(i, i / 10) for i in range(10)]
    )


def test_frames_are_chosen_evenly_in_time() -> None:
    """One picture for 0.9 seconds, then ten in the last tenth: frames are chosen evenly in time, not by number."""
    starts = seconds(0, *(9 + i / 10 for i in range(10)))
    assert frames.choose(starts, Fraction(10), 5) == [(0, 0.0), (0, 3.0), (0, 5.0), (0, 7.0), (1, 9.0)]


def test_times_begin_at_zero_and_never_descend() -> None:
    step = Fraction(1, 10)
    assert frames.timeline(seconds(1.4, 1.5, 1.7), step) == seconds(0, 0.1, 0.3)
    assert frames.timeline([None, None, None], step) == seconds(0, 0.1, 0.2)
    assert frames.timeline([*seconds(5, 5.1), None], step) == seconds(0, 0.1, 0.2)
    assert frames.timeline(seconds(5, 5.5, 0, 0.5), step) == seconds(0, 0.5, 0.6, 1.1)  # a clock that starts again


# --- films

KINDS = [
    ("mp4", "mpeg4", "yuv420p"),
    ("matroska", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"),
    ("avi", "mjpeg", "yuvj420p"),
    ("mpegts", "mpeg2video", "yuv420p"),  # its times begin at 1.4 s
    ("h264", "libx264", "yuv420p"),  # it has no times
    ("flv", "flv", "yuv420p"),
    ("mov", "prores", "yuv422p10le"),
]


@pytest.mark.parametrize(("kind", "codec", "pixels"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_kinds_of_film(kind: str, codec: str, pixels: str) -> None:
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV cannot write {codec}")
    clip = read(film([grey(i) for i in range(12)], kind, codec, pixels), 3)
    assert numbers(clip) == [2, 6, 10]
    assert clip.is_clip
    assert (clip.total, clip.notes, clip.size) == (12, [], (WIDE, HIGH))
    assert clip.times == pytest.approx([0.2, 0.6, 1.0])
    assert clip.seconds == pytest.approx(1.2)


def test_frames_are_even_in_time_under_a_variable_frame_rate() -> None:
    starts = [2 * i if i < 15 else 100 * (i - 14) for i in range(25)]  # fifteen in the first second, then one a second
    clip = read(film([grey(i) for i in range(25)], starts=starts), 5)
    assert clip.times == [1.0, 3.0, 5.0, 7.0, 9.0]
    assert numbers(clip) == [15, 17, 19, 21, 23]
    assert clip.total == 25


TURNS: dict[str, tuple[tuple[int, int, int, int], Callable[[np.ndarray], np.ndarray]]] = {
    "as it is": ((1, 0, 0, 1), lambda x: x),
    "a quarter clockwise": ((0, 1, -1, 0), lambda x: np.rot90(x, -1)),
    "a half": ((-1, 0, 0, -1), lambda x: np.rot90(x, 2)),
    "a quarter anticlockwise": ((0, -1, 1, 0), np.rot90),
    "mirrored": ((-1, 0, 0, 1), np.fliplr),
    "upside down": ((1, 0, 0, -1), np.flipud),
    "transposed": ((0, 1, 1, 0), lambda x: np.transpose(x, (1, 0, 2))),
    "transversed": ((0, -1, -1, 0), lambda x: np.rot90(np.transpose(x, (1, 0, 2)), 2)),
}


@pytest.fixture(scope="module")
def sideways() -> bytes:
    """Makes a film whose display matrix can be replaced."""
    return film([corner()] * 3)


def corner() -> np.ndarray:
    picture = np.zeros((HIGH, WIDE, 3), np.uint8)
    picture[: HIGH // 2, : WIDE // 4] = 255
    return picture


@pytest.mark.parametrize("name", list(TURNS))
def test_clips_are_turned_as_their_display_matrix_says(name: str, sideways: bytes) -> None:
    (a, b, c, d), turned = TURNS[name]
    one = 1 << 16
    matrix, plain = (
        struct.pack(">9i", *m, 0, 0, 1 << 30)
        for m in ((a * one, b * one, 0, c * one, d * one, 0), (one, 0, 0, 0, one, 0))
    )
    at = sideways.index(plain, sideways.index(b"tkhd"))
    clip = read(sideways[:at] + matrix + sideways[at + len(matrix) :], 1)
    expected = turned(corner())
    assert clip.size == (expected.shape[1], expected.shape[0])
    assert np.abs(np.asarray(clip.frames[0], float) - expected).mean() < 8


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(3, 2), (96, 48)), (Fraction(1, 2), (64, 96))])
def test_pixels_that_are_not_square_are_made_square(aspect: Fraction, size: tuple[int, int]) -> None:
    assert read(film([grey(1)] * 3, aspect=aspect), 1).size == size


def packets(data: bytes) -> list[tuple[int, int]]:
    with av.open(io.BytesIO(data)) as file:
        return [(packet.pos, packet.size) for packet in file.demux(video=0) if packet.size]


def test_a_damaged_packet_is_skipped_and_counted() -> None:
    data = bytearray(film([grey(i) for i in range(20)], "mov", "mjpeg", "yuvj420p"))
    for which, (at, size) in enumerate(packets(bytes(data))):
        if which in (3, 12):
            data[at : at + size] = bytes(size)
    clip = read(bytes(data), 4)
    assert clip.notes == ["2 damaged packets skipped"]
    assert clip.total == 18
    assert numbers(clip) == [2, 7, 11, 17]
    assert clip.times == pytest.approx([0.2, 0.7, 1.1, 1.7])  # the undamaged frames keep their times


def test_a_clip_without_a_sound_frame_is_rejected() -> None:
    data = bytearray(film([grey(i) for i in range(3)], "mov", "mjpeg", "yuvj420p"))
    for at, size in packets(bytes(data)):
        data[at : at + size] = bytes(size)
    assert "no frame of the video file can be decoded" in rejected(bytes(data))


def test_a_clip_that_is_cut_off_is_read_up_to_there() -> None:
    whole = film([np.random.default_rng(i).integers(0, 255, (HIGH, WIDE, 3), np.uint8) for i in range(20)], "matroska")
    at, size = packets(whole)[12]
    clip = read(whole[: at + size // 2], 99)
    assert 11 <= clip.total <= 13
    assert numbers(clip) == numbers(read(whole, 99))[: clip.total]
    index = film([grey(i) for i in range(20)])  # the index is at its end
    assert "file" in rejected(index[: len(index) // 2])


def song() -> bytes:
    """Makes an MP3 with a cover in its tag."""
    cover, sound = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(cover, "PNG")
    with av.open(sound, "w", format="mp3") as file:
        stream = file.add_stream("mp3", rate=44100)
        for i in range(10):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1152), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, 1152 * i
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    picture = b"\0image/png\0\3\0" + cover.getvalue()
    tag = b"APIC" + struct.pack(">I", len(picture)) + b"\0\0" + picture
    size = len(tag)
    return (
        b"ID3\3\0\0" + bytes([size >> 21 & 127, size >> 14 & 127, size >> 7 & 127, size & 127]) + tag + sound.getvalue()
    )


def test_a_song_with_a_cover_is_no_clip() -> None:
    assert rejected(song()) == "neither a photo nor a video: file holds sound with a cover picture"


def test_a_poster_is_not_the_film() -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        streams = [container.add_stream(codec, rate=10) for codec in ("mjpeg", "mpeg4")]
        for stream, wide, kind in zip(streams, (32, WIDE), ("yuvj420p", "yuv420p"), strict=True):
            stream.width, stream.height, stream.pix_fmt = wide, HIGH, kind
        for stream, wide, count in zip(streams, (32, WIDE), (1, 12), strict=True):
            for i in range(count):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(grey(i, (wide, HIGH)), format="rgb24")))
            container.mux(stream.encode(None))
    clip = read(file.getvalue(), 3)
    assert (clip.size, numbers(clip), clip.total) == ((WIDE, HIGH), [2, 6, 10], 12)


# --- photos and animations


# --- sources
