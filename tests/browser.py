"""A headless browser, and the page of `apet explore` served from this process."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def missing() -> str | None:
    """Returns the reason why the page cannot be tested in a browser here, or None."""
    for module in ("gradio", "playwright", "axe_playwright_python"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed: pip install '.[dev]'"
    return None if executable() else f"no browser: none of {', '.join(BROWSERS)} is on the path"


def executable() -> str | None:
    return next(filter(None, map(shutil.which, BROWSERS)), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # The root user, e.g. in a container, can start it only without its sandbox.
        chromium = playwright.chromium.launch(executable_path=executable(), args=["--no-sandbox"])
        yield chromium
        chromium.close()


def inaccessible(tab: Any) -> list[str]:
    """Returns violations of the WCAG rules that the library axe-core checks: contrast, names, roles, order,
    landmarks."""
    from axe_playwright_python.sync_playwright import Axe

    rules = Axe().run(tab).response["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in rules for node in rule["nodes"]]


@contextlib.contextmanager
def served(explorer: Any, start: Path | None, megabytes: int = 64) -> Iterator[str]:
    """Yields the address of a page while it is served."""
    from apet.explore.page import build, serve

    page = build(explorer, start)
    try:
        yield serve(page, port=None, megabytes=megabytes, allowed=[start] if start else [], browser=False)
    finally:
        page.close(verbose=False)


@contextlib.contextmanager
def connections() -> Iterator[list[str]]:
    """Records the hosts other than this one that this process connects to or looks up."""
    outside: list[str] = []
    connect, resolve = socket.socket.connect, socket.getaddrinfo

    def local(host: object) -> bool:
        return str(host) in ("127.0.0.1", "::1", "localhost", "None", "")

    def connecting(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not local(address[0]):
            outside.append(str(address[0]))
        return connect(self, address)

    def resolving(host: Any, *more: Any, **named: Any) -> Any:
        if not local(host):
            outside.append(str(host))
        return resolve(host, *more, **named)

    socket.socket.connect, socket.getaddrinfo = connecting, resolving  # type: ignore[method-assign, assignment]
    try:
        yield outside
    finally:
        socket.socket.connect, socket.getaddrinfo = connect, resolve  # type: ignore[method-assign]
