"""`apet.report`: operations against formulas derived by hand, lengths, bytes, and times."""

from __future__ import annotations

import dataclasses
import inspect

import apet
import pytest
import torch
import transformers
from apet import calls, model_report
from apet.hooks import tiny
from apet.hooks.selfcheck import NAMES, prompt
from conversations import collate
from families import FAMILIES, IMAGE, PATCH, TILE, Family, build, hooks_of, shared
from running import BOTH, FIRST, SECOND, STAGES, conversation, conversations
from transformers import BatchFeature, DynamicCache, PreTrainedModel

import apet_kernels

LLAVA = FAMILIES["llava"]
OLD = transformers.__version__.startswith("4.")


def language_flops(model: PreTrainedModel, lengths: list[int], batch: int = 1) -> int:
    """2 B L for each weight of a layer's matrices, two L x L x d products in each head, and the last row of logits
    (transformers 4 makes all rows for Qwen2-VL)."""
    config = model.config.text_config
    hidden, heads, inner = config.hidden_size, config.num_attention_heads, config.intermediate_size
    d = getattr(config, "head_dim", None) or hidden // heads
    weights = 2 * heads * d * hidden + 2 * config.num_key_value_heads * d * hidden + 3 * hidden * inner
    layers = sum(2 * batch * n * weights + 4 * batch * heads * n * n * d for n in lengths)
    rows = 1 if "logits_to_keep" in inspect.signature(model.forward).parameters else lengths[-1]
    return layers + 2 * batch * rows * hidden * config.vocab_size


def clip_flops(model: PreTrainedModel, images: int, projected: int) -> int:
    """Counts the operations of LLaVA's encoder (its class token is a token, too) and projector."""
    vision, hidden = model.config.vision_config, model.config.text_config.hidden_size
    width, n = vision.hidden_size, TILE + 1
    layer = 2 * n * (4 * width * width + 2 * width * vision.intermediate_size) + 4 * n * n * width
    patches = 2 * TILE * 3 * PATCH * PATCH * width
    return images * (patches + vision.num_hidden_layers * layer) + 2 * projected * (width * hidden + hidden * hidden)


@pytest.mark.parametrize("stage", STAGES)
def test_numbers(family: Family, stage: str) -> None:
    model = shared(family.name)
    inputs = collate(family, [conversation(family, 3, "image", 5)])
    before = inputs["input_ids"].shape[1]
    with apet.patched(model, **STAGES[stage]):
        found = apet.report(model, inputs, max_new_tokens=2, rounds=1)
        lengths = apet.kept(model).lengths
    late = len(found.without.lengths) // 2
    middle = lengths[1] if stage != "second" else before
    assert found.without.lengths == [before] * 4
    assert found.compressed.lengths == [middle] * late + [lengths[-1]] * late
    for side in (found.without, found.compressed):
        # Rotary embeddings are products with a vector: some thousandths.
        assert side.language_flops == pytest.approx(language_flops(model, side.lengths), rel=5e-3)
        config = model.config.text_config
        width = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
        assert side.cache_bytes == sum(2 * 4 * n * width for n in side.lengths)
    assert found.visual_tokens == int((inputs["input_ids"] == IMAGE).sum())
    assert found.compressed.compression_flops > found.without.compression_flops == 0
    assert found.compressed.vision_flops <= found.without.vision_flops


def test_encoder_and_projector() -> None:
    """The projector runs on exactly the kept tokens."""
    model = shared("llava")
    inputs = collate(LLAVA, conversations(LLAVA)[:2])  # one image, and two
    with apet.patched(model, **FIRST):
        found = apet.report(model, inputs, max_new_tokens=1, rounds=1)
    assert found.batch == 2
    assert found.visual_tokens == 3 * TILE
    assert found.without.vision_flops == clip_flops(model, 3, 3 * TILE)
    assert found.compressed.vision_flops == clip_flops(model, 3, 3 * FIRST["keep"])
    for side in (found.without, found.compressed):
        assert side.language_flops == pytest.approx(language_flops(model, side.lengths, 2), rel=5e-3)


