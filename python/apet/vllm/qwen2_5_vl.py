"""Qwen2.5-VL in vLLM (`Qwen2_5_VLForConditionalGeneration`), images and videos.

Modifications:
- an image or video has as many placeholders as tokens are kept of it;
- merged embeddings are compressed, those of each temporal step of a video by themselves;
- kept tokens keep their M-RoPE positions, and text after an image keeps the positions that it has without compression:
  the grid gives those of text, and vLLM's mechanism for pruned video (EVS) attaches those of kept tokens to embeddings.

vLLM enables EVS at start-up only, so `apet_keep` must be set there (1.0: all tokens, unless a request asks for less).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItems
from vllm.multimodal.parse import MultiModalDataItems
from vllm.platforms import current_platform

from ..hooks.config import Options
from . import options, processing
from .compress import Item, Model, compress

DIGITS = 3  # of a position, base 256: whole numbers that every dtype of embeddings holds exactly
CHANNELS = 3 * DIGITS


class QwenInfo(processing.Info, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """Rejects requests with compression if the engine was started without `apet_keep`."""

    def options(self, kwargs: Any) -> Options | None:
        wanted = super().options(kwargs)
        if wanted and not options.of(self.ctx.get_mm_config().mm_processor_kwargs or {}):
            raise ValueError(
                f"apet_keep={wanted.keep} in a request needs an engine started with apet_keep for Qwen2.5-VL; start it "
                "with mm_processor_kwargs={'apet_keep': 1.0}, which keeps all tokens of other requests"
            )
        return wanted


class QwenProcessor(processing.Processor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """An image is a unit, and so is each temporal step of a video."""

    def lengths(
        self, modality: str, item: int, items: MultiModalDataItems, made: MultiModalKwargsItems, tokens: int
    ) -> list[int]:
        steps = int(made[modality][item][f"{modality}_grid_thw"].data[0])
        return [tokens // steps] * steps


@MULTIMODAL_REGISTRY.register_processor(
    QwenProcessor, info=QwenInfo, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder
)
class Qwen2_5_VL(Model, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """vLLM's Qwen2.5-VL, with compression between merger and language model."""

    def check(self, vllm_config: VllmConfig, at_start: Options) -> None:
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

    def _parse_and_validate_image_input(self, **kwargs: Any) -> qwen2_5_vl.Qwen2_5_VLImageInputs | None:
        inputs = super()._parse_and_validate_image_input(**kwargs)
        if inputs is not None:
            inputs.apet = kwargs.get("apet_image")
        return inputs

    def _parse_and_validate_video_input(self, **kwargs: Any) -> qwen2_5_vl.Qwen2_5_VLVideoInputs | None:
        inputs = super()._parse_and_validate_video_input(**kwargs)
        if inputs is not None:
            inputs.apet = kwargs.get("apet_video")
        return inputs

    def _postprocess_image_embeds_evs(
        self, image_embeds_split: Sequence[Tensor], image_input: Any
    ) -> tuple[Tensor, ...]:
        if self.at_start is None:
            return super()._postprocess_image_embeds_evs(image_embeds_split, image_input)
        grids = image_input["image_grid_thw"].tolist()
        return self._kept(image_embeds_split, grids, [1.0] * len(grids), image_input.apet)

    def _postprocess_video_embeds_evs(
        self, video_embeds_split: Sequence[Tensor], video_input: Any
    ) -> tuple[Tensor, ...]:
        if self.at_start is None:
            return super()._postprocess_video_embeds_evs(video_embeds_split, video_input)
        grids = video_input["video_grid_thw"].tolist()
        seconds = video_input.get("second_per_grid_ts")
        per_second = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        each = [1.0] * len(grids) if seconds is None else seconds.flatten().tolist()
        return self._kept(video_embeds_split, grids, [s * per_second for s in each], video_input.apet)

    def _kept(
        self,
        embeddings: Sequence[Tensor],
        grids: Sequence[Sequence[int]],
        steps: Sequence[float],
        packed: Tensor | None,
    ) -> tuple[Tensor, ...]:
        """Per item the kept embeddings [K, D + CHANNELS], the last channels holding their positions in the grid."""
        merge = self.config.vision_config.spatial_merge_size
        items = [
            Item(o, [len(x) // grid[0]] * grid[0])
            for o, x, grid in zip(options.unpack(packed, len(grids)), embeddings, grids, strict=True)
        ]
        places = [positions(t, h // merge, w // merge, step) for (t, h, w), step in zip(grids, steps, strict=True)]
        channels = encode(torch.from_numpy(np.concatenate(places, axis=1)))
        x = torch.cat(list(embeddings))
        channels = channels.to(x.device, x.dtype)
        if any(item.gone for item in items):
            x, indices = compress(x, items)
            channels = channels[indices]
        return torch.cat([x, channels], dim=1).split([sum(item.kept) for item in items])

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[Tensor, int]:
        """Positions [3, N] and what decoding adds to its own. Which tokens are kept is not known yet: in their columns
        stands -1 less the item's first position, until `recompute_mrope_positions` has their embeddings."""
        if self.at_start is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)
        where = np.empty((3, len(input_tokens)), np.int64)
        column = following = 0
        features = sorted(mm_features, key=lambda feature: feature.mm_position.offset)
        for feature, (offset, *grid, step) in zip(features, self.iter_mm_grid_thw(mm_features), strict=True):
            where[:, column:offset] = np.arange(offset - column) + following
            following += offset - column
            column = offset + feature.mm_position.length
            full = positions(*grid, step)
            where[:, offset:column] = full + following if full.shape[1] == column - offset else -1 - following
            following += int(full.max()) + 1
        where[:, column:] = np.arange(len(input_tokens) - column) + following
        following += len(input_tokens) - column
        return torch.from_numpy(where), following - len(input_tokens)

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Splits the positions off the embeddings of a prompt's next chunk, and puts them in their columns, once."""
        if self.at_start is None:
            return super().recompute_mrope_positions(
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        with qwen2_5_vl.gpu_sync_allowed():
            where = mrope_positions.clone()
            if multimodal_embeddings:
                relative = decode(torch.cat([x[:, -CHANNELS:] for x in multimodal_embeddings])).to(where.device)
                ids = torch.as_tensor(input_ids, device=where.device)
                visual = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
                columns = visual[num_computed_tokens:].nonzero().view(-1)[: relative.shape[1]] + num_computed_tokens
                before = where[:, columns]
                where[:, columns] = torch.where(before < 0, relative - before - 1, before)
            delta = int(where.max()) + 1 - where.shape[1]
        return [x[:, :-CHANNELS] for x in multimodal_embeddings], where, delta


def tell_cpu_runner() -> None:
    """Makes vLLM's CPU runner check whether embeddings carry positions: its own value is from before the model is
    loaded."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    def asks(runner: Any) -> bool:
        return getattr(runner.model, "at_start", None) is not None

    CPUModelRunner.is_multimodal_pruning_enabled = property(asks, lambda runner, value: None)


def positions(steps: int, height: int, width: int, step: float) -> np.ndarray:
    """M-RoPE positions [3, steps * height * width] of a grid of merged tokens, the first at 0; a temporal step counts
    for `step`."""
    grid = np.indices((steps, height, width)).reshape(3, -1)
    grid[0] = (grid[0] * step).astype(np.int64)
    return grid


def encode(where: Tensor) -> Tensor:
    """Positions [3, N] -> their digits [N, CHANNELS]."""
    return torch.stack([where >> (8 * digit) & 255 for digit in range(DIGITS)]).flatten(0, 1).T


def decode(channels: Tensor) -> Tensor:
    """[N, CHANNELS] of any dtype -> positions [3, N]."""
    digits = channels.T.reshape(DIGITS, 3, -1).long()
    return sum(digits[digit] << (8 * digit) for digit in range(DIGITS))
