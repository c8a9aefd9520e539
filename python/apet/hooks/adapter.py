"""What the hooks have to know about a model family, found by rule unless an adapter says otherwise."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from . import grids, parts
from .calling import is_pixels, modality_of
from .grids import Units, equal_units, one_unit

__all__ = ["Adapter", "Units", "equal_units", "one_unit"]


class Adapter:
    """A model that puts visual features at placeholder tokens and hands `inputs_embeds` to a decoder.

    This class is the adapter of any such model: what it says is found in the model (parts.py, grids.py). Subclasses
    say what cannot be found: an adapter of a family is short, since all work is the engine's.
    """

    positions: ClassVar[str | None] = None
    """"renumber": 0, 1, 2, ... over what is left of a row; "keep": every token keeps its position (M-RoPE)."""
    projector: ClassVar[str | None] = None
    """The module to compress before, by its name in the core model; None: compress where the decoder begins."""
    unit_names: ClassVar[Mapping[str, str] | None] = None
    """What a unit of each modality is called in messages."""
    tokens: ClassVar[Mapping[str, str] | None] = None
    """Where the configuration keeps the placeholder of each modality, as in {"image": "image_token_id"}."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of a preset."""

    def fitted(self, core: nn.Module) -> Adapter:
        """This adapter, with what it leaves open found in a core model. Raises ValueError where that is not there."""
        fitted: Any = copy.copy(self)
        fitted.positions = self.positions or parts.positions(core)
        fitted.tokens = self.tokens or parts.tokens(core)
        fitted.unit_names = self.unit_names or grids.unit_names(core)
        return fitted

    def core(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes token ids and pixels and calls the decoder."""
        return parts.core(model)

    def language_model(self, core: nn.Module) -> nn.Module:
        """The decoder, with its `layers`."""
        return parts.decoder(core)

    def first_llm_layer(self, core: nn.Module) -> int:
        """The least `llm_layer`: behind the layers at which visual features are added again."""
        return max(1, parts.deepstack(core))

    def brings(self, inputs: Mapping[str, Any]) -> set[str]:
        """Modalities present in a forward call. Determined from its arguments, not from placeholder ids in the text,
        because a model may generate the placeholder token."""
        pixels = {n for n in inputs if is_pixels(n) and inputs[n] is not None and len(inputs[n])}
        encoded = {m for m, output in (inputs.get("mm_encoder_outputs") or {}).items() if output is not None}
        return (encoded & parts.PLACEHOLDERS.keys()) | {modality_of(name) for name in pixels}

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        """The units of every image and video of a call, by modality, in the order of their placeholders.

        inputs: what the model was called with (pixel values, sizes, grids); counts: the placeholders of each
        modality in the call. Of a modality left out, every contiguous run of placeholders is an image or video, with
        the units that `run` says. Default: what grids and sizes in the call say, where they explain the placeholders.
        """
        return grids.visuals(core, inputs, counts)

    def apart(self, inputs: Mapping[str, Any], modality: str, lengths: list[int]) -> list[int]:
        """The contiguous runs of placeholders of these lengths, each of them one image or video: those that stand side
        by side are told apart by the pixels of the call, where that has one entry for each of them."""
        return grids.apart(inputs, modality, lengths)

    def run(self, core: nn.Module, tokens: int) -> Units:
        """The units of a contiguous run of so many placeholders. Default: it is one."""
        return one_unit(tokens)

    def features(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        """With `projector`: the units of every image over x, the projector's input [tiles, N, C], flattened to
        [tiles * N]; -1 for a token that the model will throw away. Default: x[i] is image i and one unit."""
        return [one_unit(x.shape[1])] * x.shape[0]
