"""Which decoders can keep positions with gaps: one error, when the model is patched, for those that cannot."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import apet
import pytest
import torch
import transformers
from apet.hooks import gaps, selfcheck, tiny
from conversations import collate
from families import build, reader, twin
from recompute import expected
from running import STAGES, conversation, say
from test_attention import use_attention
from test_positions import KEEP, KEPT, LLAVA, folder, tiny_model  # noqa: F401
from torch import Tensor, nn

CANNOT = {
    "nemotron_h_omni": "NemotronHModel: its layers take no rotary embeddings",
    "inkling_mm_model": "InklingTextModel: its layers take no rotary embeddings",
    "minimax_m3_vl": "MiniMaxM3VLTextModel: MiniMaxM3VLAttention reads positions itself, perhaps as places of keys",
    "glm5_next": "Glm5NextTextModel: its layers do not share one rotary embedding",
}


@pytest.mark.parametrize("name", CANNOT)
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="these models are of transformers 5")
def test_decoders_that_cannot_keep_positions(name: str) -> None:
    model = tiny_model(name)
    with pytest.raises(ValueError, match=rf"positions='keep' cannot be used with {CANNOT[name]}"):
        apet.patch(model, keep=0.4, **KEEP)
    assert apet.options(model) is None


def test_a_decoder_that_scales_attention_by_columns() -> None:
    model = build("llava")
    reader(model).config.attn_temperature_tuning = True
    with pytest.raises(ValueError, match="its layers scale attention by the number of earlier tokens"):
        apet.patch(model, keep=9, **KEEP)


class Reads(nn.Module):
    """Passes positions on to a part, and reads them itself."""

    def forward(self, x: Tensor, position_ids: Tensor, **kwargs: Any) -> Tensor:
        return x + position_ids


class Counts(nn.Module):
    def forward(self, x: Tensor, cache: Any) -> Tensor:
        return x + cache.get_seq_length()


class Takes(nn.Module):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + kwargs["position_ids"]


class Ignores(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return x


class PassesOn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Ignores()

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        attention_interface = self.part
        return self.part(x, position_ids) + attention_interface(x, position_ids=position_ids)


class Extends(PassesOn):
    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return super().forward(x, position_ids=position_ids)


class Renamed(nn.Module):
    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        return x + places


class Renames(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.part = Renamed()

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return self.part(x, position_ids)


def get_llama_4_attn_scale(positions: Tensor) -> Tensor:
    return positions


class Scales(nn.Module):
    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        return x * get_llama_4_attn_scale(position_ids)


def unread() -> nn.Module:
    """Returns a module whose code is in no file."""
    found: dict[str, Any] = {}
    exec("def forward(self, x, position_ids): return x + position_ids", found)
    return type("Unread", (nn.Module,), {"forward": found["forward"]})()


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (Reads, "Reads reads positions itself"),
        (Takes, "Takes reads positions itself"),
        (Counts, "Counts counts earlier tokens itself"),
        (unread, "Unread has code that cannot be read"),
        (Renames, "Renames reads positions itself"),
        (PassesOn, None),
        (Extends, None),
        (Scales, None),
    ],
)
def test_parts_of_layers_that_use_positions(part: Any, says: str | None) -> None:
    model = build("llava")
    reader(model).layers[1].part = part()
    with pytest.raises(ValueError, match=f"cannot be used with LlamaModel: {says}") if says else nullcontext():
        apet.patch(model, keep=9, check=False, **KEEP)
    assert (apet.options(model) is None) == (says is not None)


def test_layers_that_run_again_for_gradients() -> None:
    """Flash attention would be given positions with gaps then."""
    model = build("llava").train()
    reader(model).gradient_checkpointing = True
    apet.patch(model, keep=9, check=False, **KEEP)
    says = "gradient checkpointing and attn_implementation='flash_attention_2'"
    with torch.enable_grad(), use_attention(model, "flash_attention_2"), pytest.raises(ValueError, match=says):
        apet.patch(model, keep=9, check=False, **KEEP)


def test_rounding_of_rotary_embeddings() -> None:
    """Those of a compiled decoder may differ in their last bits; those of other positions differ by more."""
    decoder = reader(build("llava"))
    x, kept = torch.zeros(1, 3, 8), torch.tensor([[0, 5, 60]])
    for shift, known in ((0.0, True), (1e-3, True), (1.0, False)):
        given = decoder.rotary_emb(x, kept + shift)
        with nullcontext() if known else pytest.raises(ValueError, match="another rotary embedding"):
            gaps.check_rotary(decoder, kept, x, "full_attention", "Layer", given)


def test_scaled_queries_and_flash_attention() -> None:
    """When the model is patched, and if its attention is changed later, before any work."""
    model, inputs = build("llava"), collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    reader(model).layers[1].part = Scales()
    says = "LlamaModel and attn_implementation='flash_attention_2': its layers need positions"
    with use_attention(model, "flash_attention_2"), pytest.raises(ValueError, match=says):
        apet.patch(model, keep=9, check=False, **KEEP)
    apet.patch(model, keep=9, check=False, **KEEP)
    with use_attention(model, "flash_attention_2"), pytest.raises(ValueError, match=says):
        model(**inputs)


@pytest.mark.parametrize("stage", KEPT)
def test_layers_that_scale_queries_get_the_kept_positions(stage: str) -> None:
    """Others get counted ones, which no attention reads as packed sequences."""
    for scales in (True, False):
        model, row, told = build("llava"), conversation(LLAVA, 3, "image", 5), []
        if scales:
            reader(model).layers[1].part = Scales()
        apet.patch(model, **KEPT[stage], check=False)
        for layer in reader(model).layers:
            layer.register_forward_pre_hook(lambda _, a, k, t=told: t.append(k["position_ids"][0]), with_kwargs=True)
        said = say(model, collate(LLAVA, [row]), new=2)
        result = expected(twin("llava"), LLAVA, row, said.tokens[0, :-1].tolist(), **KEPT[stage])
        border = STAGES[stage].get("llm_layer", 4)
        for i, positions in enumerate(told[:4]):
            source = result.source if i < border else result.deep_source
            counted = torch.arange(len(source)) if stage != "second" or i >= border else source
            assert torch.equal(positions, source if scales else counted)
        late = len(row.ids) if scales or border == 4 else result.deep_length
        assert [int(positions) for positions in told[4:]] == [len(row.ids)] * border + [late] * (4 - border)


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="Ministral 3 is of transformers 5")
def test_ministral_3(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layers scale queries by their positions, so they are given the kept ones."""
    config = tiny.config("mistral3")
    text = transformers.Ministral3Config(
        **{n: getattr(config.text_config, n) for n in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim")},
        num_key_value_heads=config.text_config.num_key_value_heads,
        intermediate_size=config.text_config.intermediate_size,
        num_hidden_layers=tiny.LAYERS,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.5,
            "original_max_position_embeddings": 8,
        },
    )
    config.text_config = text
    model = tiny.build(transformers.Mistral3ForConditionalGeneration, config)
    for stage in selfcheck.STAGES:
        result = selfcheck.check(model, stage, positions="keep")
        assert result.error is None
        assert 0 < result.difference < selfcheck.TOLERANCE
    monkeypatch.setattr(gaps, "PLAIN", ("eager",))
    with pytest.raises(ValueError, match="its layers need positions"):
        apet.patch(model, keep=0.4, **KEEP)


def test_a_decoder_that_counts_its_tokens_itself() -> None:
    """Its rotary embedding is not that of the positions that it is given: an error before the first layer."""
    model, inputs = build("llava"), collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    decoder = reader(model)
    made = decoder.rotary_emb.forward

    class Counted(nn.Module):
        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            return made(x, torch.arange(x.shape[1])[None])

    apet.patch(model, keep=9, check=False, **KEEP)
    count = iter(range(9))
    decoder.rotary_emb = Counted()
    decoder.rotary_emb.register_forward_hook(
        lambda _, args, output: output if next(count) == 0 else tuple(made(*args))  # right when the hooks ask
    )
    with pytest.raises(ValueError, match="another rotary embedding than LlamaModel's rotary_emb makes"):
        model(**inputs)
