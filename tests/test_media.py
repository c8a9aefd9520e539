"""Photos and clips: every source is read as it is shown, frames at their times, and what is neither is rejected.

Every file is made here. Frame i of a clip is grey of level `level(i)`, so that a test sees which frames were taken.
"""

from __future__ import annotations

import http.server
import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from apet import ApetError, media
from apet.media import frames, sources
from PIL import Image

av = pytest.importorskip("av")

WIDE, HIGH = 64, 48
Image.init()
without_avif = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow knows no AVIF")


def level(number: int) -> int:
    return 20 + 8 * number


def number(picture: Image.Image) -> int:
    """Of the frame that this is."""
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
    """A film of 10 frames a second, or with frames at these hundredths of a second."""
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


# --- which frames


def seconds(*times: float) -> list[Fraction]:
    return [Fraction(str(time)) for time in times]


def test_frames_are_those_on_screen_in_the_middles_of_equal_spans() -> None:
    ten = seconds(*(i / 10 for i in range(10)))
    assert frames.choose(ten, Fraction(1), 2) == [(2, 0.2), (7, 0.7)]
    assert frames.choose(ten, Fraction(1), 5) == [(i, i / 10) for i in (1, 3, 5, 7, 9)]
    assert (
        frames.choose(ten, Fraction(1), 10) == frames.choose(ten, Fraction(1), 99) == [(i, i / 10) for i in range(10)]
    )


def test_a_frame_that_stays_is_taken_again_at_the_middles_of_its_stay() -> None:
    """Nine tenths of a second of one picture, then ten in the last: even in time, not in number."""
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
    ("mpegts", "mpeg2video", "yuv420p"),  # its clock begins at 1.4 s
    ("h264", "libx264", "yuv420p"),  # has no times
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
    """A film whose display matrix can be replaced."""
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
    assert clip.times == pytest.approx([0.2, 0.7, 1.1, 1.7])  # what is there keeps its time


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
    """An MP3 with a cover in its tag."""
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


def saved(picture: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def test_photos_are_turned_as_their_exif_says() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    photo = read(saved(Image.new("RGB", (40, 20)), "JPEG", exif=exif))
    assert (photo.size, photo.is_clip, photo.total) == ((20, 40), False, 1)


def colours(count: int) -> list[Image.Image]:
    return [Image.fromarray(grey(i)) for i in range(count)]


ANIMATIONS = {
    "GIF": {"duration": [100, 200, 100, 400], "loop": 0},
    "WEBP": {"duration": [100, 200, 100, 400], "lossless": True},
    "PNG": {"duration": [100, 200, 100, 400]},
    "AVIF": {"duration": [100, 200, 100, 400], "quality": 100},
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=without_avif) if k == "AVIF" else k for k in ANIMATIONS])
def test_animations_are_clips(kind: str) -> None:
    first, *rest = colours(4)
    data = saved(first, kind, save_all=True, append_images=rest, **ANIMATIONS[kind])
    every = read(data, 9)
    assert (every.times, every.total, every.seconds) == (pytest.approx([0, 0.1, 0.3, 0.4]), 4, pytest.approx(0.8))
    assert numbers(every) == [0, 1, 2, 3]
    two = read(data, 2)  # the middles are 0.2 and 0.6 s
    assert (numbers(two), two.times) == ([1, 3], pytest.approx([0.1, 0.4]))
    assert not read(saved(first, kind, save_all=True)).is_clip  # one frame


def test_a_picture_that_stands_in_for_an_animation_is_no_frame_of_it() -> None:
    first, *rest = colours(4)
    data = saved(first, "PNG", save_all=True, append_images=rest, duration=200, default_image=True)
    clip = read(data, 9)
    assert (numbers(clip), clip.times) == ([1, 2, 3], pytest.approx([0, 0.2, 0.4]))


