"""Tiny random models of any image-text class of transformers, made from a configuration by rule, and inputs for them.

The self-check runs them on a user's machine, and so do the tests. A configuration (the user's, or the default one of a
type) is shrunk by the names of its fields: widths, heads, layers, experts, vocabulary. The features that distinguish
architectures stay: every kind of decoder layer, the rotary scheme, windows, chunks, deepstack, bidirectional images.
`special.py` has the fields of a type for which this rule is not enough.
"""

from .fields import END, EOS, IMAGE, LAYERS, PAD, PATCH, PINPOINTS, SIDE, START, TILE, VIDEO, VOCABULARY
from .inputs import collate, sample
from .model import build, config

__all__ = [
    "END",
    "EOS",
    "IMAGE",
    "LAYERS",
    "PAD",
    "PATCH",
    "PINPOINTS",
    "SIDE",
    "START",
    "TILE",
    "VIDEO",
    "VOCABULARY",
    "build",
    "collate",
    "config",
    "sample",
]
