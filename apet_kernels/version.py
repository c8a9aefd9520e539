"""The version, which csrc/apet.h repeats for C; a copy of this package without its metadata has it too."""

__version__ = "0.2.0"
