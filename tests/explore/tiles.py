"""An encoder that needs no weights, photos for it, and a reader of pages."""

from __future__ import annotations

import html.parser
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from apet.explore import svg
from apet.explore.explorer import Explorer
from apet.explore.settings import Link, Settings
from PIL import Image

SMALL = Settings(keep=12, basis=4)


class Tiles:
    """An encoder of 6 x 8 patches (of a 4:3 photo) whose tokens are the pixels, shuffled by a matrix."""

    name, layer = "tiles", 1

    def __init__(self) -> None:
        self.mix = torch.randn(48, 24, generator=torch.Generator().manual_seed(0))
        self.calls: list[int] = []

    def grid(self, width: int, height: int) -> tuple[int, int]:
        return (6, 8) if width > height else (8, 6)

    def view(self, photo: Image.Image, pixels: int = 4) -> Image.Image:
        rows, cols = self.grid(*photo.size)
        return photo.resize((cols * pixels, rows * pixels))

    def encode(self, views: list[Image.Image]) -> torch.Tensor:
        self.calls.append(len(views))
        x = torch.from_numpy(np.stack([np.asarray(v, np.float32) for v in views])) / 255  # [B, H, W, 3]
        b, h, w, _ = x.shape
        patches = x.view(b, h // 4, 4, w // 4, 4, 3).transpose(2, 3).reshape(b, -1, 48)
        return patches @ self.mix  # [B, N, 24]


def scene(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    return Image.fromarray(noise).resize((160, 120), Image.BICUBIC)


def shown(explorer: Explorer, path: Path, *settings: Settings) -> list[svg.Shown]:
    return explorer.shown(path, Link(*settings))


def huge(path: Path) -> None:
    """Writes a PNG with little more than a header that specifies 100 megapixels."""
    Image.new("1", (8, 8)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = struct.pack(">II", 10_000, 10_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    path.write_bytes(data)


class Tree(html.parser.HTMLParser):
    """Collects elements with their attributes, and fails if tags do not match."""

    VOID = ("meta", "path", "rect", "image", "use", "circle", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]
