"""`positions="keep"`: in families that renumber by default, tokens keep their positions, and so does the text after an
image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apet
import pytest
import torch
import transformers
from apet.hooks import selfcheck, sources, tiny
from apet.hooks.adapters import ADAPTERS
from conversations import Sample, collate
from families import CROPS_TO_LENGTH, EOS, FAMILIES, UNSAID, Family, build, reader, shared, twin
from mutations import Classes
from mutations.calls import split
from mutations.edits import CACHE
from recompute import Options, expected, shorten
from running import (
    BOTH,
    FIRST,
    NEW,
    STAGES,
    TOLERANCE,
    conversation,
    conversations,
    judge,
    reads_positions_as_packed,
    say,
)
from test_attention import Flash, check_lengths, flash, stand_in, use_attention  # noqa: F401
from torch import Tensor, nn

KEEP: dict[str, Any] = {"positions": "keep"}
KEPT = {stage: options | KEEP for stage, options in STAGES.items()}
RENUMBERED = [name for name, family in FAMILIES.items() if not family.ragged]
LLAVA = FAMILIES["llava"]


@pytest.fixture(autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the records of passed self-checks for these tests, and out of the user's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "self-checks"))


def tiny_model(name: str) -> nn.Module:
    if name not in selfcheck.NAMES:
        pytest.skip("this version has no such model")
    return tiny.build(getattr(transformers, selfcheck.NAMES[name]), tiny.config(name))


# ---- against the recompute, which counts nothing and reads no positions but the kept ones


@pytest.mark.parametrize("stage", KEPT)
def test_batch(family: Family, stage: str) -> None:
    """A padded batch equals its rows alone, with a cache and without; what M-RoPE families do anyway, they still do."""
    rows, model = conversations(family), shared(family.name)
    with apet.patched(model, **KEPT[stage]) as options:
        said = say(model, collate(family, rows))
    assert options.positions == "keep"
    judge(family, rows, said, KEPT[stage])


@pytest.mark.parametrize("name", RENUMBERED)
def test_it_is_another_result(name: str) -> None:
    """The recompute with the other positions does not agree, so that the other tests mean something."""
    family, model = FAMILIES[name], shared(name)
    row = conversation(family, 3, "image", 5)
    with apet.patched(model, **FIRST, **KEEP):
        said = say(model, collate(family, [row]))
    with pytest.raises(AssertionError):
        judge(family, [row], said, FIRST)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stage", KEPT)
def test_single(family: Family, stage: str, cached: bool) -> None:
    """Without padding there is no mask, and gaps in positions must not be read as packed sequences."""
    model = shared(family.name)
    for parts in ([3, "image", 5], [2, "image1", 3, "image2", 4], [2, "video", 3]):
        if parts[1] == "video" and not family.video:
            continue
        row = conversation(family, *parts, seed=3)
        with apet.patched(model, **KEPT[stage]):
            said = say(model, collate(family, [row]), use_cache=cached)
        judge(family, [row], said, KEPT[stage])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("stage", KEPT)
def test_right_padding(family: Family, stage: str, cached: bool) -> None:
    rows, model = conversations(family), shared(family.name)
    with apet.patched(model, **KEPT[stage]):
        out = model(**collate(family, rows, side="right"), use_cache=cached)
    for row, logits in zip(rows, out.logits, strict=True):
        result = expected(twin(family.name), family, row, [], **KEPT[stage])
        torch.testing.assert_close(logits[result.deep_length - 1], result.logits[0], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", KEPT)
def test_forward(family: Family, stage: str) -> None:
    """`model(**inputs)`, with and without a cache, a mask, and positions of the caller."""
    model, row = shared(family.name), conversation(family, 3, "image", 5)
    inputs = collate(family, [row])
    bare = {name: value for name, value in inputs.items() if name != "attention_mask"}
    given = [inputs, bare]
    if not family.ragged:
        positions = torch.arange(len(row.ids))[None]
        given += [inputs | {"position_ids": positions}, bare | {"position_ids": positions}]
    want = expected(twin(family.name), family, row, [], **KEPT[stage]).logits[0]
    with apet.patched(model, **KEPT[stage]):
        for one in given:
            for cached in (True, False):
                if stage == "second" and "attention_mask" not in one and reads_positions_as_packed(family):
                    continue
                result = model(**one, use_cache=cached)
                torch.testing.assert_close(result.logits[0, -1], want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("attention", ["eager", "flex_attention"])
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_other_attention(name: str, attention: str, stage: str) -> None:
    family, model = FAMILIES[name], shared(name)
    rows = conversations(family)
    with use_attention(model, attention), torch.compiler.set_stance("force_eager"):
        for batch in (rows, rows[:1]):
            with apet.patched(model, **KEPT[stage]):
                said = say(model, collate(family, batch))
            judge(family, batch, said, KEPT[stage])


@pytest.mark.parametrize(
    ("name", "layout"), [("llava", "overwrite"), ("video_llava", "overwrite"), ("video_llava", "append")]
)
def test_layouts(name: str, layout: str) -> None:
    """A basis row that is appended has the position of the token that it was made from."""
    family, model = FAMILIES[name], shared(name)
    options = {"keep": 8, "basis": 4, "layout": layout, **KEEP}
    rows = conversations(family)
    with apet.patched(model, **options):
        said = say(model, collate(family, rows))
    judge(family, rows, said, options)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_static_cache(name: str, stage: str) -> None:
    family, model = FAMILIES[name], shared(name)
    rows = conversations(family)
    with apet.patched(model, **KEPT[stage]):
        said = say(model, collate(family, rows), cache_implementation="static", disable_compile=True)
    judge(family, rows, said, KEPT[stage])


@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": 10_000, "llm_layer": 2, "llm_keep": 1.0}], ids=str)
def test_keeping_all_is_bitwise_the_unpatched_model(family: Family, options: dict[str, Any]) -> None:
    rows, model = conversations(family), shared(family.name)
    for batch in (rows, rows[:1]):
        before = say(model, collate(family, batch))
        with apet.patched(model, **options, **KEEP):
            during = say(model, collate(family, batch))
        assert torch.equal(before.tokens, during.tokens)
        assert torch.equal(before.logits, during.logits)


# ---- against the model's own decoder


@pytest.mark.parametrize("name", RENUMBERED)
def test_the_decoder_gets_the_positions_of_the_whole_prompt(name: str) -> None:
    """The language model is called with those of the kept tokens, and goes on after the largest."""
    family = FAMILIES[name]
    model, rows = shared(name), conversations(family)
    told: list[tuple[Tensor, Tensor]] = []

    def listen(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        told.append((kwargs["position_ids"], kwargs["attention_mask"]))

    with apet.patched(model, **BOTH, **KEEP), reader(model).register_forward_pre_hook(listen, with_kwargs=True):
        say(model, collate(family, rows), new=3)
        kept = apet.kept(model)
    (prompt, mask), *steps = told
    for b, row in enumerate(rows):
        want = shorten(twin(name), family, row, Options(**BOTH, **KEEP))
        assert torch.equal(prompt[b][mask[b].bool()], want.source)
        assert [step[b].tolist() for step, _ in steps] == [[len(row.ids)], [len(row.ids) + 1]]
    assert kept.lengths[0] == max(len(row.ids) for row in rows)


@pytest.mark.parametrize("name", ["llava", "llava_onevision"])
def test_is_the_decoder_given_the_rows_that_stay(name: str) -> None:
    """The unpatched decoder is called with the embeddings, positions and mask of the kept tokens."""
    family = FAMILIES[name]
    model, row, seen = shared(name), conversation(family, 3, "image", 5), []
    with apet.patched(model, **FIRST, **KEEP):
        handle = reader(model).register_forward_pre_hook(lambda _, a, k: seen.append(k), with_kwargs=True)
        with handle:
            logits = model(**collate(family, [row]), use_cache=False).logits
    x = seen[0]["inputs_embeds"]
    source = shorten(twin(name), family, row, Options(**FIRST, **KEEP)).source
    for mask in (torch.ones(1, x.shape[1], dtype=torch.long), None):
        if mask is None:
            mask = torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool).tril()
        states = reader(twin(name))(inputs_embeds=x, attention_mask=mask, position_ids=source[None], use_cache=False)[0]
        torch.testing.assert_close(logits, twin(name).lm_head(states), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", selfcheck.STAGES)
@pytest.mark.parametrize(
    "name",
    [
        *("aya_vision", "gemma3", "gemma4", "granite4_vision", "lfm2_vl", "minicpmv4_6", "mistral3", "molmo2"),
        *("paligemma", "perception_lm", "video_llama_3"),
    ],
)
@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="tiny models of families with an adapter alone")
def test_other_decoders_against_the_reference(name: str, stage: str) -> None:
    """Windows, masks of images that see each other, layers with a state, several rotary embeddings."""
    model = tiny_model(name)
    result = selfcheck.check(model, stage, positions="keep")
    assert result.error is None
    assert 0 < result.difference < selfcheck.TOLERANCE


@pytest.mark.parametrize("stage", selfcheck.STAGES)
def test_a_tower_whose_layers_are_named(stage: str) -> None:
    """A backbone names its stages, also the one that it returns; a tiny one has fewer."""
    tower = transformers.Dinov2Config(num_hidden_layers=8, out_features=["stage8"])
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=transformers.LlamaConfig(), vision_feature_layer=8
    )
    model = tiny.build(transformers.LlavaForConditionalGeneration, tiny.config(config))
    assert model.config.vision_config.out_features == [f"stage{model.config.vision_config.num_hidden_layers}"]
    assert selfcheck.check(model, stage, positions="keep").error is None


# ---- what comes after the prompt


def greedy(model: nn.Module, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    how = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": UNSAID, "eos_token_id": EOS}
    return model.generate(**inputs, **how, **more)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_assisted_and_beams_equal_those_without_a_cache(name: str, stage: str) -> None:
    family, model = FAMILIES[name], shared(name)
    row = conversation(family, 9, "image", 5)
    row.ids[:9] = [31, 32, 33] * 3
    row.ids[-3:] = [31, 32, 33]
    inputs = collate(family, [row])
    with apet.patched(model, **KEPT[stage]):
        whole = greedy(model, inputs)
        assert torch.equal(greedy(model, inputs, use_cache=False), whole)
        assert torch.equal(greedy(model, inputs, prompt_lookup_num_tokens=3), whole)
        beams = greedy(model, inputs, num_beams=3)
        assert torch.equal(greedy(model, inputs, num_beams=3, use_cache=False), beams)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("name", RENUMBERED)
def test_second_turn(name: str, stage: str) -> None:
    """Text after the prompt, in one call and in several, has the positions that it has in one long prompt."""
    family, model = FAMILIES[name], shared(name)
    row = conversation(family, 3, "image", 5)
    more = [11, 12, 13, 14]
    with apet.patched(model, **KEPT[stage]):
        for parts in ([more], [more[:1], more[1:]], [[token] for token in more]):
            out = model(**collate(family, [row]), use_cache=True)
            logits = [out.logits[0, -1]]
            for part in parts:
                out = model(input_ids=torch.tensor([part]), **{CACHE: out.past_key_values}, use_cache=True)
                logits += list(out.logits[0])
            result = expected(twin(name), family, row, more, **KEPT[stage])
            torch.testing.assert_close(torch.stack(logits), result.logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", KEPT)
def test_a_cropped_cache(stage: str) -> None:
    """Text that was taken back is given again."""
    model, row = shared("llava"), conversation(LLAVA, 3, "image", 5)
    with apet.patched(model, **KEPT[stage]):
        out = model(**collate(LLAVA, [row]), use_cache=True)
        cache = out.past_key_values
        cache.crop(len(row.ids) - 2 if CROPS_TO_LENGTH else -2)
        again = model(input_ids=torch.tensor([row.ids[-2:]]), **{CACHE: cache}, use_cache=True)
    torch.testing.assert_close(again.logits[0, -1], out.logits[0, -1], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize(("rows", "side"), [(2, "left"), (2, "right"), (1, "left")])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_a_prefill_in_several_calls(
    attention: str,
    rows: int,
    side: str,
    stage: str,
    flash: Flash,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also of a single row with flash attention: it would give the images other keys than the text before them."""
    inputs = collate(LLAVA, conversations(LLAVA)[:rows], side=side)

    def run() -> Tensor:
        model = build("llava")
        with use_attention(model, attention), apet.patched(model, check=False, **KEPT[stage]):
            out = model(**inputs, **{CACHE: transformers.DynamicCache()})
            return apet.kept(model).align(out.logits)

    whole = run()
    split(Classes("llava", monkeypatch), lambda length: [1, length - 3])
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(run()[real], whole[real], rtol=0, atol=TOLERANCE, equal_nan=True)