def test_animations_without_durations_last_a_tenth_of_a_second_each() -> None:
    first, *rest = colours(3)
    assert read(saved(first, "GIF", save_all=True, append_images=rest)).times == pytest.approx([0, 0.1, 0.2])


def test_transparency_is_put_on_white() -> None:
    clear = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read(saved(clear, "PNG")).frames[0].getpixel((0, 0)) == (255, 255, 255)


def test_pages_and_views_are_no_clip() -> None:
    first, second = colours(2)
    pages = read(saved(first, "TIFF", save_all=True, append_images=[second]))
    assert (pages.is_clip, numbers(pages), pages.notes) == (False, [0], ["only the first of 2 pages was read"])
    views = read(saved(first, "MPO", save_all=True, append_images=[second]))
    assert (views.is_clip, numbers(views)) == (False, [0])


@without_avif
def test_avif_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    data = saved(Image.new("RGB", (60, 40), "red"), "AVIF")
    assert read(data).size == (60, 40)
    monkeypatch.delitem(Image.OPEN, "AVIF")
    assert "is an AVIF photo, which needs Pillow 11.3 or newer" in rejected(data)


def test_heic_photo() -> None:
    heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = 6
    for picture, size, options in (
        (Image.new("RGB", (1200, 900), "red"), (1200, 900), {}),
        (Image.new("RGB", (120, 90), "red"), (90, 120), {"exif": exif.tobytes()}),
    ):
        file = io.BytesIO()
        heif.from_pillow(picture).save(file, **options)
        photo = read(file.getvalue())
        assert (photo.size, photo.is_clip) == (size, False)
        assert photo.frames[0].getpixel((5, 5))[0] > 200


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # importing it fails now
    head = struct.pack(">I4s4sI4s", 20, b"ftyp", b"mif1", 0, b"heic")
    assert rejected(head + bytes(100)) == 'a HEIC photo needs pillow_heif: pip install "apet-kernels[heif]"'


