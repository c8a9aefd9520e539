"""Files, pipes, standard input and URLs, and the faults of each."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from apet import ApetError, media
from apet.media import sources
from PIL import Image

from tests.films import HIGH, WIDE, film, grey, saved


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
    """A server with /photo; its other addresses have typical faults of servers."""

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
