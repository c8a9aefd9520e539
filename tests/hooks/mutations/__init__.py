"""Changes that transformers might make next, applied to the installed version.

A mutation must not change the results of an unpatched model, so the recompute on unchanged classes is the reference.
"""

from . import cache, calls, inputs, mask, positions  # each adds its mutations to the table
from .edits import MUTATIONS, Classes, NotThisVersion

__all__ = ["MUTATIONS", "Classes", "NotThisVersion", "cache", "calls", "inputs", "mask", "positions"]