@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
def test_any_attention_counts_the_same(attention: str) -> None:
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    counts = []
    for name in ("sdpa", attention):
        model = build("llava", name)
        apet.patch(model, **BOTH)
        counts.append(model_report.count_prefill(vars(model)[apet.hooks.ENGINE], inputs))
        assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {name}
    assert counts[0] == counts[1]


def test_static_cache_and_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of fixed size has the same size with and without compression, but not the same lengths."""
    model = shared("llava")
    inputs = BatchFeature(collate(LLAVA, [conversation(LLAVA, 3, "image", 5)]))
    with apet.patched(model, **BOTH):
        dynamic = apet.report(model, inputs, max_new_tokens=2, rounds=1)
        monkeypatch.setattr(model.generation_config, "cache_implementation", "static")
        with torch.inference_mode():
            static = apet.report(torch.compile(model), inputs, max_new_tokens=2, rounds=1)
    assert static.model == dynamic.model == "LlavaForConditionalGeneration"
    assert static.compressed.lengths == dynamic.compressed.lengths == [17, 17, 13, 13]
    assert static.compressed.cache_bytes == static.without.cache_bytes >= dynamic.without.cache_bytes
    assert static.compressed.vision_flops == dynamic.compressed.vision_flops


def test_calls_of_the_op() -> None:
    """Arguments with default values, and others."""
    x = torch.randn(9 + 7, 8)
    with calls.Recorder() as recorder:
        tokens, indices = apet_kernels.compress_packed(
            x, [9, 7], [5, 4], 3, layout="overwrite", select="fps", blend=0.5
        )
        apet_kernels.compress_packed(x, [9, 7], [5, 4], basis=10)
    first, second = recorder.calls
    assert (first.lengths, first.keeps) == ([9, 7], [5, 4])
    assert torch.equal(first.tokens, tokens)
    assert torch.equal(first.indices, indices)
    assert torch.equal(first.x, x)
    assert first.options == {
        "basis": 3, "layout": "overwrite", "select": "fps", "start": -1, "ridge": 1e-5, "blend": 0.5, "refine": 0,
    }  # fmt: skip
    assert second.options["basis"] == 10
    assert first.flops == 2 * 8 * (3 * 9 + 4 * 2 + 3 * 7 + 3 * 1)
    assert second.flops == 2 * 8 * (10 * 9 + 4 * 5 + 10 * 7 + 3 * 4)


def test_times_are_medians_taken_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uncompressed times are without hooks, and the model is still patched at the end."""
    model = shared("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    times = iter([(5.0, 9.0), (1.0, 2.0), (6.0, 8.0), (3.0, 4.0), (4.0, 7.0), (2.0, 5.0)])
    patched = []

    def clock(model: PreTrainedModel, inputs: dict, new_tokens: int) -> tuple[float, float]:
        assert new_tokens == 3
        patched.append(bool(hooks_of(model, "apet")))
        return next(times)

    monkeypatch.setattr(model_report, "clock", clock)
    with apet.patched(model, **FIRST) as options:
        hooks = hooks_of(model, "apet")
        found = apet.report(model, inputs, max_new_tokens=3)
        assert hooks_of(model, "apet") == hooks
        assert apet.options(model) == found.options == options
    assert patched == [False, True] * 3
    assert (found.prefill_seconds, found.total_seconds) == ((5.0, 2.0), (8.0, 4.0))


def test_clock_goes_on_past_an_end_token() -> None:
    """Both answers must have the same length."""
    model = build("llava")
    model.generation_config.eos_token_id = list(range(64))
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    apet.patch(model, **FIRST)
    steps = []
    model.model.language_model.register_forward_hook(lambda *_: steps.append(1))
    prefill, total = model_report.clock(model, inputs, 6)
    assert len(steps) == 6
    assert 0 < prefill < total


def test_prints_side_by_side() -> None:
    one = model_report.Prefill([616, 616, 616], 10**12, 3 * 10**12, 0, 314 * 10**6)
    two = model_report.Prefill([136, 136, 72], 9 * 10**11, 5 * 10**11, 2 * 10**6, 50 * 10**6)
    found = model_report.Report("Some", apet.Options(keep=96), 1, 576, 32, one, two, (2.5, 0.5), (4.0, 2.0))
    lines = [" ".join(line.split()) for line in str(found).splitlines()]
    assert lines[0] == "Some: 576 visual tokens in 1 row"
    for line in (
        "tokens of a row, layers 1 to 2 616 136 4.53",
        "tokens of a row, layers 3 to 3 616 72 8.56",
        "prefill 4.00 TFLOP 1.40 TFLOP 2.86",
        "compression - 2.00 MFLOP",
        "key-value cache after it 314 MB 50.0 MB 6.28",
        "time to the first token 2.50 s 500 ms 5.00",
        "time to 32 tokens 4.00 s 2.00 s 2.00",
    ):
        assert line in lines
    assert "keep=96" in str(found)
    assert dataclasses.asdict(found)["without"]["lengths"] == [616] * 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0 is less than 1"),
        ({"rounds": 0}, "rounds=0 is less than 1"),
    ],
)
def test_wrong_numbers(more: dict, message: str) -> None:
    model = shared("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    with apet.patched(model, **FIRST), pytest.raises(ValueError, match=message):
        apet.report(model, inputs, **more)


@pytest.mark.skipif(OLD, reason="configurations of transformers 4 are shrunk for the families with an adapter alone")
@pytest.mark.parametrize("options", [FIRST, {**FIRST, "llm_layer": 3, "llm_keep": 0.5}], ids=["first", "both"])
@pytest.mark.parametrize("name", ["qwen3_5", "lfm2_vl", "gemma4"])
def test_layers_whose_caches_count_no_tokens(name: str, options: dict) -> None:
    """Those with a recurrent state, and those that use the keys of an earlier layer."""
    config = tiny.config(name)
    if name == "gemma4":
        config.get_text_config().num_kv_shared_layers = 2
        options = FIRST  # the second stage is not possible then
    model = tiny.build(getattr(transformers, NAMES[name]), config)
    row = prompt(model, (3, "image", 5))
    with apet.patched(model, **options):
        report = apet.report(model, row, max_new_tokens=2, rounds=1)
        kept = apet.kept(model)
    layers = config.get_text_config().num_hidden_layers
    assert report.without.lengths == [row["input_ids"].shape[1]] * layers
    border = options.get("llm_layer", layers)
    assert report.compressed.lengths == [kept.lengths[1]] * border + [kept.lengths[-1]] * (layers - border)
    assert 0 < report.compressed.cache_bytes < report.without.cache_bytes


def test_a_compiled_forward_is_compiled_again() -> None:
    """Code that was compiled while the patch was away must not run when it is back."""
    model = build("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    with apet.patched(model, **FIRST):
        wanted = model(**inputs).logits
    model.forward = torch.compile(model.forward, backend="eager")
    with apet.patched(model, **FIRST):
        report = apet.report(model, inputs, max_new_tokens=2, rounds=1)
        assert report.compressed.lengths != report.without.lengths
        torch.testing.assert_close(model(**inputs).logits, wanted)


def test_wrong_inputs() -> None:
    model = shared("llava")
    inputs = collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    with pytest.raises(ValueError, match=r"this LlavaForConditionalGeneration is not patched: call apet\.patch"):
        apet.report(model, inputs)
    with apet.patched(model, **SECOND):
        with pytest.raises(ValueError, match="no image or video, only input_ids, attention_mask"):
            apet.report(model, collate(LLAVA, [conversation(LLAVA, 9)]))
        for name in ("cache", "past_key_values"):
            for measure in (apet.report, apet.picture):
                more = () if measure is apet.report else (None,)
                with pytest.raises(ValueError, match=f"inputs contain {name}, a cache"):
                    measure(model, inputs | {name: DynamicCache()}, *more)
    with apet.patched(model.model, **FIRST), pytest.raises(ValueError, match=r"LlavaModel has no generate\(\)"):
        apet.report(model.model, inputs)


@pytest.mark.parametrize("name", ["inputs", "inputs_embeds"])
def test_other_forms_of_a_prompt(name: str) -> None:
    model, inputs = shared("llava"), collate(LLAVA, [conversation(LLAVA, 3, "image", 5)])
    ids = inputs.pop("input_ids")
    inputs[name] = ids if name == "inputs" else model.get_input_embeddings()(ids).detach()
    with apet.patched(model, **FIRST):
        assert apet.report(model, inputs, max_new_tokens=1, rounds=1).without.lengths == [ids.shape[1]] * 4
