"""The parts of the SGLang plugin that need no SGLang: prompts, hashes, rows and positions. More: tests/sglang."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from apet.engines import options, plan
from apet.sglang import model, request
from torch import Tensor

PAD = 9


@dataclass
class Item:
    """What the plugin uses of SGLang's `MultimodalDataItem`."""

    offsets: list[tuple[int, int]]
    hash: int | None = None
    modality: str = "image"
    precomputed_embeddings: Tensor | None = None
    model_specific_data: dict[str, Any] = field(default_factory=dict)

    def is_image(self) -> bool:
        return self.modality == "image"

    def is_video(self) -> bool:
        return self.modality == "video"

    def set_pad_value(self) -> None:
        self.hash = 77 if self.hash is None else self.hash

    def set_hash(self, value: int) -> None:
        self.hash = value


@dataclass
class Output:
    """What the plugin uses of SGLang's `MultimodalProcessorOutput`."""

    input_ids: list[int]
    mm_items: list[Item]
    padded_input_ids: list[int] | None = None
    mrope_positions: Tensor | None = None
    mrope_position_delta: Tensor | None = None
    token_type_ids: Any = None

    @staticmethod
    def build_padded_input_ids(input_ids: list[int], mm_items: list[Item]) -> list[int]:
        padded = list(input_ids)
        for item in mm_items:
            for start, end in item.offsets:
                padded[start : end + 1] = [item.hash] * (end + 1 - start)
        return padded


def output(lengths: list[int], **more: Any) -> Output:
    """Returns a prompt with pictures of these lengths, each between two words."""
    ids, items = [1], []
    for length in lengths:
        items.append(Item([(len(ids), len(ids) + length - 1)]))
        ids += [PAD] * length + [2]
    positions = torch.arange(len(ids)).expand(3, -1) * torch.tensor([[1], [10], [100]])
    return Output(ids, items, mrope_positions=positions, mrope_position_delta=torch.tensor([[-3]]), **more)


def wanted(**given: Any) -> options.Wanted:
    found = options.of({f"apet_{name}": value for name, value in given.items()})
    assert found is not None
    return found


def test_placeholders_go_from_the_end_of_each_picture() -> None:
    made = output([6, 4, 8], token_type_ids=torch.zeros(1, 22, dtype=torch.long))
    request.shorten(made, wanted(keep=4))
    assert made.input_ids == [1, *[PAD] * 4, 2, *[PAD] * 4, 2, *[PAD] * 4, 2]
    assert [item.offsets for item in made.mm_items] == [[(1, 4)], [(6, 9)], [(11, 14)]]
    assert [plan.FIELD in item.model_specific_data for item in made.mm_items] == [True, False, True]
    assert made.padded_input_ids is not None
    assert made.padded_input_ids[6:10] == [77] * 4
    assert made.padded_input_ids[1] == made.mm_items[0].hash
    assert made.mrope_positions is not None
    assert made.mrope_positions.shape == (3, 16)
    assert made.mrope_positions[0].tolist() == [0, 1, 2, 3, 4, *range(7, 17), 21]
    assert made.mrope_position_delta.tolist() == [[3]]  # six tokens less: what follows keeps its positions
    assert len(made.token_type_ids) == 16
    assert made.mm_items[2].model_specific_data[request.POSITIONS].tolist()[1] == [10 * at for at in range(13, 21)]


def test_a_prompt_that_loses_nothing_stays_as_it_is() -> None:
    made = output([6, 4])
    positions = made.mrope_positions
    request.shorten(made, wanted(keep=1.0))
    assert made.input_ids == output([6, 4]).input_ids
    assert made.mm_items == output([6, 4]).mm_items
    assert made.mrope_positions is positions


