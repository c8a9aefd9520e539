"""Models in which dropping tokens could go wrong without an error, compared with the reference (hooks/reference.py).

The reference runs the unpatched decoder on one row at a time, without padding and cache, with every argument along the
sequence gathered. A comparison of cached and recomputed answers would find few of these faults, since both have them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import apet
import pytest
import torch
import transformers
from apet import calls
from apet.hooks import selfcheck, tiny
from apet.hooks.adapters import GENERIC, adapter_for
from apet.hooks.selfcheck import NAMES, PROMPTS, TOLERANCE, prompt
from torch import nn
from transformers import AutoConfig, PretrainedConfig

import apet_kernels

# Other versions have fewer of these models, and with them `patch` makes the same comparison.
WRITTEN_FOR = "5.24."
pytestmark = pytest.mark.skipif(
    not transformers.__version__.startswith(WRITTEN_FOR), reason=f"the tiny models are of {WRITTEN_FOR}*"
)
FIRST = apet.Options(keep=0.4, basis=4)
BOTH = apet.Options(keep=0.4, basis=4, llm_layer=2, llm_keep=0.5)


def bidirectional(config: PretrainedConfig) -> None:
    """Large Gemma 4 models: only in the mask of sliding layers do tokens of an image attend to later ones."""
    config.text_config.use_bidirectional_attention = "vision"
    config.text_config.hidden_size_per_layer_input = 0


def all_slide(config: PretrainedConfig) -> None:
    config.text_config.sliding_window = 8
    config.text_config.layer_types = ["sliding_attention"] * config.text_config.num_hidden_layers


@dataclass(frozen=True)
class Trap:
    """A type of model, and the reason why it is tested here."""

    type: str
    change: Callable[[PretrainedConfig], None] | None = None
    decoder: str | None = None
    attention: str | None = None
    second: str | None = None  # the error of `patch` or the call if there is no second stage


TRAPS = {
    "images that see ahead, in every layer": Trap("gemma3"),
    "images that see ahead, in sliding layers only": Trap("gemma4", bidirectional),
    "one mask of four dimensions": Trap("molmo2"),
    "one mask for full and sliding layers": Trap("paligemma", decoder="gemma2", attention="eager"),
    "windows counted over what is left": Trap("llava", all_slide, "mistral"),
    "chunks": Trap("llama4"),
    "inputs of each layer": Trap("gemma4"),
    "deepstack": Trap("qwen3_vl_moe"),
    "features added from the first layer on, to zeros": Trap("granite4_vision"),
    "deepstack and a rope for each kind of layer": Trap("cohere_compass"),
    "experts chosen by token type": Trap("ernie4_5_vl_moe"),
    "four axes of positions": Trap("hunyuan_vl"),
    "positions along three axes": Trap("glm4v"),
    "layers that need positions": Trap("mistral3", decoder="ministral3"),
    "layers that need positions, without a rope": Trap("inkling2", second="hybrid"),
    "a recurrent state": Trap("qwen3_5"),
    "short convolutions": Trap("lfm2_vl"),
    "a state, streams and another name of its mask": Trap("qwen4_exp", second="its indexer reads the rotary"),
    "layers that turn nothing": Trap("muse_glimmer"),
    "best keys handed on to later layers": Trap("mistral_large4", second="prev_topk_indices"),
    "best keys handed on, and streams": Trap("hy_v4_vl", second="prev_topk_indices"),
}


def _no_image_outputs(_: nn.Module, args: Any, output: Any) -> None:
    object.__setattr__(output, "image_outputs", None)


def build(trap: Trap) -> nn.Module:
    if trap.type not in NAMES or not hasattr(transformers, NAMES[trap.type]):
        pytest.skip("this version has no such model")
    config = tiny.config(trap.type, trap.decoder)
    if trap.change is not None:
        trap.change(config)
    model = tiny.build(getattr(transformers, NAMES[trap.type]), config, trap.attention)
    if trap.type == "llama4":  # 5.24.0 reads a field that its decoder's output lacks
        model.language_model.register_forward_hook(_no_image_outputs)
    return model


def rows_of(model: nn.Module) -> list[Any]:
    """Returns two prompts, or one if the unpatched model gives other results for a padded batch than for its rows."""
    rows = [prompt(model, parts, seed) for seed, parts in enumerate(PROMPTS)]
    return rows if selfcheck.unpatched(model, rows) < TOLERANCE else rows[:1]


@pytest.mark.parametrize("name", TRAPS)
def test_first_stage(name: str) -> None:
    model = build(TRAPS[name])
    assert adapter_for(model) is GENERIC or TRAPS[name].type in ("granite4_vision", "llava", "molmo2")
    assert selfcheck.judge(model, rows_of(model), FIRST) < TOLERANCE


@pytest.mark.parametrize("name", TRAPS)
def test_both_stages(name: str) -> None:
    trap = TRAPS[name]
    model = build(trap)
    rows = rows_of(model)
    if trap.second is not None:
        with pytest.raises(ValueError, match=trap.second):
            selfcheck.judge(model, rows, BOTH)
    else:
        assert selfcheck.judge(model, rows, BOTH) < TOLERANCE


@pytest.mark.parametrize("name", ["windows counted over what is left", "a recurrent state", "chunks"])
def test_cache_of_fixed_size(name: str) -> None:
    """The cache of a sliding layer is as short as the window, and a state has no length."""
    model = build(TRAPS[name])
    assert selfcheck.judge(model, rows_of(model), BOTH, static=True) < TOLERANCE


@pytest.mark.parametrize(
    "name", ["a recurrent state", "short convolutions", "a state, streams and another name of its mask"]
)
@pytest.mark.parametrize("stage", ["first", "both"])
def test_a_later_turn_of_several_tokens_in_a_cache_of_fixed_size(name: str, stage: str) -> None:
    """Layers that keep a state take in the new tokens, as with a cache that grows."""
    trap = TRAPS[name]
    if stage == "both" and trap.second is not None:
        pytest.skip("it has no second stage")
    model = build(trap)
    row = prompt(model, PROMPTS[0], 0)
    how: dict[str, Any] = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    how |= {"return_dict_in_generate": True, "output_logits": True}
    options: dict[str, Any] = {"keep": 0.4, "basis": 4, "check": False}
    if stage == "both":
        options |= {"llm_layer": 2, "llm_keep": 0.5}
    found = []
    with apet.patched(model, **options):
        for kind in ({}, {"cache_implementation": "static"}):
            first = model.generate(**row, **how, **kind, max_length=None)
            ids = torch.cat([first.sequences, first.sequences[:, -2:], first.sequences[:, -1:]], 1)
            again = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            second = model.generate(**again, past_key_values=first.past_key_values, **how)
            found.append(torch.stack(second.logits, 1))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=TOLERANCE)


def test_images_after_a_cached_text_in_layers_of_several_kinds() -> None:
    """Gemma 3 gives every kind of layers a mask of four dimensions, in which cached tokens are columns, too."""
    model = build(TRAPS["images that see ahead, in every layer"])
    row = prompt(model, PROMPTS[0], 0)
    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in row]
    start = 2
    results = []
    with torch.no_grad(), apet.patched(model, keep=3, basis=2, check=False):
        results.append(
            model.generate(**row, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True)
        )
        cache = model(**{name: row[name][:, :start] for name in names}, use_cache=True).past_key_values
        results.append(
            model.generate(
                **row,
                past_key_values=cache,
                max_new_tokens=3,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        )
    whole, after = (torch.stack(one.logits, 1) for one in results)
    torch.testing.assert_close(after, whole, rtol=0, atol=TOLERANCE)


def test_positions_that_are_counted_from_1() -> None:
    """PaliGemma's, if no first stage has counted them anew; attention depends on their differences."""
    model = build(TRAPS["one mask for full and sliding layers"])
    row = prompt(model, PROMPTS[0], 0)
    length = row["input_ids"].shape[1]
    with torch.no_grad(), apet.patched(model, llm_layer=2, llm_keep=0.5, basis=4, check=False):
        from_1 = model(**row).logits
        kept = apet.kept(model).lengths
        from_0 = model(**row, position_ids=torch.arange(length)[None]).logits
    assert kept[0] == length > kept[-1]
    torch.testing.assert_close(from_1, from_0, rtol=0, atol=1e-4)


