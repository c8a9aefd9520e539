"""`Adapter`: what the hooks have to know about a model family. It is found by rule unless a subclass gives it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from . import grids, parts
from .calling import is_pixels, modality_of
from .grids import Units, equal_units, one_unit

__all__ = ["Adapter", "Units", "equal_units", "one_unit"]


class Adapter:
    """Describes a model that puts visual features at placeholder tokens and passes `inputs_embeds` to a decoder.

    This class fits any such model: it finds every detail in the model itself (parts.py, grids.py). A subclass overrides
    only the details that cannot be found. The hooks themselves are in the engine.

    Example:
        >>> class Stamps(apet.Adapter):  # an image is a token that stays, and two units of 16 tokens
        ...     tokens = {"image": "stamp_id"}
        ...
        ...     def language_model(self, core):
        ...         return core.writer
        ...
        ...     def units_of_run(self, core, tokens):
        ...         return torch.cat([torch.tensor([-1]), apet.equal_units(2, 16)])
    """

    positions: ClassVar[str | None] = None
    """What happens to positions if tokens are dropped. "renumber": they are 0, 1, 2, ... over the remaining tokens of a
    row, unless `apet.patch` is told to keep them; "keep": every token keeps its position (M-RoPE)."""
    projector: ClassVar[str | None] = None
    """The name, in the core model, of the module whose input is compressed; None: the decoder's input is compressed."""
    unit_names: ClassVar[Mapping[str, str] | None] = None
    """The name of a unit of each modality, for messages."""
    tokens: ClassVar[Mapping[str, str] | None] = None
    """The field of the configuration with the placeholder id of each modality, as in {"image": "image_token_id"}."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """The options of each preset, by its name."""

    def fitted(self, core: nn.Module) -> Adapter:
        """Returns a copy of this adapter for one core model, with every field that was left open filled in from that
        model. Raises ValueError if the model does not have it."""
        fitted: Any = copy.copy(self)
        fitted.positions = self.positions or parts.positions(core)
        fitted.tokens = self.tokens or parts.tokens(core)
        fitted.unit_names = self.unit_names or grids.unit_names(core)
        return cast(Adapter, fitted)

    def core(self, model: nn.Module) -> nn.Module:
        """Returns the module whose forward takes token ids and pixels and calls the decoder."""
        return parts.core(model)

    def language_model(self, core: nn.Module) -> nn.Module:
        """Returns the decoder, the module that has the `layers`."""
        return parts.decoder(core)

    def first_llm_layer(self, core: nn.Module) -> int:
        """Returns the smallest `llm_layer` allowed: after the layers at which visual features are added again
        (deepstack)."""
        return max(1, parts.deepstack(core))

    def modalities(self, inputs: Mapping[str, Any]) -> set[str]:
        """Returns the modalities present in a forward call. They are determined from its arguments, not from
        placeholder ids in the text, because a model may generate the placeholder token."""
        pixels = {n for n in inputs if is_pixels(n) and inputs[n] is not None and len(inputs[n])}
        encoded = {m for m, output in (inputs.get("mm_encoder_outputs") or {}).items() if output is not None}
        return (encoded & parts.PLACEHOLDERS.keys()) | {modality_of(name) for name in pixels}

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        """Returns the units of every image and video of a call, by modality, in the order of their placeholders.

        inputs: the arguments of the model (pixel values, sizes, grids); counts: the number of placeholders of each
        modality in the call. If a modality is left out of the result, every contiguous run of its placeholders is one
        image or video, with the units that `units_of_run` gives. Default: the units that follow from grids and sizes
        among the inputs, if these agree with the number of placeholders.
        """
        return grids.units(core, inputs, counts)

    def split_runs(self, inputs: Mapping[str, Any], modality: str, lengths: list[int]) -> list[int]:
        """Returns the numbers of placeholders of the images or videos in contiguous runs of these lengths. Default:
        a run is split into several images, if the pixels of the call have one entry for each of them and these are
        equally large."""
        return grids.split_runs(inputs, modality, lengths)

    def units_of_run(self, core: nn.Module, tokens: int) -> Units:
        """Returns the units of a contiguous run of `tokens` placeholders. Default: the run is one unit."""
        return one_unit(tokens)

    def units_before_projector(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        """Only with `projector`: returns the units of every image over x, the projector's input [tiles, N, C],
        flattened to [tiles * N]; -1 marks a token that the model discards. Default: x[i] is image i, and one unit."""
        return [one_unit(x.shape[1])] * x.shape[0]