def test_a_photo_that_is_cut_off_is_rejected() -> None:
    data = saved(Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "PNG")
    assert "cannot read the photo file" in rejected(data[: len(data) // 2])


def test_an_animation_that_is_cut_off_is_read_up_to_there() -> None:
    noise = [Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64), np.uint8)) for i in range(4)]
    data = saved(noise[0], "GIF", save_all=True, append_images=noise[1:], duration=100)
    clip = read(data[: len(data) * 5 // 8], 9)
    assert len(clip.times) == 2 or "damaged after frame" in clip.notes[0]


# --- what is neither


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("This is a note and no video.\n" * 40, ""),
        ("\x1b[31mred\x1b[0m\n" * 40, ""),
        ("ffconcat version 1.0\nfile other.mp4\n", "a playlist"),
        ("#EXTM3U\n#EXTINF:1,\nother.mp4\n#EXT-X-ENDLIST\n", "a playlist"),
        ("<!DOCTYPE html><html><body>log in first</body></html>\n" * 20, "a web page"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        ("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ""),
        ('<?xml version="1.0"?><MPD type="static"></MPD>', ""),
        ("v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 1234 RTP/AVP 96\n", ""),
        ("\0\1\2\3" * 500, ""),
    ],
)
def test_text_and_playlists_are_rejected(text: str, kind: str) -> None:
    message = rejected(text.encode())
    assert message.startswith("neither a photo nor a video")
    assert kind in message


def test_frames_that_are_too_large_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media.films, "MOST_PIXELS", 1000)
    assert "64 x 48 pixels are more than 1000" in rejected(film([grey(0)] * 2))


# --- sources


@pytest.fixture(scope="module")
def photo() -> bytes:
    return saved(Image.new("RGB", (30, 20), "red"), "PNG")


def failed(source: str | Path) -> str:
    with pytest.raises(ApetError) as error:
        media.read(source, 4)
    return str(error.value)


def test_files_are_read_by_their_contents(photo: bytes, tmp_path: Path) -> None:
    path = tmp_path / "photo.txt"
    path.write_bytes(photo)
    assert media.read(path, 4).size == (30, 20)
    assert media.read(str(path), 4).name == str(path)
    (tmp_path / "empty.png").touch()
    assert "the file is empty" in failed(tmp_path / "empty.png")
    assert "it is a folder" in failed(tmp_path)
    assert "No such file" in failed(tmp_path / "missing.png")


def test_standard_input_and_descriptors(photo: bytes) -> None:
    code = "import sys; from apet import media; print(media.read(sys.argv[1], 2).size)"
    for source in ("-", "/dev/stdin"):
        done = subprocess.run([sys.executable, "-c", code, source], input=photo, capture_output=True, check=True)
        assert done.stdout == b"(30, 20)\n"
    for data in (photo, film([grey(i) for i in range(4)])):
        reader, writer = os.pipe()
        threading.Thread(target=lambda data=data, writer=writer: os.fdopen(writer, "wb").write(data)).start()
        assert media.read(f"/dev/fd/{reader}", 2).size in ((30, 20), (WIDE, HIGH))
        os.close(reader)


def test_named_pipe(photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(photo)).start()
    assert media.read(pipe, 2).size == (30, 20)
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    threading.Thread(target=lambda: pipe.open("wb", buffering=0).write(photo)).start()
    assert "is larger than 0 MiB" in failed(pipe)


class Server(http.server.BaseHTTPRequestHandler):
    """/photo is one; the other addresses have what a server may do wrong."""

    photo = b""
    wait = threading.Event()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path in ("/moved", "/file"):
            self.send_response(302)
            self.send_header("Location", "/photo" if path == "/moved" else "file:///etc/passwd")
            self.end_headers()
            return
        if path == "/missing" or (path == "/locked" and self.headers["Authorization"] != "Basic dXNlcjpzZWNyZXQ="):
            self.send_error(404)
            return
        self.send_response(200)
        if path == "/short":
            self.send_header("Content-Length", str(len(self.photo) + 5))
        self.end_headers()
        self.wfile.write(self.photo[:20])
        self.wfile.flush()
        if path == "/silent":
            self.wait.wait(5)
        self.wfile.write(self.photo[20:])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def address(photo: bytes) -> Iterator[str]:
    Server.photo = photo
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        Server.wait.set()
        server.shutdown()


def test_addresses(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    for path in ("/photo", "/moved"):
        assert media.read(address + path, 2).size == (30, 20)
    item = media.read(address.replace("://", "://user:secret@") + "/locked?token=secret", 2)
    assert item.name == f"{address}/locked"
    assert "the server answers 404" in failed(f"{address}/missing")
    assert "cannot download" in failed(f"{address}/file")
    assert "bytes at its end are missing" in failed(f"{address}/short")
    monkeypatch.setattr(sources, "SILENCE", 0.2)
    assert "nothing arrived for 0.2 seconds" in failed(f"{address}/silent")
    monkeypatch.setattr(sources, "PATIENCE", -1.0)
    assert "takes longer than -1 seconds" in failed(f"{address}/photo")
    monkeypatch.setattr(sources, "MOST_BYTES", 10)
    assert "is larger than 0 MiB" in failed(f"{address}/photo")


@pytest.mark.parametrize("scheme", ["file", "ftp", "concat", "data"])
def test_other_schemes_are_rejected(scheme: str) -> None:
    assert "of addresses only http and https are read" in failed(f"{scheme}:///etc/passwd")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("-", "stdin"),
        ("a/b.c.jpg", "b.c"),
        ("https://x.org/a/b.jpg?size=1", "b"),
        ("https://x.org", "x.org"),
        ("https://x.org/a%2F..%2Fb.jpg", "a_.._b"),
    ],
)
def test_names_for_what_is_made(source: str, name: str) -> None:
    assert media.stem(source) == name
