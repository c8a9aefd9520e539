"""What the hooks have to know about a model family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .sequence import Packing

# One entry for every placeholder of one image or video, in order: the number of its unit within that image or video,
# or -1 for a token that always stays. On the CPU, int64.
Units = Tensor


class Adapter:
    """A model that puts visual features at placeholder tokens and hands `inputs_embeds` to a language model.

    This class is the adapter of any such model whose units are the contiguous runs of its placeholders. Subclasses
    say more: an adapter of a family is short, since all work is the engine's.
    """

    positions: ClassVar[str] = "renumber"
    """"renumber": 0, 1, 2, ... over what is left of a row; "keep": every token keeps its position (M-RoPE)."""
    projector: ClassVar[str | None] = None
    """The module to compress before, by its name in the core model; None: compress where the language model begins."""
    unit_names: ClassVar[Mapping[str, str]] = {"image": "image", "video": "video"}
    """What a unit of each modality is called in messages."""
    tokens: ClassVar[Mapping[str, str]] = {"image": "image_token_id", "video": "video_token_id"}
    """Where the configuration keeps the placeholder of each modality."""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of a preset."""
    along: ClassVar[frozenset[str]] = frozenset()
    """Arguments of the language model, beside embeddings, mask and positions, that `follow` shortens."""

    def core(self, model: nn.Module) -> nn.Module:
        """The module whose forward takes token ids and pixels and calls the language model."""
        return getattr(model, "model", model)

    def language_model(self, core: nn.Module) -> nn.Module:
        """The decoder, with its `layers` and `rotary_emb`."""
        return core.language_model

    def first_llm_layer(self, core: nn.Module) -> int:
        """The least `llm_layer`."""
        return 1

    def brings(self, inputs: Mapping[str, Any]) -> set[str]:
        """Modalities present in a forward call. Determined from its arguments, not from placeholder ids in the text,
        because a model may generate the placeholder token."""
        pixels = {n for n in inputs if n.startswith("pixel_values") and inputs[n] is not None and len(inputs[n])}
        encoded = {m for m, output in (inputs.get("mm_encoder_outputs") or {}).items() if output is not None}
        return (encoded & self.tokens.keys()) | {"video" if "video" in name else "image" for name in pixels}

    def visuals(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Units]]:
        """The units of every image and video of a call, by modality, in the order of their placeholders.

        inputs: what the model was called with (pixel values, sizes, grids); counts: the placeholders of each
        modality in the call. Of a modality left out, every contiguous run of placeholders is an image or video, with
        the units that `run` says.
        """
        return {}

    def run(self, core: nn.Module, tokens: int) -> Units:
        """The units of a contiguous run of so many placeholders. Default: it is one."""
        return one_unit(tokens)

    def features(self, core: nn.Module, inputs: Mapping[str, Any], x: Tensor) -> list[Units]:
        """With `projector`: the units of every image over x, the projector's input [tiles, N, C], flattened to
        [tiles * N]; -1 for a token that the model will throw away. Default: x[i] is image i and one unit."""
        return [one_unit(x.shape[1])] * x.shape[0]

    def follow(self, packing: Packing, inputs: dict[str, Any]) -> None:
        """Shortens the arguments of the language model that `along` names, in `inputs`."""


def one_unit(tokens: int) -> Units:
    """An image of `tokens` placeholders that are compressed together."""
    return torch.zeros(tokens, dtype=torch.int64)


def equal_units(units: int, tokens: int) -> Units:
    """A video of so many units, one after another, of `tokens` placeholders each."""
    return torch.arange(units).repeat_interleave(tokens)
