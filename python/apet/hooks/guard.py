"""`guard`: what the first stage does where `keep` is so little that much of a unit is lost."""

from __future__ import annotations

import warnings

from torch import Tensor

import apet_kernels
from apet.notice import Notice

from .config import Options


def guarded(options: Options, x: Tensor, lengths: list[int], kept: list[int], warned: set[str]) -> list[int]:
    """Returns how many tokens the packed units of x [T, D] keep: `kept`, or with guard="keep" as many as they need.

    warned: what the user has been warned of, which is warned of once. Raises ValueError with guard="raise".
    """
    if options.guard == "warn" and "guard" in warned:
        return kept
    wanted = apet_kernels.needed(x, lengths, kept, options.guard_limit)
    if options.guard == "keep" or wanted == kept:
        return wanted
    few = [s for s, k in enumerate(kept) if wanted[s] > k]
    most = max(few, key=lambda s: wanted[s] - kept[s])
    message = (
        f"keep={options.keep} is little for {len(few)} of the {len(kept)} units (images, tiles, frames) of this call: "
        f"a unit of {lengths[most]} tokens keeps {kept[most]}, but it would take {wanted[most]} until no dropped token "
        f"has a squared residual above {options.guard_limit:g} (guard_limit) of the mean square"
    )
    if options.guard == "raise":
        raise ValueError(message)
    warned.add("guard")
    warnings.warn(Notice(message, "guard"), stacklevel=2)
    return kept
