"""Attention implementations: eager and flex against the recompute; flash attention with a replacement that records
calls."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import apet
import pytest
import torch
from conversations import collate
from families import FAMILIES, TAKES_CACHE_POSITION, Family, build, shared
from running import BOTH, NEW, STAGES, conversation, conversations, judge, reads_positions_as_packed, say
from torch import Tensor
from transformers import PreTrainedModel
from transformers import modeling_flash_attention_utils as flash_utils


@pytest.mark.parametrize("stage", STAGES)
def test_eager(family: Family, stage: str) -> None:
    rows = conversations(family)
    model = shared(family.name, "eager")
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(family, rows))
    judge(family, rows, said, STAGES[stage])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("qwen2_5_vl", "qwen2_vl", "video_llava")])
@pytest.mark.slow  # compiles
def test_flex(name: str) -> None:
    """Families for which transformers has flex attention. It is not compiled, since only the masks are tested."""
    family = FAMILIES[name]
    rows = conversations(family)[:3]
    model = shared(name, "sdpa")
    with use_attention(model, "flex_attention"), torch.compiler.set_stance("force_eager"):
        for batch in (rows, rows[:1]):
            with apet.patched(model, **BOTH):
                said = say(model, collate(family, batch))
            judge(family, batch, said, BOTH)


class use_attention:
    """Switches the language model of a model that was built with sdpa to another attention implementation."""

    def __init__(self, model: PreTrainedModel, name: str):
        self.config, self.name = model.model.language_model.config, name

    def __enter__(self) -> None:
        self.before = self.config._attn_implementation
        self.config._attn_implementation = self.name

    def __exit__(self, *_: object) -> None:
        self.config._attn_implementation = self.before


# ---- flash attention


@dataclass
class Call:
    """One call of a flash-attn function: the lengths of queries and keys of each sequence, and whether packed."""

    queries: list[int]
    keys: list[int]
    packed: bool


@dataclass
class Flash:
    """Replaces flash-attn: the same signatures and results, computed by plain torch, with a record of every call."""

    calls: list[Call] = field(default_factory=list)

    def dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        """q [B, Lq, H, D], k and v [B, Lk, Hkv, D]; no padding anywhere."""
        assert causal
        assert window_size == (-1, -1)
        self.calls.append(Call([q.shape[1]] * len(q), [k.shape[1]] * len(k), False))
        return torch.stack([attend(*row, softmax_scale) for row in zip(q, k, v, strict=True)])

    def varlen(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ) -> Tensor:
        """q [sum Lq, H, D], k and v [sum Lk, Hkv, D], split at the cu_seqlens."""
        assert causal
        assert window_size == (-1, -1)
        for cu, x, longest in ((cu_seqlens_q, q, max_seqlen_q), (cu_seqlens_k, k, max_seqlen_k)):
            assert cu.dtype == torch.int32
            assert int(cu[0]) == 0
            assert int(cu[-1]) == len(x)
            assert int(cu.diff().max()) == longest
        lengths = [cu.diff().tolist() for cu in (cu_seqlens_q, cu_seqlens_k)]
        self.calls.append(Call(*lengths, True))
        cut = [x.split(n) for x, n in ((q, lengths[0]), (k, lengths[1]), (v, lengths[1]))]
        return torch.cat([attend(*row, softmax_scale) for row in zip(*cut, strict=True)])


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Computes attention of q [Lq, H, D], k and v [Lk, Hkv, D]: causal, the last query aligned with the last key."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * (scale or q.shape[-1] ** -0.5)
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash:
    return stand_in(monkeypatch, "flash_attention_2")


def stand_in(monkeypatch: pytest.MonkeyPatch, implementation: str) -> Flash:
    notes = Flash()
    for name, value in {
        "_loaded_implementation": implementation,
        "_flash_fn": notes.dense,
        "_flash_varlen_fn": notes.varlen,
        "_pad_fn": flash_utils._pad_input,
        "_unpad_fn": flash_utils._unpad_input,
        "_process_flash_kwargs_fn": flash_utils._lazy_define_process_function(notes.varlen),
        "_process_with_kvcache_kwargs_fn": dict,
    }.items():
        monkeypatch.setattr(flash_utils, name, value, raising=False)
    return notes


def by_layer(calls: list[Call], layers: int = 4) -> list[list[Call]]:
    """Returns the calls of each forward."""
    return [calls[i : i + layers] for i in range(0, len(calls), layers)]


def check_lengths(calls: list[Call], results: list[Any], options: dict[str, Any], packed: bool, cached: bool) -> None:
    """Checks the calls of `say`: in each layer, the sequences are as long as the rows of `judge` are then."""
    forwards = by_layer(calls)
    assert len(forwards) == NEW
    for step, forward in enumerate(forwards):
        for layer, call in enumerate(forward):
            early = layer < options.get("llm_layer", 4)
            keys = [step + (r.length if early else r.deep_length) for r in results]
            assert call == Call([1] * len(keys) if cached and step else keys, keys, packed)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("cached", [True, False])
def test_flash_without_padding(family: Family, flash: Flash, stage: str, cached: bool) -> None:
    """A single sample has no mask, so the dense function is called, without packing, even if positions have gaps."""
    if stage == "second" and reads_positions_as_packed(family):
        pytest.skip("the early layers are the model's own, and it packs what it should not")
    options, model = STAGES[stage], shared(family.name)
    row = conversation(family, 2, "image1", 3, "image2", 4)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **options):
        said = say(model, collate(family, [row]), use_cache=cached)
    check_lengths(flash.calls, judge(family, [row], said, options), options, packed=False, cached=cached)


@pytest.mark.parametrize("stage", STAGES)
def test_flash_with_padding(family: Family, flash: Flash, stage: str) -> None:
    """Rows of different lengths are packed. In each layer, a sequence is as long as its row is then."""
    options, model, rows = STAGES[stage], shared(family.name), conversations(family)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **options):
        said = say(model, collate(family, rows))
    check_lengths(flash.calls, judge(family, rows, said, options), options, packed=True, cached=True)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flash_attention_3(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers calls it in the same way."""
    family, model = FAMILIES[name], shared(name)
    flash, rows = stand_in(monkeypatch, "flash_attention_3"), conversations(family)
    with use_attention(model, "flash_attention_3"), apet.patched(model, **BOTH):
        for batch in (rows, rows[:1]):
            judge(family, batch, say(model, collate(family, batch)), BOTH)
    assert {call.packed for call in flash.calls} == {True, False}


