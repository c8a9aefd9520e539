"""The common part of models with M-RoPE positions in vLLM: their images and videos are grids of merged patches.

Modifications: those of `compress.Model`; an image is a unit, and so is each temporal step of a video. Kept tokens keep
their M-RoPE positions, and the text after an image keeps the positions that it has without compression: vLLM computes
the positions of the whole prompt, and its mechanism for pruned video (EVS) attaches to the embeddings the data from
which the positions of kept tokens follow.

vLLM enables EVS at start-up only, so `apet_keep` must be set there (1.0: all tokens, unless a request asks for less).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs
from vllm.platforms import current_platform
from vllm.utils.gpu_sync_debug import gpu_sync_allowed

from ..engines import options, plan
from . import processing
from .compress import Model

DIGITS = 2  # of a row or column number, base 256: every dtype of embeddings holds such whole numbers exactly
CHANNELS = 2 * DIGITS


class Info(processing.Info):
    """Rejects requests with compression if the engine was started without `apet_keep`."""

    def options(self, kwargs: Mapping[str, object]) -> options.Wanted | None:
        wanted = super().options(kwargs)
        if wanted and not options.of(self.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(
                f"apet_keep={wanted.keep} in a request needs an engine started with apet_keep for this model; start it "
                "with mm_processor_kwargs={'apet_keep': 1.0}, which keeps all tokens of other requests"
            )
        return wanted


class Steps(processing.Processor):
    """An image is a unit, and so is each temporal step of a video."""

    def apply(self, inputs: ProcessorInputs, timing_ctx: Any) -> Any:
        found = super().apply(inputs, timing_ctx)
        wanted = self.info.options(inputs.hf_processor_mm_kwargs)
        if wanted and not wanted.all_tokens:
            with processing.forgotten_if_rejected(inputs.cache, found):
                self.check(found)
        return found

    def check(self, found: Any) -> None:
        """Raises ValueError if the prompt has placeholder tokens of no image or video: `recompute_mrope_positions`
        finds the places of embeddings by these tokens."""
        config = self.info.get_hf_config()
        ids = torch.tensor(found["prompt_token_ids"])
        visual = int(((ids == config.image_token_id) | (ids == config.video_token_id)).sum())
        ranges = [one for modality in processing.VISUAL for one in found["mm_placeholders"].get(modality, ())]
        more = visual - sum(one.get_num_embeds() for one in ranges)
        if more:
            raise ValueError(
                f"the prompt has {more} tokens of images or videos (such as <|image_pad|>) that stand for none; with "
                "apet_keep, leave them out"
            )

    def units(self, modality: str, item: MultiModalKwargsItem, ids: Tensor) -> Tensor:
        return processing.equal_units(ids, len(ids) // int(item[f"{modality}_grid_thw"].data[0]))


class MRope(Model):
    """A mixin for vLLM's models with M-RoPE positions."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # The runner is told that embeddings carry positions, but vLLM's model must not append its own.
        if self.at_start:
            self.supports_multimodal_pruning = True
            self.is_multimodal_pruning_enabled = False

    def check(self, vllm_config: VllmConfig) -> None:
        config = vllm_config.model_config.multimodal_config
        if rate := config.video_pruning_rate:
            raise ValueError(f"apet_keep and video_pruning_rate={rate} both drop tokens of a video; choose one")
        if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise ValueError(f"apet_keep: with pipeline_parallel_size={stages} later stages get no M-RoPE positions")
        if vllm_config.speculative_config is not None:
            raise ValueError("apet_keep: a draft model gets no M-RoPE positions; leave out speculative_config")
        # vLLM's model and runners call this to know whether embeddings carry positions; vLLM's own version tests
        # video_pruning_rate. A partial can be pickled.
        config.is_multimodal_pruning_enabled = functools.partial(bool, True)
        if current_platform.is_cpu():
            tell_cpu_runner()

    def get_encoder_cudagraph_config(self) -> Any:
        # Without options at start-up no item is shortened, so vLLM's graphs of the encoder do what the model does.
        return super(Model if self.at_start is None else MRope, self).get_encoder_cudagraph_config()

    def finish(self, rows: Sequence[Tensor], left: Tensor | None, inputs: dict[str, Any]) -> list[Tensor]:
        """Appends to every row, as [N, D + CHANNELS], its place in the grid of its unit."""
        if self.at_start is None:
            return rows
        grids = inputs.get("image_grid_thw", inputs.get("video_grid_thw"))
        merge = self.config.vision_config.spatial_merge_size
        places = torch.cat([places_of(t, h // merge, w // merge) for t, h, w in grids.tolist()])
        places = places.to(rows[0].device, rows[0].dtype)
        places = places if left is None else places[left]
        channels = places.split([len(row) for row in rows])
        return [torch.cat(pair, dim=1) for pair in zip(rows, channels, strict=True)]

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Returns the positions [3, N], and the offset of positions in decoding. Which tokens are kept is not known
        yet: their columns hold -1 minus the position of their unit's first token, until `recompute_mrope_positions` has
        the embeddings."""
        if self.at_start is None:
            if any(plan.of(feature.data) for feature in mm_features):
                raise RuntimeError("this engine got shortened images or videos, but was started without apet_keep")
            return super().get_mrope_input_positions(input_tokens, mm_features)
        times = torch.ones(len(input_tokens), dtype=torch.int64)  # tokens of the whole prompt that each one replaces
        unknown, first, whole, more = [], [], [], 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            place, made = feature.mm_position, plan.of(feature.data)
            embedded = place.is_embed if place.is_embed is not None else torch.ones(place.length, dtype=torch.bool)
            length = place.length
            if made is not None:
                columns = embedded.nonzero()[:, 0] + place.offset
                stay = (~made.removed).nonzero()[:, 0]
                times[columns] = stay.diff(append=torch.tensor([len(made.removed)]))
                units = made.units[stay]
                unknown.append(columns)
                first.append(columns[torch.searchsorted(units, units)])
                length += made.gone
                embedded = embedded.repeat_interleave(times[place.offset : place.offset + place.length])
            whole.append(replace(feature, mm_position=PlaceholderRange(place.offset + more, length, embedded)))
            more += length - place.length
        tokens = torch.tensor(input_tokens).repeat_interleave(times).tolist()
        where, following = super().get_mrope_input_positions(tokens, whole)
        where = where[:, times.cumsum(0) - times].clone()
        if unknown:
            where[:, torch.cat(unknown)] = -1 - where[:, torch.cat(first)]
        return where, following + more

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Splits the places off the embeddings of a prompt's next chunk, and writes the positions into their columns,
        once."""
        if self.at_start is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        with gpu_sync_allowed():
            where = mrope_positions.clone()
            if multimodal_embeddings:
                places = decode(torch.cat([x[:, -CHANNELS:] for x in multimodal_embeddings])).to(where.device)
                ids = torch.as_tensor(input_ids, device=where.device)
                visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
                columns = visual[num_computed_tokens:].nonzero().view(-1)[: places.shape[1]] + num_computed_tokens
                before = where[:, columns]
                where[:, columns] = torch.where(before < 0, places - before - 1, before)
            delta = int(where.max()) + 1 - where.shape[1]
        return [x[:, :-CHANNELS] for x in multimodal_embeddings], where, delta


def tell_cpu_runner() -> None:
    """Makes vLLM's CPU runner ask the model whether embeddings carry positions: the runner's own value is set before
    the model is loaded."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asks(runner: Any) -> bool:
        return isinstance(runner.model, MRope) and runner.model.at_start is not None

    CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda runner, value: None)


def places_of(steps: int, height: int, width: int) -> Tensor:
    """Returns the row and column of every token of a grid, as digits [steps * height * width, CHANNELS]."""
    grid = torch.cartesian_prod(torch.arange(height), torch.arange(width)).view(-1, 2).repeat(steps, 1)
    return torch.cat([grid >> (8 * digit) & 255 for digit in range(DIGITS)], dim=1)


def decode(channels: Tensor) -> Tensor:
    """Converts digits [N, CHANNELS] of any dtype to positions [3, N] within a unit, in which the temporal axis is 0."""
    digits = channels.T.reshape(DIGITS, 2, -1).long()
    return torch.nn.functional.pad(sum(digits[d] << (8 * d) for d in range(DIGITS)), (0, 0, 1, 0))
