"""Models without an adapter in the package, made usable by `apet.register_adapter`, as docs/hooks.md describes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import apet
import pytest
import torch
from conversations import collate
from families import IMAGE, OTHERS, Family, build, shared, twin
from postcard import CACHE, PATCHES
from recompute import expected
from running import BOTH, FIRST, STAGES, TOLERANCE, conversation, conversations, judge, say
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PretrainedConfig, PreTrainedModel


class Postcards(apet.Adapter):
    """The detail of `postcard.py` that cannot be detected: the first token of an image is always kept."""

    def units(self, core: nn.Module, inputs: Mapping[str, Any], counts: Mapping[str, int]) -> dict[str, list[Tensor]]:
        image = torch.cat([torch.tensor([-1]), apet.one_unit(PATCHES)])
        return {"image": [image] * (counts["image"] // len(image))}


class PostcardsBeforeMix(Postcards):
    """The adapter of the same model, compressed before `mix`."""

    projector = "mix"


CASES = {
    "aya_vision": (OTHERS["aya_vision"], apet.Adapter()),
    "postcard": (OTHERS["postcard"], Postcards()),
    "postcard before mix": (dataclasses.replace(OTHERS["postcard"], projector="mix"), PostcardsBeforeMix()),
}


@pytest.fixture(params=list(CASES))
def other(request: pytest.FixtureRequest) -> Family:
    family, adapter = CASES[request.param]
    apet.register_adapter(family.name, adapter)
    return family


@pytest.mark.parametrize("stage", STAGES)
def test_batch(other: Family, stage: str) -> None:
    rows, model = conversations(other), shared(other.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(other, rows))
    judge(other, rows, said, STAGES[stage])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stage", STAGES)
def test_single(other: Family, stage: str, cached: bool) -> None:
    row, model = conversation(other, 2, "image1", 3, "image2", 4), shared(other.name)
    with apet.patched(model, **STAGES[stage]):
        said = say(model, collate(other, [row]), use_cache=cached)
    judge(other, [row], said, STAGES[stage])


def test_static_cache(other: Family) -> None:
    rows, model = conversations(other), shared(other.name)
    with apet.patched(model, **BOTH):
        said = say(model, collate(other, rows), cache_implementation="static")
    judge(other, rows, said, BOTH)


def test_eager(other: Family) -> None:
    rows, model = conversations(other), shared(other.name, "eager")
    with apet.patched(model, **BOTH):
        said = say(model, collate(other, rows))
    judge(other, rows, said, BOTH)


def test_keeping_all_and_unpatching(other: Family) -> None:
    rows, model = conversations(other), shared(other.name)
    before = say(model, collate(other, rows))
    with apet.patched(model, keep=1.0, llm_layer=2, llm_keep=1.0):
        during = say(model, collate(other, rows))
    after = say(model, collate(other, rows))
    assert torch.equal(before.logits, during.logits)
    assert torch.equal(before.logits, after.logits)


def test_copy(other: Family) -> None:
    rows, model = conversations(other), build(other.name)
    apet.patch(model, **BOTH)
    again = copy.deepcopy(model)
    apet.unpatch(model)
    judge(other, rows, say(again, collate(other, rows)), BOTH)
    judge(other, rows, say(model, collate(other, rows)), {})


# ---- a shell around a whole causal model ----------------------------------------------------------------------------


class ChatConfig(PretrainedConfig):
    model_type = "internvl_chat"


class InternVLChat(PreTrainedModel):
    """Built like the class in InternVL's own repositories: `language_model` is a whole causal model, and its `generate`
    is called with the embeddings of text and images. Its weights are those of the postcards."""

    config_class = ChatConfig

    def __init__(self) -> None:
        super().__init__(ChatConfig())
        parts = build("postcard")
        self.vision_model, self.mlp1 = parts.album.see, parts.album.mix
        self.language_model = LlamaForCausalLM(parts.config.text_config)
        self.language_model.model, self.language_model.lm_head = parts.album.reader, parts.lm_head

    def embeds(self, pixel_values: Tensor | None, input_ids: Tensor) -> Tensor:
        x = self.language_model.get_input_embeddings()(input_ids).clone()
        if pixel_values is not None:
            seen = self.vision_model(pixel_values)
            x[input_ids == IMAGE] = torch.cat([seen.mean(1, keepdim=True), self.mlp1(seen.tanh())], dim=1).flatten(0, 1)
        return x

    def forward(
        self,
        pixel_values: Tensor | None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
    ) -> Any:
        given = {"attention_mask": attention_mask, "position_ids": position_ids, CACHE: past_key_values}
        return self.language_model(inputs_embeds=self.embeds(pixel_values, input_ids), use_cache=use_cache, **given)

    def generate(self, pixel_values: Tensor | None = None, input_ids: Tensor | None = None, **more: Any) -> Tensor:
        return self.language_model.generate(inputs_embeds=self.embeds(pixel_values, input_ids), **more)


class Chats(Postcards):
    tokens = {"image": "img_context_token_id"}  # noqa: RUF012


@pytest.fixture
def chat() -> InternVLChat:
    """Returns the shell, with the adapter that the errors lead to."""
    model = InternVLChat()
    with pytest.raises(ValueError, match=r"Load the same weights as InternVLForConditionalGeneration"):
        apet.patch(model, **FIRST)
    apet.register_adapter("internvl_chat", apet.Adapter())
    with pytest.raises(ValueError, match=r"ChatConfig has no image_token_id.*an adapter's `tokens` says"):
        apet.patch(model, **FIRST)
    apet.register_adapter("internvl_chat", Chats())
    model.config.img_context_token_id = IMAGE  # which the class keeps elsewhere
    return model.eval()


@pytest.mark.parametrize("stage", STAGES)
def test_shell(chat: InternVLChat, stage: str) -> None:
    """A padded batch, and a token after it."""
    family, options = OTHERS["postcard"], STAGES[stage]
    rows = conversations(family)
    inputs = collate(family, rows)
    cache = DynamicCache()
    apet.patch(chat, check=False, **options)
    first = chat(**inputs, past_key_values=cache, use_cache=True)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    then = chat(None, torch.full((len(rows), 1), 11), mask, past_key_values=cache, use_cache=True)
    said = torch.stack([first.logits[:, -1], then.logits[:, -1]], dim=1)
    for b, row in enumerate(rows):
        want = expected(twin("postcard"), family, row, [11], **options).logits
        torch.testing.assert_close(said[b], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("how", ["by name", "by position", "class"])
def test_shell_that_encodes_in_generate(chat: InternVLChat, how: str) -> None:
    """No forward of the shell runs then, and nothing tells where the images are: an error, since nothing would be
    dropped."""
    family = OTHERS["postcard"]
    inputs, text = (collate(family, [conversation(family, *parts)]) for parts in ([3, "image", 5], [9]))
    pixels, ids = inputs["pixel_values"], inputs["input_ids"]
    calls: dict[str, Callable[[], Tensor]] = {
        "by name": lambda: chat.generate(pixel_values=pixels, input_ids=ids, max_new_tokens=3),
        "by position": lambda: chat.generate(pixels, ids, max_new_tokens=3),
        "class": lambda: InternVLChat.generate(chat, pixels, ids, max_new_tokens=3),
    }
    before = chat.generate(None, text["input_ids"], max_new_tokens=3)
    apet.patch(chat, check=False, **BOTH)
    with pytest.raises(ValueError, match=r"InternVLChat\.generate .* LlamaModel without a forward of InternVLChat"):
        calls[how]()
    assert torch.equal(chat.generate(None, text["input_ids"], max_new_tokens=3), before)
    apet.unpatch(chat)
    assert calls[how]().shape == (1, 3)
