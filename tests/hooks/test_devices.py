"""Models whose parts are on several devices, as accelerate's `device_map` puts them. `devices.py` imitates these.

The results must be those of the same patched model on one device, which other tests compare with the recompute.
"""

from __future__ import annotations

from typing import Any

import apet
import pytest
import torch
import transformers
from conversations import collate
from devices import Placed, devices, place
from families import FAMILIES, IMAGE, OTHERS, build, core, reader, takes
from running import STAGES, TOLERANCE, conversation
from torch import Tensor, nn
from transformers import Cache, StaticCache

FOUR = transformers.__version__.startswith("4.")
# Torch sets nothing up for devices of this type.
FIRST_DEVICE, SECOND_DEVICE = torch.device("cpu", 1), torch.device("cpu", 2)


def spread(model: nn.Module, border: int) -> None:
    """Puts the parts of a model on two devices: the projector, the decoder layers from `border` on and everything after
    them on the second one, and the rotary embedding, too. It is the last module of its decoder, so accelerate puts it
    there."""
    text, whole = reader(model), core(model)
    for name, module in whole.named_children():
        if module is not text:
            place(module, SECOND_DEVICE if "projector" in name else FIRST_DEVICE)
    place(text.embed_tokens, FIRST_DEVICE)
    for i, layer in enumerate(text.layers):
        place(layer, FIRST_DEVICE if i < border else SECOND_DEVICE)
    for module in (text.norm, text.rotary_emb, model.lm_head):
        place(module, SECOND_DEVICE)


def inputs_of(name: str, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the inputs of a prefill of two rows, and of a step after it."""
    family = (FAMILIES | OTHERS)[name]
    rows = [conversation(family, 3, "image", 5), conversation(family, 2, "image1", 3, seed=1)]
    inputs = collate(family, rows)
    if takes(model, "token_type_ids"):  # then the tokens of an image see each other both ways
        inputs["token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 2, dtype=torch.long)], dim=1)
    step = {"input_ids": torch.tensor([[7, 9], [8, 4]])}
    if not family.ragged:  # Qwen's would make positions of every column of it
        step["attention_mask"] = mask
    return inputs, step


def answers(model: nn.Module, prefill: dict[str, Tensor], step: dict[str, Tensor], cache: Cache) -> tuple[Any, Any]:
    return (
        model(**prefill, past_key_values=cache, use_cache=True).logits,
        model(**step, past_key_values=cache, use_cache=True).logits,
    )


@pytest.mark.parametrize("border", [3, 2, 1])
@pytest.mark.parametrize(
    "stage", ["both", *(pytest.param(stage, marks=pytest.mark.slow) for stage in ("unpatched", "first", "second"))]
)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "gemma3", pytest.param("qwen2_5_vl", marks=pytest.mark.slow)])
def test_prefill_and_a_step(name: str, static: bool, stage: str, border: int) -> None:
    """`llm_layer` is 2. The decoder layers before the border are on the first device."""
    if FOUR and name == "qwen3_vl":
        pytest.skip("transformers 4: its vision tower adds positions on the CPU")
    model = build(name, "eager")
    if FOUR and name == "gemma3" and stage in ("both", "second"):
        with pytest.raises(ValueError, match="do not share one rotary embedding"):
            apet.patch(model, **STAGES[stage])
        return

    def cache() -> Cache:
        config = model.config.get_text_config()
        if not static:
            return transformers.DynamicCache(config=config)
        return StaticCache(config=config, max_cache_len=128)

    inputs = inputs_of(name, model)
    if stage != "unpatched":
        apet.patch(model, **STAGES[stage])
    want = answers(model, *inputs, cache())
    spread(model, border)
    there = [{key: Placed(value, FIRST_DEVICE) for key, value in given.items()} for given in inputs]
    with devices():
        found = answers(model, *there, cache())
    for one, other in zip(found, want, strict=True):
        assert one.device == SECOND_DEVICE
        torch.testing.assert_close(one.inner, other, rtol=0, atol=TOLERANCE)


def test_a_tensor_of_another_device_is_noticed() -> None:
    one, other = (torch.zeros(3) for _ in range(2))
    with devices(), pytest.raises(RuntimeError, match="same device, but found cpu:1, cpu:2"):
        Placed(one, FIRST_DEVICE) + Placed(other, SECOND_DEVICE)
