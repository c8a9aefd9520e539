"""A photo, a clip, and their results in `apet explore`."""

from __future__ import annotations

from pathlib import Path

import pytest
from apet.explore.explorer import Explorer
from apet.explore.files import Files

from .tiles import Tiles, scene


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a <photo> & more.png"
    scene().save(path)
    return path


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    import av

    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for i in range(12):
            file.mux(stream.encode(av.VideoFrame.from_image(scene(i))))
        file.mux(stream.encode(None))
    return path


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(Files(Tiles(), 3))
