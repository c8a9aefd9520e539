"""Visual-token compression (ApET, arXiv 2602.19870) in Hugging Face vision-language models: docs/hooks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from apet_kernels.options import Layout, Select

from .adapter import Adapter, equal_units, one_unit
from .adapters import adapter_for, register_adapter
from .config import Basis, Guard, Options, Positions, resolve
from .engine import Engine
from .patching import drop_compiled
from .results import ENGINE, Kept, Visual, kept
from .target import Target, plain

__all__ = [
    "Adapter",
    "Kept",
    "Options",
    "Visual",
    "equal_units",
    "kept",
    "one_unit",
    "options",
    "patch",
    "patched",
    "register_adapter",
    "unpatch",
]


def patch(
    model: nn.Module,
    keep: int | float | Sequence[int | float] | None = None,
    *,
    basis: Basis | None = None,
    layout: Layout | None = None,
    select: Select | None = None,
    blend: float | None = None,
    refine: int | None = None,
    share: bool | None = None,
    relevance: float | None = None,
    distinct: float | None = None,
    guard: Guard | None = None,
    guard_limit: float | None = None,
    positions: Positions | None = None,
    llm_layer: int | None = None,
    llm_keep: int | float | Sequence[int | float] | None = None,
    preset: str | None = None,
    check: bool = True,
) -> Options:
    """Patches a transformers vision-language model in place: it compresses its visual tokens in every call from now on.

    Args:
        model: a model whose family has an adapter, as `from_pretrained` returns it, or within torch.compile, PEFT,
            DataParallel, DistributedDataParallel or FSDP.
        keep: tokens to keep of each unit (an image, a tile or a frame, by family): a count, a ratio in (0, 1], or a
            list of these with one entry for every image or video of a call. None: there is no first stage.
        basis, layout, select, blend, refine: as in `apet_kernels.compress`; "keep", "inplace", "qr", 1.0 and 0 unless a
            preset says otherwise. basis="keep" picks as many as are kept (`basis=None` there). basis=10 with
            select="fps" is the paper's rule.
        share: whether the units of a call share their budgets: `keep` is then their mean, and units with more to tell
            keep more (`apet_kernels.share`). The result depends on what else is in the call, also in other prompts.
        relevance: 0..1, how much the first stage prefers tokens that resemble the prompt: the values by which tokens
            are chosen are multiplied by a factor from 1 - relevance for the token of a unit that resembles the text of
            its prompt least to 1 for the one that does most, by the mean cosine with its embedded tokens.
        distinct: 0..4, how much the first stage prefers tokens that differ from the rest of their unit: the values by
            which tokens are chosen are multiplied by (1 - the mean cosine of a token with all tokens of its unit) **
            distinct (`apet_kernels.distinct`), besides the factor of `relevance`.
        guard: what the first stage does where `keep` is little for a unit, so that a dropped token has a squared
            residual to the kept ones (pivoted QR, `apet_kernels.needed`) above `guard_limit` of the mean square: "warn"
            says so once, "raise" raises, and "keep" keeps as many more of the unit as it takes. It costs as many passes
            over the tokens as are kept.
        guard_limit: 0.2 unless given.
        positions: "keep": every token that stays keeps its position, and the text after an image the position that it
            has without compression. "renumber": positions are 0, 1, 2, ... over the tokens that remain. None: as the
            family does (docs/hooks.md). M-RoPE positions are always kept.
        llm_layer, llm_keep: compress once more, after so many decoder layers have run, to so many tokens of each unit.
        preset: both stages with the budgets and the rule of the paper and the layout of the released code; the other
            arguments override it.
        check: where transformers, torch or the model's code are not as tested, compare a tiny random model of the same
            classes with an independent reference first (seconds, once for these versions). False: patch without.

    Returns:
        The options in force. If the model was patched before, they replace those of the earlier patch. Compiled code of
        this process is dropped (`torch.compiler.reset`) and compiled again at its next call, since it does not contain
        the hooks.

    Raises:
        ValueError: an option is out of range, or the hooks do not support the model; the message says which. Calls of
            the patched model raise it with guard="raise".

    Example:
        >>> apet.patch(model, keep=64)
        >>> model.generate(**inputs, max_new_tokens=64)
        >>> apet.unpatch(model)

    The method is ApET (arXiv 2602.19870): section 3 for the first stage, section 4 for budgets in two stages.
    """
    given = {
        "keep": keep,
        "basis": basis,
        "layout": layout,
        "select": select,
        "blend": blend,
        "refine": refine,
        "share": share,
        "relevance": relevance,
        "distinct": distinct,
        "guard": guard,
        "guard_limit": guard_limit,
        "positions": positions,
        "llm_layer": llm_layer,
        "llm_keep": llm_keep,
        "preset": preset,
    }
    model = plain(model)
    target = find(model, given)
    if check:
        from .selfcheck import ensure

        ensure(model, target)
    _put(model, Engine(target))
    return target.options


def find(model: nn.Module, given: dict[str, Any]) -> Target:
    """Finds the parts of a model and checks the options in `given`. It raises all errors that `patch` raises before
    its self-check."""

    def options(adapter: Adapter, core: nn.Module, layers: range) -> Options:
        return resolve(adapter.presets, model.config.model_type, layers, given)

    return Target.find(model, adapter_for(model), options)


def unpatch(model: nn.Module) -> None:
    """Removes every hook, so that the model behaves as before `patch`. A model that is not patched is not changed.

    Compiled code is dropped as by `patch`. A call of the model with a cache that holds a compressed prompt then raises
    an error.

    Args:
        model: the model, or the model within a wrapper, as in `patch`.

    Example:
        >>> apet.unpatch(model)
        >>> apet.options(model) is None
        True
    """
    _put(plain(model), None)


@contextmanager
def patched(
    model: nn.Module,
    keep: int | float | Sequence[int | float] | None = None,
    *,
    basis: Basis | None = None,
    layout: Layout | None = None,
    select: Select | None = None,
    blend: float | None = None,
    refine: int | None = None,
    share: bool | None = None,
    relevance: float | None = None,
    distinct: float | None = None,
    guard: Guard | None = None,
    guard_limit: float | None = None,
    positions: Positions | None = None,
    llm_layer: int | None = None,
    llm_keep: int | float | Sequence[int | float] | None = None,
    preset: str | None = None,
    check: bool = True,
) -> Iterator[Options]:
    """Applies `patch` for the length of a with block, then restores the previous state: not patched, or the earlier
    patch.

    Args:
        model, keep, basis, layout, select, blend, refine, share, relevance, distinct, guard, guard_limit, positions,
            llm_layer, llm_keep, preset, check: as in `patch`.

    Yields:
        The options in force.

    Raises:
        ValueError: as `patch` does.

    Example:
        >>> with apet.patched(model, keep=0.25):
        ...     model.generate(**inputs)
    """
    model = plain(model)
    before = model.__dict__.get(ENGINE)
    chosen = patch(
        model,
        keep,
        basis=basis,
        layout=layout,
        select=select,
        blend=blend,
        refine=refine,
        share=share,
        relevance=relevance,
        distinct=distinct,
        guard=guard,
        guard_limit=guard_limit,
        positions=positions,
        llm_layer=llm_layer,
        llm_keep=llm_keep,
        preset=preset,
        check=check,
    )
    try:
        yield chosen
    finally:
        _put(model, before)


def options(model: nn.Module) -> Options | None:
    """Returns the options that a model is patched with; None if it is not patched.

    Args:
        model: the model, or the model within a wrapper, as in `patch`.

    Example:
        >>> apet.options(model).keep
        64
    """
    engine: Engine | None = plain(model).__dict__.get(ENGINE)
    return engine.target.options if engine else None


def _put(model: nn.Module, engine: Engine | None) -> None:
    """Replaces the engine of a model; None only removes the one that it has."""
    before = model.__dict__.pop(ENGINE, None)
    if before is not None:
        before.remove()
    if engine is not None:
        engine.install()
        model.__dict__[ENGINE] = engine
    if before or engine:
        drop_compiled()
