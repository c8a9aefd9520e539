"""Visual-token compression (ApET, arXiv 2602.19870) in Hugging Face vision-language models: docs/hooks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn

from .adapter import Adapter, adapter_for, equal_units, one_unit, register_adapter
from .config import Options, resolve
from .engine import Engine

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

ENGINE = "_apet"


def patch(
    model: nn.Module,
    keep: int | float | Sequence[int | float] | None = None,
    *,
    basis: int | None = None,
    layout: str | None = None,
    select: str | None = None,
    blend: float | None = None,
    llm_layer: int | None = None,
    llm_keep: int | float | Sequence[int | float] | None = None,
    preset: str | None = None,
) -> Options:
    """Makes a transformers vision-language model compress its visual tokens, in every call from now on.

    Args:
        model: a model whose family has an adapter, as `from_pretrained` returns it, or within torch.compile or PEFT.
        keep: tokens to keep of each unit (an image, a tile or a frame, by family): a count, a ratio in (0, 1], or a
            list of these with one entry for every image or video of a call. None: no first stage.
        basis, layout, select, blend: as in `apet_kernels.compress`; 10, "inplace", "fps" and 1.0 unless a preset says
            otherwise.
        llm_layer, llm_keep: compress once more, after so many decoder layers have run, to so many tokens of each unit.
        preset: both stages with the budgets of the paper and the layout of the released code; the other arguments
            override it.

    Returns:
        The options in force. A model that was patched already is patched anew.

    Raises:
        ValueError, in a sentence with the offending value.
    """
    model = unwrapped(model)
    adapter = adapter_for(model)
    core = adapter.core(model)
    layers = range(adapter.first_llm_layer(core), len(adapter.language_model(core).layers))
    chosen = resolve(
        adapter.presets,
        model.config.model_type,
        layers,
        {
            "keep": keep,
            "basis": basis,
            "layout": layout,
            "select": select,
            "blend": blend,
            "llm_layer": llm_layer,
            "llm_keep": llm_keep,
            "preset": preset,
        },
    )
    _put(model, Engine(model, adapter, chosen))
    return chosen


def unpatch(model: nn.Module) -> None:
    """Takes every hook off; the model is what it was. Nothing happens where it is not patched."""
    _put(unwrapped(model), None)


@contextmanager
def patched(model: nn.Module, keep: int | float | Sequence[int | float] | None = None, **options) -> Iterator[Options]:
    """`patch` for the length of a with block; then what was there before, patched or not."""
    model = unwrapped(model)
    before = model.__dict__.get(ENGINE)
    chosen = patch(model, keep, **options)
    try:
        yield chosen
    finally:
        _put(model, before)


def options(model: nn.Module) -> Options | None:
    """The options that a model is patched with, or None."""
    engine = unwrapped(model).__dict__.get(ENGINE)
    return engine.options if engine else None


@dataclass(frozen=True)
class Visual:
    """What is left of one image or video: its modality, its row in the batch, its number of placeholders, and the
    positions among these that were left after each stage that dropped something (int64, ascending)."""

    modality: str
    row: int
    tokens: int
    left: list[Tensor]


@dataclass(frozen=True)
class Kept:
    """What a prefill kept. lengths: of the padded sequence as given and after each stage that dropped something."""

    lengths: list[int]
    visuals: list[Visual]


def kept(model: nn.Module) -> Kept | None:
    """What the last prefill with images or videos kept, or None where there was none since `patch`."""
    engine = unwrapped(model).__dict__.get(ENGINE)
    if engine is None or engine.trace is None:
        return None
    trace, visuals, start = engine.trace, [], 0
    for modality, row, tokens in trace.visuals:
        left = [here[start : start + tokens].nonzero().view(-1).cpu() for here in trace.here]
        visuals.append(Visual(modality, row, tokens, left))
        start += tokens
    return Kept(list(trace.lengths), visuals)


def _put(model: nn.Module, engine: Engine | None) -> None:
    """Replaces what a model is patched with."""
    before = model.__dict__.pop(ENGINE, None)
    if before is not None:
        before.remove()
    if engine is not None:
        engine.install()
        model.__dict__[ENGINE] = engine


def unwrapped(model: nn.Module) -> nn.Module:
    """The transformers model within torch.compile or PEFT: its hooks run there, too."""
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model