def test_hidden_states_that_were_not_asked_for() -> None:
    """transformers puts None in their places."""
    model = build(TRAPS["images that see ahead, in every layer"])
    row = prompt(model, PROMPTS[0], 0)
    with torch.no_grad(), apet.patched(model, keep=3, basis=2, check=False):
        every = model.model(**row, output_hidden_states=True).hidden_states
        last = model.model(**row, output_hidden_states=-1).hidden_states
    if None not in last:
        pytest.skip("this version returns all of them")
    torch.testing.assert_close(last[-1], every[-1], equal_nan=True)


def test_features_of_the_first_layer_are_compressed_where_embeddings_are_zeros() -> None:
    """The decoder still gets zeros as embeddings. Features for later layers, and newline tokens, stay as they are."""
    model = build(TRAPS["features added from the first layer on, to zeros"])
    row, given = prompt(model, PROMPTS[0], 0), []

    def listen(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        given.append(kwargs)

    with torch.no_grad():
        features = model.model.get_image_features(row["pixel_values"], row["image_sizes"]).deepstack_features
        with apet.patched(model, keep=3, check=False), calls.Recorder() as recorder:
            handle = model.model.language_model.register_forward_pre_hook(listen, with_kwargs=True)
            model(**row)
            handle.remove()
            visuals = apet.kept(model).visuals
    by_layer = {layer: torch.cat(packed) for layer, packed in features}
    (call,), (decoder,) = recorder.calls, given
    newline = (by_layer[0] == model.model.image_newline).all(-1)
    assert newline.any()
    assert len(call.x) == (~newline).sum()
    place = (call.x[:, None] == by_layer[0]).all(-1).long().argmax(-1)  # of each token, which the call has by tile
    assert torch.equal(call.x, by_layer[0][place])
    assert len(place.unique()) == len(place)
    assert call.keeps == [3] * len(call.lengths)
    starts = torch.tensor([0, *(one.tokens for one in visuals)]).cumsum(0)
    left = torch.cat([one.remaining[0] + start for one, start in zip(visuals, starts[:-1], strict=True)])
    assert newline[left].sum() == newline.sum()
    assert torch.equal(decoder["deepstack_features"][1], by_layer[1][left])
    rows = decoder["deepstack_features"][0]
    compressed = apet_kernels.compress_packed(call.x, call.lengths, call.keeps)
    order = place[compressed.indices].argsort()
    assert torch.equal(rows[newline[left]], by_layer[0][newline])
    assert torch.equal(left[~newline[left]], place[compressed.indices][order])
    assert torch.equal(rows[~newline[left]], compressed.tokens[order])
    mask = decoder["vision_mask"].flatten(1)
    assert mask.sum() == len(left)
    assert not decoder["inputs_embeds"][mask].any()


def test_zeros_that_get_features_from_a_later_layer_alone_raise() -> None:
    """Such tokens cannot be ranked, whatever a configuration says."""
    model = build(TRAPS["features added from the first layer on, to zeros"])

    def later(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        features = {layer: x for layer, x in kwargs["deepstack_features"].items() if layer}
        return args, {**kwargs, "deepstack_features": features}

    model.model.language_model.register_forward_pre_hook(later, with_kwargs=True)
    with apet.patched(model, keep=3, check=False), pytest.raises(ValueError, match=r"features from layer 1 on"):
        model(**prompt(model, PROMPTS[0], 0))


# ---- models that `patch` rejects -------------------------------------------------------------------------------------


def attends_late(config: PretrainedConfig) -> None:
    kinds = config.text_config.layers_block_type
    kinds[1], kinds[2] = kinds[2], kinds[1]


def shared_keys(config: PretrainedConfig) -> None:
    config.text_config.num_kv_shared_layers = 2


@pytest.mark.parametrize(
    ("trap", "says"),
    [
        (Trap("gemma4", shared_keys), "last 2 layers use the keys and values of earlier ones"),
        (Trap("nemotron_h_omni", attends_late), "llm_layer=3 is the least"),
        (Trap("inkling2"), "layers of type hybrid, hybrid_sliding"),
    ],
)
def test_no_second_stage(trap: Trap, says: str) -> None:
    model = build(trap)
    with pytest.raises(ValueError, match=says):
        apet.patch(model, keep=9, llm_layer=2, llm_keep=0.5, check=False)
    assert apet.options(model) is None


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mllama", "cross_attention_states|finds no decoder|attends to image states"),
        ("florence2", "encoder-decoder"),
        ("blip-2", "fewer than compression would"),
        ("chameleon", "ids of a codebook"),
        ("granite4_vision", "zeros where its decoder begins"),
        ("phi4_multimodal", "runs its decoder layers itself"),
        ("qwen2_5_omni", r"apet\.patch\(model\.thinker"),
        ("qwen2_audio", "takes no images"),
    ],
)
def test_other_models_say_why_not(name: str, says: str) -> None:
    """The classes have no weights, but their real sizes."""
    if name not in NAMES or not hasattr(transformers, NAMES[name]):
        pytest.skip("this version has no such model")
    cls = getattr(transformers, NAMES[name])
    config = AutoConfig.for_model(name) if name == "granite4_vision" else tiny.config(name)
    if name == "granite4_vision":
        config.text_config.num_hidden_layers = 2
        config.deepstack_layer_map, config.downsample_rate = [[-2, 1], [-1, 1]], "4/8"
        config.spatial_target_layers = [1, 1, 1, 1]
    if name == "chameleon":
        config.vocabulary_map = {"<image>": tiny.IMAGE}
    with torch.device("meta"):
        model = cls._from_config(config)
    with pytest.raises(ValueError, match=says):
        apet.patch(model, keep=9, check=False)


def test_readers_raise_until_registered() -> None:
    model = build(Trap("got_ocr2"))
    with pytest.raises(ValueError, match=r"reads documents.*register_adapter\('got_ocr2'"):
        apet.patch(model, keep=9, check=False)
    apet.register_adapter("got_ocr2", apet.Adapter())
    assert selfcheck.judge(model, rows_of(model), FIRST) < TOLERANCE