def test_hashes_tell_budgets_options_and_pictures_apart() -> None:
    found = set()
    for content in (5, 6):
        for given in ({"keep": 4}, {"keep": 3}, {"keep": 4, "basis": 4}, {"keep": 4, "basis": 4, "select": "fps"}):
            made = output([6])
            made.mm_items[0].hash = content
            request.shorten(made, wanted(**given))
            found.add(made.mm_items[0].hash)
    assert len(found) == 8
    assert all(0 <= value < 2**64 for value in found)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"apet": {"keep": 0.25}}, "keep does not begin with apet_"),
        ({"apet_keep": 0.25}, "apet_keep outside"),
        ({"image": {"apet_keep": 0.25}, "apet": {}}, "apet_keep outside"),
        ({"apet": 0.25}, "has apet=0.25: must be options"),
        ({"apet": None}, "has apet=None: must be options"),
    ],
)
def test_options_of_the_start_up_in_the_wrong_place(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        request.of_start(config)


def test_options_of_the_start_up() -> None:
    assert request.of_start({"apet": {"apet_keep": 4}, "image": {"max_pixels": 9}}) == {"apet_keep": 4}
    assert request.of_start({}) == {}
    with pytest.raises(ValueError, match="directly in mm_processor_kwargs"):
        request.of_request({"apet": {"keep": 64}})


def test_a_limit_of_all_tokens_where_a_video_keeps_its_own() -> None:
    made = output([6, 8])
    made.mm_items[1].modality = "video"
    with pytest.raises(ValueError, match="apet_max_tokens=9 limits all visual tokens"):
        request.shorten(made, wanted(max_tokens=9))


def test_hashes_of_any_length() -> None:
    made = output([6])
    made.mm_items[0].hash = 1 << 127
    request.shorten(made, wanted(keep=3))
    assert 0 < (made.mm_items[0].hash or 0) < 1 << 64


def test_the_hashes_of_a_client_get_the_plan_as_well() -> None:
    """SGLang sets them again after the plugin."""
    given = ["ff", "0a"]
    made, asked = output([6, 2]), SimpleNamespace(mm_hashes=given)
    request.shorten(made, wanted(keep=2), asked)
    assert given == ["ff", "0a"]  # the caller may ask again with them
    assert int(asked.mm_hashes[0], 16) == made.mm_items[0].hash != 0xFF
    assert asked.mm_hashes[1] == "0a"


def test_a_cap_is_shared_by_the_pictures() -> None:
    made = output([8, 8])
    request.shorten(made, wanted(max_tokens=10))
    assert [item.offsets for item in made.mm_items] == [[(1, 5)], [(7, 11)]]


def test_each_step_of_a_video_is_a_unit() -> None:
    made = output([4, 12])
    made.mm_items[1].modality = "video"
    made.mm_items[1].model_specific_data[request.GRID] = torch.tensor([[3, 4, 4]])
    request.shorten(made, wanted(keep=2), videos=True)
    assert [item.offsets for item in made.mm_items] == [[(1, 2)], [(4, 9)]]
    assert made.mrope_positions is not None
    assert made.mrope_positions[0].tolist() == [0, 1, 2, 5, 6, 7, 10, 11, 14, 15, 18]
    for data, length in (([[5, 4, 4]], 12), ([[1, 4, 4], [1, 4, 4]], 12)):
        made = output([length])
        made.mm_items[0].modality = "video"
        made.mm_items[0].model_specific_data[request.GRID] = torch.tensor(data)
        with pytest.raises(ValueError, match=r"temporal steps has placeholders at \[\(1, 12\)\]"):
            request.shorten(made, wanted(keep=2), videos=True)


def test_videos_stay_and_embeddings_from_outside_raise() -> None:
    made = output([6, 6])
    made.mm_items[0].modality = "video"
    request.shorten(made, wanted(keep=2))
    assert [item.offsets for item in made.mm_items] == [[(1, 6)], [(8, 9)]]
    made = output([6])
    made.mm_items[0].precomputed_embeddings = torch.zeros(6, 4)
    with pytest.raises(ValueError, match="apet_keep is not supported for precomputed embeddings in SGLang"):
        request.shorten(made, wanted(keep=2))


@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_rows_are_the_kernels(levels: int, listed: bool) -> None:
    """Of the items with a plan; deepstack features are those of kept rows."""
    made = output([6, 3, 8])
    request.shorten(made, wanted(keep=3))
    whole = [torch.randn(n, 5 * (1 + levels), generator=torch.manual_seed(n)) for n in (6, 3, 8)]
    rows = model._encode(lambda items: whole if listed else torch.cat(whole)[None], levels, made.mm_items)
    assert torch.equal(rows[1], whole[1])
    for number in (0, 2):
        tokens, indices = torch.ops.apet.compress(whole[number][None, :, :5].contiguous(), 3)
        assert torch.equal(rows[number][:, :5], tokens[0])
        assert torch.equal(rows[number][:, 5:], whole[number][indices[0], 5:])
        assert torch.equal(model._kept[made.mm_items[number].hash or 0], indices[0].int())


def test_the_oldest_rows_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many bytes, however many items; an item that is encoded again counts once, and is the newest."""
    monkeypatch.setattr(model, "REMEMBERED", 4 * 10)
    kept = model.Kept()
    for key in range(3):
        kept.remember(key, torch.arange(4))
    assert list(kept) == [1, 2]
    kept.remember(1, torch.arange(5))
    assert (list(kept), kept.size) == ([2, 1], 4 * 9)
    kept.remember(7, torch.arange(30))
    assert (list(kept), kept.size) == ([7], 4 * 30)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (
            (["LlavaForConditionalGeneration"], 1, False),
            "ApET does not support LlavaForConditionalGeneration in SGLang",
        ),
        ((["Qwen2VLForConditionalGeneration"], 2, False), "with pp_size=2 later stages get no M-RoPE positions"),
        ((["Qwen2VLForConditionalGeneration"], 1, True), "with language_only another process encodes the images"),
        ((["Qwen2VLForConditionalGeneration"], 1, False), None),
    ],
)
def test_servers_that_cannot_compress(given: tuple[list[str], int, bool], reason: str | None) -> None:
    found = request.unsupported(*given)
    assert found == reason or (reason is not None and found is not None and reason in found)


def test_requests_that_cannot_be_compressed() -> None:
    """They raise before they are processed, if they ask for compression; others pass."""

    async def process(*_: Any, **__: Any) -> Any:
        return output([6])

    def run(reason: str | None, **asked: Any) -> Any:
        of_request = SimpleNamespace(**asked)
        config = SimpleNamespace(architectures=["Qwen2VLForConditionalGeneration"])
        return asyncio.run(request._process(process, {}, reason, config, request_obj=of_request))

    compressed = {"mm_processor_kwargs": {"apet_keep": 2}}
    assert len(run(None, **compressed).input_ids) == 4
    assert len(run("no", session_params={"id": "s"}).input_ids) == 8
    with pytest.raises(ValueError, match=r"^no$"):
        run("no", **compressed)
    with pytest.raises(ValueError, match="not supported in sessions"):
        run(None, **compressed, session_params={"id": "s"})


@pytest.mark.parametrize("grid", [torch.ones(2, 3), torch.ones(1, 3), torch.ones(3)])
def test_adjacent_images_without_a_token_between_them_raise(grid: Tensor) -> None:
    """SGLang gives them one range of placeholders."""
    made = output([8])
    made.mm_items[0].model_specific_data[request.IMAGES] = grid
    if grid.numel() == 3:
        request.shorten(made, wanted(keep=2))
        assert made.input_ids == [1, PAD, PAD, 2]
    else:
        with pytest.raises(ValueError, match=r"2 images have placeholders at \[\(1, 8\)\]: put a token between"):
            request.shorten(made, wanted(keep=2))


def test_an_encoder_with_another_number_of_rows_raises() -> None:
    made = output([6, 3])
    request.shorten(made, wanted(keep=3))
    with pytest.raises(RuntimeError, match="the encoder gave 8 rows for 9 placeholders"):
        model._encode(lambda items: torch.zeros(8, 4), 0, made.mm_items)
    with pytest.raises(RuntimeError, match=r"the encoder gave \[3, 6\] rows for \[6, 3\] placeholders"):
        model._encode(lambda items: [torch.zeros(3, 4), torch.zeros(6, 4)], 0, made.mm_items)
    with pytest.raises(RuntimeError, match="does not work with SGLang's own pruning"):
        model._encode(lambda items: {}, 0, made.mm_items)


def test_positions_are_those_of_the_kept_rows() -> None:
    """In a batch of a text, and a prompt whose beginning was prefilled before."""
    made = output([6, 8])
    request.shorten(made, wanted(keep=3))
    whole = [torch.randn(n, 5, generator=torch.manual_seed(n)) for n in (6, 8)]
    model._encode(lambda items: torch.cat(whole), 0, made.mm_items)
    kept = [1 + model._kept[made.mm_items[0].hash or 0], 8 + model._kept[made.mm_items[1].hash or 0]]
    expected = torch.cat([torch.tensor([0]), kept[0], torch.tensor([7]), kept[1], torch.tensor([16])])[2:8]
    assert made.mrope_positions is not None
    positions = torch.cat([torch.arange(4).expand(3, -1), made.mrope_positions[:, 2:8]], 1)
    batch = SimpleNamespace(
        mm_inputs=[None, SimpleNamespace(mm_items=made.mm_items)],
        mrope_positions=positions,
        extend_prefix_lens_cpu=[0, 2],
        extend_seq_lens_cpu=[4, 6],
    )

    def original(ids: Tensor, forward_batch: Any) -> str:
        forward_batch.mm_inputs = None  # as SGLang does when it has embedded them
        return "embedded"

    assert model.prepare(original, torch.zeros(10), batch) == "embedded"
    assert torch.equal(positions[:, :4], torch.arange(4).expand(3, -1))
    assert torch.equal(positions[:, 4:], expected * torch.tensor([[1], [10], [100]]))
    before = positions.clone()
    batch.mm_inputs = [None, SimpleNamespace(mm_items=made.mm_items)]
    assert model.prepare(lambda ids, forward_batch: "decoded", torch.zeros(2), batch) == "decoded"
    assert torch.equal(positions, before)
