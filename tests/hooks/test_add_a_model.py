"""Follows docs/add-a-model.md with an invented class."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apet
import pytest
import torch
from apet.hooks import tiny
from apet.hooks.tiny import IMAGE
from postcard import Answering
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

RECIPE = Path(__file__).parents[2] / "docs" / "add-a-model.md"
SIDE = 16


class StampConfig(PretrainedConfig):
    model_type = "stamps"
    sub_configs = {"text_config": LlamaConfig}  # noqa: RUF012

    def __init__(self, text_config: dict[str, Any] | None = None, stamp_id: int = IMAGE, **kwargs: Any):
        self.text_config = LlamaConfig(**text_config) if isinstance(text_config, dict) else text_config or LlamaConfig()
        self.stamp_id = stamp_id
        super().__init__(**kwargs)


class Collection(PreTrainedModel):
    """The core model: `writer` continues the text, `critic` rates it."""

    config_class = StampConfig
    _supports_sdpa = True

    def __init__(self, config: StampConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.scan = nn.Linear(12, width)
        self.critic = LlamaModel(config.text_config)
        self.writer = LlamaModel(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.writer.embed_tokens

    def forward(self, input_ids: Tensor, pixel_values: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPast:
        x = self.writer.embed_tokens(input_ids)
        if pixel_values is not None:  # [stamps, 2 * SIDE, 12]
            seen = self.scan(pixel_values).tanh()
            seen = torch.cat([seen.mean(1, keepdim=True), seen], dim=1)  # [stamps, 1 + 2 * SIDE, D]
            there = (input_ids == self.config.stamp_id)[..., None]
            x = x.masked_scatter(there.expand_as(x), seen.to(x.dtype))
        return self.writer(inputs_embeds=x, **kwargs)


class StampsForGeneration(Answering):
    config_class = StampConfig
    base_model_prefix = "collection"
    core_class = Collection

    def get_input_embeddings(self) -> nn.Module:
        return self.collection.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def row(before: int, stamps: int, after: int, seed: int) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 99, (before + after,), generator=make).tolist()
    stamp = [*[IMAGE] * (1 + 2 * SIDE), 7]
    ids = torch.tensor([[*words[:before], *stamp * stamps, *words[before:]]])
    pixels = torch.randn(stamps, 2 * SIDE, 12, generator=make)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


@pytest.fixture
def blocks() -> Iterator[str]:
    return iter(re.findall(r"```python\n(.*?)```", RECIPE.read_text(), flags=re.DOTALL))


def test_recipe(blocks: Iterator[str], capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny.build(StampsForGeneration, StampConfig(tiny.config("llava").text_config.to_dict()))
    here: dict[str, Any] = {"model": model, "rows": [row(3, 1, 5, 0), row(1, 2, 2, 1)]}

    def follow(step: str) -> str:
        exec(compile(step, str(RECIPE), "exec"), here)
        return capsys.readouterr().out

    assert "2 decoders: critic (LlamaModel), writer (LlamaModel)" in follow(next(blocks))
    assert follow(next(blocks)) == ""
    left = follow(next(blocks))
    (kept,) = ast.literal_eval(left)
    assert kept[0] == 0
    assert [sum(low < n <= low + SIDE for n in kept) for low in (0, SIDE)] == [9, 9]
    assert follow(next(blocks)).count("standard deviations") == 4
    assert next(blocks, None) is None
    assert apet.options(model) is None
