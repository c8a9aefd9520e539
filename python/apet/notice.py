"""`apet.Notice`, in a module of its own: the package `apet` imports its parts late, so they cannot import from it."""

from __future__ import annotations


class Notice(UserWarning):
    """A warning that is meant for the user. The command line prints it as one line, and only the first one of each
    `key`."""

    def __init__(self, message: str, key: str | None = None):
        super().__init__(message)
        self.key = key or message
