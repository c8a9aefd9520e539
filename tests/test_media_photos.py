"""Photos and animations are read as viewers show them; other files are rejected."""

from __future__ import annotations

import io
import struct
import sys

import numpy as np
import pytest
from apet import media
from PIL import Image

from tests.films import film, grey, numbers, read, rejected, saved

Image.init()
without_avif = pytest.mark.skipif("AVIF" not in Image.SAVE, reason="this Pillow knows no AVIF")


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


def test_heic_photos_have_the_limit_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which Pillow checks for those that it opens itself."""
    heif = pytest.importorskip("pillow_heif")
    file = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 48), "red")).save(file)
    monkeypatch.setattr(media.photos, "MOST_PIXELS", 1000)
    assert rejected(file.getvalue()) == "cannot read the photo file: its 64 x 48 pixels are more than 1000"


def test_heic_without_its_extra_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # makes its import fail
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


# --- other files


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
