"""Opens files, pipes and addresses as seekable files, and rejects text that is often taken for a picture."""

from __future__ import annotations

import base64
import http.client
import io
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from apet import ApetError
from apet.hub import first_line

MOST_BYTES = 512 << 20  # from an address or a pipe, which are read into memory
SILENCE = 20.0  # seconds without a byte until a download is given up
PATIENCE = 300.0  # seconds that a whole download may take
CHUNK = 1 << 20
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?=://)")


def is_address(source: str | Path) -> bool:
    """Returns whether the source begins with a scheme (such as https://), so that it is not a path."""
    return isinstance(source, str) and SCHEME.match(source) is not None


def is_file(source: str | Path) -> bool:
    """Returns whether the source is a file on a disk, which can be read again; a pipe or an address may not."""
    return not is_address(source) and source != "-" and Path(source).is_file()


def shown(source: str | Path) -> str:
    """Returns the source for display: an address without user, password and query."""
    if is_address(source):
        parts = urllib.parse.urlsplit(str(source))
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    return "standard input" if source == "-" else str(source)


def stem(source: str | Path) -> str:
    """Returns a name for files made from the source: the last part of its path, without its ending."""
    if source == "-":
        return "stdin"
    if is_address(source):
        parts = urllib.parse.urlsplit(str(source))
        # An encoded slash must not lead to another folder.
        name = urllib.parse.unquote(PurePosixPath(parts.path).name).replace("/", "_").replace("\0", "_")
        return PurePosixPath(name).stem or parts.hostname or "address"
    return Path(source).stem


@contextmanager
def opened(source: str | Path) -> Iterator[BinaryIO]:
    """Opens a source. Raises: ApetError, if it cannot be opened, is empty, or, unless it is a file, is too large for
    memory."""
    if is_address(source):
        file: BinaryIO = _download(str(source))
    elif source == "-":
        if sys.stdin.isatty():
            raise ApetError("standard input is a terminal: pipe a file into it")
        file = io.BytesIO(_all(sys.stdin.buffer, "standard input"))
    else:
        file = _open(Path(source))
    with file:
        if not file.read(1):
            raise ApetError(f"the file is empty: {shown(source)}")
        file.seek(0)
        yield file


def _open(path: Path) -> BinaryIO:
    try:
        if path.is_file():
            return path.open("rb")
        if path.is_fifo() or path.is_char_device() or path.is_socket():  # named pipes, /dev/fd/N
            with path.open("rb") as pipe:
                return io.BytesIO(_all(pipe, str(path)))
        if path.is_dir():
            raise ApetError(f"cannot read {path}: it is a folder")
        path.stat()  # raises the error that describes the problem
    except OSError as error:
        raise ApetError(f"cannot read {path}: {error.strerror or error}") from error
    raise ApetError(f"cannot read {path}: it is not a file")


def _all(pipe: BinaryIO, name: str) -> bytes:
    data = pipe.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise _too_large(name)
    return data


def _too_large(name: str) -> ApetError:
    return ApetError(f"{name} is larger than {MOST_BYTES >> 20} MiB: save it as a file first")


def _opener() -> urllib.request.OpenerDirector:
    """Returns an opener that knows only http and https, so that no redirect leads elsewhere."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", "apet-kernels"), ("Accept", "image/*, video/*, */*;q=0.5")]
    return opener


def _request(address: str) -> urllib.request.Request:
    """Returns a request with the user and password of the address, which are not sent to the target of a redirect."""
    parts = urllib.parse.urlsplit(address)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(urllib.parse.urlunsplit(parts._replace(netloc=host)))
    if at:
        secret = base64.b64encode(urllib.parse.unquote(user).encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {secret}")
    return request


def _download(address: str) -> BinaryIO:
    """Returns the data at an http or https address. Raises ApetError if it is too large, too slow or incomplete."""
    name, scheme = shown(address), address.partition(":")[0].lower()
    if scheme not in ("http", "https"):
        raise ApetError(f"cannot read {name}: of addresses only http and https are read")
    end = time.monotonic() + PATIENCE
    data = io.BytesIO()
    try:
        with _opener().open(_request(address), timeout=SILENCE) as answer:
            if int(answer.headers.get("Content-Length") or 0) > MOST_BYTES:
                raise _too_large(name)
            while chunk := answer.read1(CHUNK):
                data.write(chunk)
                if data.tell() > MOST_BYTES:
                    raise _too_large(name)
                if time.monotonic() > end:
                    raise ApetError(f"cannot download {name}: it takes longer than {PATIENCE:g} seconds")
            if answer.length:
                raise ApetError(f"cannot download {name}: {answer.length} bytes at its end are missing")
    except urllib.error.HTTPError as error:
        error.close()
        raise ApetError(f"cannot download {name}: the server answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise ApetError(f"cannot download {name}: nothing arrived for {SILENCE:g} seconds") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise ApetError(f"cannot download {name}: nothing arrived for {SILENCE:g} seconds") from error
        message = first_line(cause) if isinstance(cause, Exception) else str(cause)
        raise ApetError(f"cannot download {name}: {message}") from error
    data.seek(0)
    return data


# The usual kinds of text, by their first bytes.
BEGINNINGS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself: run git lfs pull"),
    (b"#EXTM3U", "a playlist"),
    (b"ffconcat", "a playlist"),
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"<svg", "a drawing (SVG)"),
    (b"%PDF", "a PDF document"),
)


def reject_text(file: BinaryIO, name: str) -> None:
    """Raises: ApetError, with the kind of text, if the file is text that is often taken for a photo or a clip."""
    start = file.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    file.seek(0)
    for beginning, kind in BEGINNINGS:
        if start.startswith(beginning.lower()):
            raise ApetError(f"neither a photo nor a video: {name} is {kind}")
