"""Changes that transformers might make next, applied to the installed version.

A mutation must not change what the model that is not patched computes; so the recompute of the unchanged classes says
what is right.
"""

from . import cache, calls, inputs, mask, positions  # each adds its mutations to the table
from .edits import MUTATIONS, Classes, NotThisVersion

__all__ = ["MUTATIONS", "Classes", "NotThisVersion", "cache", "calls", "inputs", "mask", "positions"]
