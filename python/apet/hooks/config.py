"""`Options`: the arguments of `apet.patch`, checked, as one frozen, printable object."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

from apet_kernels import budgets
from apet_kernels import options as kernel
from apet_kernels.options import Layout, Select

Keep = int | float | tuple[int | float, ...]
Guard = Literal["warn", "raise", "keep"]
GUARDS: tuple[Guard, ...] = get_args(Guard)
Positions = Literal["keep", "renumber"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
Basis = int | Literal["keep"]  # "keep": as many as are kept, `basis=None` of apet_kernels


@dataclass(frozen=True)
class Options:
    """The options of `apet.patch`, as docs/hooks.md lists them. The fields without a comment are options of
    `apet_kernels.compress`."""

    # The budget of each unit: a count (int), a ratio (float in (0, 1]), or a tuple with one of these for every image or
    # video of a call. None: there is no first stage.
    keep: Keep | None = None
    basis: Basis = "keep"  # "keep": `basis=None` of `apet_kernels.compress`
    layout: Layout = kernel.Options.layout
    select: Select = kernel.Options.select
    blend: float = kernel.Options.blend
    llm_layer: int | None = None  # the first decoder layer after the second stage; None: there is none
    llm_keep: Keep | None = None  # the budget of the second stage, like `keep`
    preset: str | None = None  # the name of the preset that the other options override
    refine: int = kernel.Options.refine
    share: bool = False  # whether the units of a call share their budgets
    relevance: float = 0.0  # how much the first stage prefers tokens that resemble the prompt, 0..1
    distinct: float = 0.0  # how much the first stage prefers tokens that differ from the rest of their unit, 0..4
    guard: Guard | None = None  # what the first stage does where `keep` is too little for a unit; None: nothing
    guard_limit: float = budgets.LIMIT  # above which squared residual of a dropped token, relative to the mean square
    positions: Positions | None = None  # what tokens do with their positions; None: what their family does

    @property
    def kernel(self) -> dict[str, Any]:
        """The keyword arguments for `apet_kernels.compress_varlen`."""
        basis = None if self.basis == "keep" else self.basis
        own = {"layout": self.layout, "select": self.select, "blend": self.blend, "refine": self.refine}
        return {"basis": basis, **own}

    @property
    def adaptive(self) -> bool:
        """Whether the number of tokens that a unit keeps depends on what it contains."""
        return self.share or self.guard == "keep"

    @property
    def appended(self) -> int:
        """The number of basis tokens that follow the kept tokens of a unit."""
        return self.basis if self.layout == "append" and self.basis != "keep" else 0


def resolve(
    presets: Mapping[str, Mapping[str, Any]], model_type: str, layers: range, given: Mapping[str, Any]
) -> Options:
    """Returns the options: those given to `patch` override those of the preset, which override the defaults.

    layers: the values that llm_layer may have. Raises ValueError with the offending value.
    """
    given = {name: value for name, value in given.items() if value is not None}
    preset = given.get("preset")
    if preset is not None and preset not in presets:
        known = ", ".join(presets) or "none"
        raise ValueError(f"preset='{preset}' is not known for {model_type}; its presets are: {known}")
    options = replace(Options(), **{**(presets[preset] if preset else {}), **given})
    options = replace(options, keep=_checked("keep", options.keep), llm_keep=_checked("llm_keep", options.llm_keep))
    _check(options, layers)
    return options


def share_of(ratio: float, tokens: int) -> int:
    """Returns this share of the tokens, rounded half up."""
    return math.floor(ratio * tokens + 0.5)


def count(keep: Keep, visual: int, tokens: int, options: Options) -> int:
    """Returns how many of a unit's `tokens` to keep; `visual` is the number of its image or video in the call.

    A ratio is rounded half up, and never gives less than the layout needs: 1, or with "overwrite" basis + 1.
    """
    wanted = keep[visual] if isinstance(keep, tuple) else keep
    if isinstance(wanted, float):
        least = options.basis + 1 if options.layout == "overwrite" and options.basis != "keep" else 1
        wanted = max(least, share_of(wanted, tokens))
    return min(wanted, tokens)


def _checked(name: str, keep: Any) -> Keep | None:
    if keep is None:
        return None
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if not keep:
            raise ValueError(f"{name} is an empty list; it needs one entry for every image or video of a call")
        return tuple(_one(name, k) for k in keep)
    return _one(name, keep)


def _one(name: str, keep: Any) -> int | float:
    whole = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 1
    if not whole and not (isinstance(keep, float) and 0 < keep <= 1):
        raise ValueError(f"{name}={keep!r} is neither a count (an int from 1) nor a ratio (a float in (0, 1])")
    return cast("int | float", keep)


def _check(options: Options, layers: range) -> None:
    """Raises ValueError for options that contradict each other, or that are out of range for every call."""
    if options.keep is None and options.llm_layer is None:
        raise ValueError("nothing to do: give keep=, llm_layer= with llm_keep=, or preset=")
    if (options.llm_layer is None) != (options.llm_keep is None):
        raise ValueError(f"llm_layer={options.llm_layer} and llm_keep={options.llm_keep} must be given together")
    if not isinstance(options.share, bool):
        raise ValueError(f"share={options.share!r} is neither True nor False")
    number = isinstance(options.relevance, (int, float)) and not isinstance(options.relevance, bool)
    if not (number and 0 <= options.relevance <= 1):
        raise ValueError(f"relevance={options.relevance!r} is outside 0..1")
    number = isinstance(options.distinct, (int, float)) and not isinstance(options.distinct, bool)
    if not (number and 0 <= options.distinct <= budgets.STEEPEST):
        raise ValueError(f"distinct={options.distinct!r} is outside 0..{budgets.STEEPEST:g}")
    weighted = [f"{name}={value}" for name in ("relevance", "distinct") if (value := getattr(options, name))]
    if weighted and options.keep is None:
        raise ValueError(f"{weighted[0]} needs keep: only the first stage uses it")
    if options.positions is not None and options.positions not in POSITIONS:
        raise ValueError(f"positions={options.positions!r} is none of {', '.join(map(repr, POSITIONS))}")
    if options.guard is not None and options.guard not in GUARDS:
        raise ValueError(f"guard={options.guard!r} is none of {', '.join(map(repr, GUARDS))}")
    limit = options.guard_limit
    if not isinstance(limit, (int, float)) or isinstance(limit, bool) or not 0 < limit < math.inf:
        raise ValueError(f"guard_limit={limit!r} is not a number above 0")
    if options.guard is None and limit != Options.guard_limit:
        raise ValueError(f"guard_limit={limit} needs guard")
    if options.guard and weighted:
        raise ValueError(
            f"guard='{options.guard}' cannot be used with {weighted[0]}: it counts the tokens that are needed without "
            "its weights, which are others"
        )
    if options.guard and options.keep is None:
        raise ValueError(f"guard='{options.guard}' needs keep: only the first stage has one")
    if options.adaptive and options.layout != "inplace":
        named = "share=True" if options.share else "guard='keep'"
        raise ValueError(f"{named} needs layout='inplace', got layout='{options.layout}'")
    for name in ("basis", "llm_layer", "refine"):
        value = getattr(options, name)
        if name == "basis" and value == "keep":
            continue
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            or_keep = ", nor 'keep'" if name == "basis" else ""
            raise ValueError(f"{name}={value!r} is not a whole number{or_keep}")
    if options.llm_layer is not None and options.llm_layer not in layers:
        raise ValueError(f"llm_layer={options.llm_layer} is outside {layers[0]}..{layers[-1]}, between decoder layers")
    rule = (("select", "qr", kernel.SELECTS), ("layout", "inplace", kernel.LAYOUTS))
    for name, needed, known in rule if options.basis == "keep" else ():
        if (value := getattr(options, name)) != needed and value in known:
            raise ValueError(
                f"basis='keep' needs {name}='{needed}', got {name}={value!r}; give basis in 1..{kernel.MAX_BASIS}"
            )
    if options.refine and options.basis != "keep":
        raise ValueError(f"refine={options.refine} needs basis='keep', got basis={options.basis}")
    # The numbers of tokens are known only when the model is called, so the bounds here are as large as possible.
    kernel.Options(**options.kernel).check(tokens=sys.maxsize, ragged=True)
    if options.layout == "append" and options.llm_layer is not None:
        raise ValueError(f"layout='append' has no second stage; leave out llm_layer={options.llm_layer}")
    for name, keep in (("keep", options.keep), ("llm_keep", options.llm_keep)):
        counts = [k for k in (keep if isinstance(keep, tuple) else (keep,)) if isinstance(k, int)]
        if options.layout == "overwrite" and options.basis != "keep" and counts and min(counts) <= options.basis:
            raise ValueError(
                f"layout='overwrite' needs {name} > basis, got {name}={min(counts)} and basis={options.basis}"
            )
