"""The version of this package, also for a copy of it without metadata; csrc/apet.h repeats it for C."""

__version__ = "0.2.0"