@pytest.mark.parametrize("stage", ["first", "both"])  # before the second alone, layers keep the padding
def test_flash_with_padding_that_goes(family: Family, flash: Flash, stage: str) -> None:
    """One padded row is packed again without its padding, so neither a mask nor the varlen function is needed."""
    options, model, row = STAGES[stage], shared(family.name), conversation(family, 3, "image", 5)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **options):
        said = say(model, collate(family, [row], pad_to=len(row.ids) + 6))
    judge(family, [row], said, options)
    assert not any(call.packed for call in flash.calls)


@pytest.mark.skipif(TAKES_CACHE_POSITION, reason="these versions read past the mask there, patched or not")
def test_flash_static_cache(family: Family, flash: Flash) -> None:
    rows = conversations(family)
    model = shared(family.name)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **BOTH):
        said = say(model, collate(family, rows), cache_implementation="static")
    judge(family, rows, said, BOTH)


def test_no_attention_weights(family: Family) -> None:
    """Attention weights are not requested: flash kernels have none, and sdpa would fall back to eager."""
    model = shared(family.name)
    asked: list[Any] = []

    def listen(_: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        asked.append(kwargs.get("output_attentions"))

    with ExitStack() as hooks:
        for layer in model.model.language_model.layers:
            hooks.enter_context(layer.self_attn.register_forward_pre_hook(listen, with_kwargs=True))
        with apet.patched(model, **BOTH):
            say(model, collate(family, conversations(family)))
    assert asked
    assert not any(asked)


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["flash_attention_2", "flash_attention_3"])
@pytest.mark.parametrize("name", FAMILIES)
def test_flash_on_a_gpu(name: str, attention: str) -> None:
    """Real flash attention against sdpa, in bfloat16 on the GPU; in the first stage both keep the same tokens."""
    family = FAMILIES[name]
    try:
        model = build(name, attention, torch.bfloat16).cuda()
    except ImportError as error:
        pytest.skip(f"{attention} is not installed: {error}")
    other = build(name, "sdpa", torch.bfloat16).cuda()
    rows = conversations(family)
    inputs = {key: value.cuda() for key, value in collate(family, rows, dtype=torch.bfloat16).items()}
    logits = []
    for one in (model, other):
        with apet.patched(one, keep=9, basis=4):
            logits.append(say(one, inputs, new=1).logits.float())
    torch.testing.assert_close(*logits, rtol=0, atol=0.15)