def test_labels() -> None:
    """The loss is that of the recompute's logits."""
    model, row = shared("llava"), conversation(LLAVA, 3, "image", 5)
    inputs = collate(LLAVA, [row])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, -1] = 77
    with apet.patched(model, **FIRST, **KEEP):
        loss = model(**inputs, labels=labels).loss
    shorter = Sample(row.ids[:-1], row.visuals)
    logits = expected(twin("llava"), LLAVA, shorter, [], **FIRST, **KEEP).logits[0]
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[77], rtol=0, atol=TOLERANCE)


# ---- flash attention, which reads gaps as packed sequences


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", RENUMBERED)
def test_flash_without_padding(name: str, flash: Flash, stage: str, cached: bool) -> None:  # noqa: F811
    """The dense function is called, with all tokens of a row as one sequence."""
    family, options = FAMILIES[name], KEPT[stage]
    model, row = shared(name), conversation(family, 2, "image1", 3, "image2", 4)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **options):
        said = say(model, collate(family, [row]), use_cache=cached)
    check_lengths(flash.calls, judge(family, [row], said, options), options, packed=False, cached=cached)


def test_flash_would_pack_the_gaps(flash: Flash, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Without the hooks of the layers, it takes the row above for packed sequences: the test notices it."""
    monkeypatch.setattr("apet.hooks.first_stage.layer_arguments", lambda *given: given[-1])
    model, row = shared("llava"), conversation(LLAVA, 3, "image", 5)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **FIRST, **KEEP, check=False):
        model(**collate(LLAVA, [row]))
    assert all(call.packed for call in flash.calls)


@pytest.mark.parametrize("stage", KEPT)
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_flash_with_padding(name: str, flash: Flash, stage: str) -> None:  # noqa: F811
    """Rows of different lengths are packed by their mask, a padded row alone is not."""
    family, options, model = FAMILIES[name], KEPT[stage], shared(name)
    rows = conversations(family)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **options):
        said = say(model, collate(family, rows))
        check_lengths(flash.calls, judge(family, rows, said, options), options, packed=True, cached=True)
        padded = say(model, collate(family, rows[:1], pad_to=len(rows[0].ids) + 6))
        judge(family, rows[:1], padded, options)


def test_flash_attention_3_and_a_second_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, model = stand_in(monkeypatch, "flash_attention_3"), shared("llava")
    row, more = conversation(LLAVA, 3, "image", 5), [11, 12, 13]
    with use_attention(model, "flash_attention_3"), apet.patched(model, **BOTH, **KEEP):
        out = model(**collate(LLAVA, [row]), use_cache=True)
        after = model(input_ids=torch.tensor([more]), **{CACHE: out.past_key_values}, use_cache=True)
    result = expected(twin("llava"), LLAVA, row, more, **BOTH, **KEEP)
    torch.testing.assert_close(after.logits[0], result.logits[1:], rtol=0, atol=TOLERANCE)
    assert not any(call.packed for call in notes.calls)


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("whole", [True, False], ids=["the model", "its decoder"])
def test_compiled(whole: bool) -> None:
    model, row = build("llava"), conversation(LLAVA, 3, "image", 5)
    torch.compiler.reset()
    if whole:
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        reader(model).forward = torch.compile(reader(model).forward, backend="eager")
    with apet.patched(model, **BOTH, **KEEP, check=False):
        said = say(model, collate(LLAVA, [row]), new=3)
    judge(LLAVA, [row], said, BOTH | KEEP)


# ---- the option


@pytest.mark.parametrize("value", ["kept", "", "Keep", True, 1])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_bad_values_raise(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"positions={value!r} is none of 'keep', 'renumber'"):
        apet.patch(shared(name), keep=9, positions=value)


def test_renumber(family: Family) -> None:
    """What the other families do anyway; M-RoPE's positions cannot be renumbered."""
    model, rows = shared(family.name), conversations(family)
    if family.ragged:
        with pytest.raises(ValueError, match=f"positions='renumber' cannot be used with {family.name}: .*M-RoPE"):
            apet.patch(model, keep=9, positions="renumber")
        return
    with apet.patched(model, **FIRST) as default:
        before = say(model, collate(family, rows))
    with apet.patched(model, **FIRST, positions="renumber") as options:
        during = say(model, collate(family, rows))
    assert (default.positions, options.positions) == (None, "renumber")
    assert torch.equal(before.logits, during.logits)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_not_with_basis_rows_that_are_appended_before_a_projector(name: str) -> None:
    """Which tokens they were made from is not known behind it."""
    with pytest.raises(ValueError, match=f"cannot be used with layout='append' and {name}: its basis tokens are proj"):
        apet.patch(shared(name), keep=8, basis=4, layout="append", **KEEP)


def test_presets_leave_it_to_the_family() -> None:
    model = build("llava", layers=20)
    assert apet.patch(model, preset="paper-64").positions is None
    assert apet.patch(model, preset="paper-64", positions="keep").positions == "keep"


def test_layers_with_hooks() -> None:
    """All of them where kept positions have gaps; where they are renumbered or along several axes those from
    `llm_layer` on."""
    for name, options, count in (("llava", {}, 2), ("llava", KEEP, 4), ("qwen2_5_vl", KEEP, 2)):
        model = shared(name)
        with apet.patched(model, **BOTH, **options):
            layers = reader(model).layers
            found = [any("before_layer" in str(h) for h in one._forward_pre_hooks.values()) for one in layers]
            assert sum(found) == count


def test_an_adapter_of_a_user_that_keeps_positions(flash: Flash) -> None:  # noqa: F811
    """Its gaps are not read as packed sequences either."""
    apet.register_adapter("llava", type("Keeping", (type(ADAPTERS["llava"]),), {"positions": "keep"})())
    model, row = build("llava"), conversation(LLAVA, 3, "image", 5)
    with use_attention(model, "flash_attention_2"), apet.patched(model, **BOTH) as options:
        said = say(model, collate(LLAVA, [row]))
    assert options.positions is None
    assert not any(call.packed for call in flash.calls)
    judge(LLAVA, [row], said, BOTH | KEEP)
    assert selfcheck.check(model, "both").error is None, "the reference keeps them, too"
    with pytest.raises(ValueError, match="positions='renumber' cannot be used with llava"):
        apet.patch(model, keep=9, positions="renumber")


# ---- the self-check


def test_the_self_check_keeps_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs for this option although the code is as tested, with a reference of its own, and its record is another
    one."""
    model, asked = build("llava"), []
    files, _ = selfcheck.code(selfcheck.classes_of(apet.hooks.find(model, FIRST)))
    monkeypatch.setattr(sources, "digests", lambda: {transformers.__version__: files})
    monkeypatch.setattr(sources, "TORCH", (".".join(torch.__version__.split(".")[:2]),))
    check = selfcheck.check
    monkeypatch.setattr(selfcheck, "check", lambda *args: asked.append(args[3]) or check(*args))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for positions in (None, "renumber", "keep", "keep"):
        apet.patch(model, **FIRST, positions=positions)
    apet.unpatch(model)
    assert asked == ["keep"]
    assert len([*tmp_path.rglob("*.json")]) == 1
    assert 0 < check(model, "both", None, "keep").difference < selfcheck.TOLERANCE


@pytest.mark.parametrize("stage", selfcheck.STAGES)
@pytest.mark.parametrize("name", RENUMBERED)
def test_the_reference_tells_them_apart(name: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It notices positions that are renumbered nevertheless."""
    model = build(name)
    assert selfcheck.check(model, stage, None, "keep").error is None
    rows = [selfcheck.prompt(model, parts, seed) for seed, parts in enumerate(selfcheck.PROMPTS)]
    options = selfcheck.options_of(model, stage, None, "keep")
    monkeypatch.setattr("apet.hooks.first_stage.kept_positions", renumbered)
    assert selfcheck.judge(model, rows, options) > 10 * selfcheck.TOLERANCE


def renumbered(positions: Tensor, valid: Tensor, packing: Any, axes: int, given: bool) -> tuple[Tensor, Tensor]:
    """Planted in place of `kept_positions`."""
    counted = (packing.valid.cumsum(1) - 1).clamp(min=0)
    return counted, packing.valid.sum(1, keepdim=True)
