"""The input of the language model: as many tokens as requested, those of the kernel, at their own positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from engines import MODELS, MROPE, VIDEO, Served, picture, prompt, video, visual

EVERY = pytest.mark.parametrize("served", MODELS, indirect=True)
SIZES = [(112, 112), (90, 300), (260, 130), (40, 60)]
BEFORE_PROJECTOR = ("llava", "llava_next")


def packing(served: Served, height: int, width: int) -> torch.Tensor:
    """LLaVA-NeXT: for every placeholder of an image its token's number among all tokens of its tiles, -1 for a newline;
    computed by vLLM's own packing."""
    model = served.model
    size = torch.tensor([height, width])
    tiles = 1 + math.prod(grid(height, width))
    numbers = torch.arange(tiles * tiny.TILE, dtype=torch.float32).view(tiles, -1, 1)
    newline = model.image_newline.data.clone()
    model.image_newline.data.fill_(-1)
    packed = model._merge_image_patch_embeddings(
        size, numbers.expand(-1, -1, len(newline)).clone(), strategy="spatial_unpad"
    )
    model.image_newline.data.copy_(newline)
    return packed[:, 0].long()


def grid(height: int, width: int) -> tuple[int, int]:
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    return get_anyres_image_grid_shape((height, width), tiny.PINPOINTS, tiny.SIDE)


def units(served: Served, ids: list[int], embeds: torch.Tensor) -> list[torch.Tensor]:
    """Returns the columns of every unit of a prompt with all tokens, found by its tokens (and newlines)."""
    marks = torch.tensor([token in visual(served.name) for token in ids])
    gaps = {tiny.BREAK} if served.name in ("mistral3", "pixtral") else set()
    runs: list[list[int]] = []
    for column in range(len(ids)):
        if marks[column] and (not column or not (marks[column - 1] or ids[column - 1] in gaps)):
            runs.append([])
        if marks[column]:
            runs[-1].append(column)
    whole = [torch.tensor(run) for run in runs]
    if served.name == "llava_next":
        found = []
        for run, size in zip(whole, SIZES, strict=False):
            tiles = packing(served, *size).div(tiny.TILE, rounding_mode="floor")
            found += [run[tiles == tile] for tile in tiles.unique() if tile >= 0]
        return found
    if served.name == "llava_onevision":
        whole = [run[(embeds[run] != served.model.image_newline).any(1)] for run in whole]
        return [part for run in whole for part in run.split(tiny.TILE // 4 if ids[run[0]] == tiny.VIDEO else len(run))]
    if served.name in ("internvl", "internvl_chat", "gemma3", "idefics3", "smolvlm", "llama4"):
        return [part for run in whole for part in run.split(tiny.TILE // 4)]
    if served.name in ("qwen2_vl", "qwen2_5_vl"):  # nothing separates the steps of a video, of 56 x 84 pixels
        return [part for run in whole for part in run.split(6 if ids[run[0]] == tiny.VIDEO_PAD else len(run))]
    return whole


@EVERY
@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"apet_keep": 12}, lambda n: min(12, n)),
        ({"apet_keep": 0.25}, lambda n: max(1, math.floor(n / 4 + 0.5))),
        ({"apet_keep": 0.5, "apet_least": 6, "apet_most": 9}, lambda n: min(n, max(6, min(9, (n + 1) // 2)))),
        ({"apet_keep": 12, "apet_layout": "overwrite", "apet_basis": 4, "apet_blend": 0.5}, lambda n: min(12, n)),
    ],
    ids=["count", "ratio", "bounds", "overwrite"],
)
def test_the_language_model_reads_the_whole_prompt_less_what_was_dropped(served, options, kept):
    """For several images of different sizes in text, the language model reads as many tokens as requested, at their
    places. They are bit for bit the kernel's results on the encoder's rows, and these are, but for rounding, the rows
    that it reads without compression."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES)]
    assert check(served, prompt(served.name, *images, apet_keep=1.0), options, kept) >= len(SIZES)


@pytest.mark.parametrize("served", VIDEO, indirect=True)
@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
def test_videos_frame_by_frame(served, first):
    """A video with an image before or after it is compressed frame by frame."""
    request = prompt(served.name, picture(90, 300), videos=[video(8, 56, 84)], first=first, apet_keep=1.0)
    assert check(served, request, {"apet_keep": 4}, lambda n: min(4, n), first) > 4


def check(
    served: Served,
    whole: dict[str, Any],
    options: dict[str, Any],
    kept: Callable[[int], int],
    first: bool = False,
) -> int:
    """Compares the request with these options with the same one with all tokens; first: videos before images. Returns
    how many units it had."""
    ids, seen, embeds, positions = served.read(whole)
    fewer, compressed, read, where = served.read({**whole, "mm_processor_kwargs": options})
    parts = units(served, ids, embeds)
    stays = torch.ones(len(ids), dtype=torch.bool)
    names = {name.removeprefix("apet_"): value for name, value in options.items()}
    kernel = {n: names[n] for n in ("basis", "layout", "blend") if n in names}
    before = embeds.clone()
    if served.name not in BEFORE_PROJECTOR:
        # On some processors the last bits of an encoder's results depend on the other images of its batch, and shorter
        # requests make other batches.
        encoded = {*visual(served.name), tiny.BREAK, tiny.LAST}
        at = torch.tensor([token in encoded for token in ids])
        order = ("video", "image") if first else ("image", "video")
        rows = torch.cat([item for kind in order for item in compressed.encoded[kind]])
        before[at], deepstack = rows.tensor_split([embeds.shape[1]], dim=1)
        torch.testing.assert_close(before, embeds, rtol=1e-4, atol=1e-5)
    expected = before.clone()
    for columns in parts:
        stays[columns] = False
        k = kept(len(columns))
        if served.name not in BEFORE_PROJECTOR:
            tokens, indices = torch.ops.apet.compress(before[columns][None], k, **kernel)
            expected[columns[indices[0]]] = tokens[0]
            stays[columns[indices[0]]] = True
    if served.name in BEFORE_PROJECTOR:
        assert len(fewer) == int(stays.sum()) + sum(kept(len(columns)) for columns in parts)
        return len(parts)
    assert len(fewer) == len(read) == int(stays.sum())
    assert torch.equal(read, expected[stays])
    renumbered = torch.arange(len(fewer)).expand_as(where)
    assert torch.equal(where, positions[:, stays] if served.name in MROPE else renumbered)
    if served.name in ("qwen3_vl", "qwen3_vl_moe"):
        added, whole_added = (torch.cat(s.deepstack, dim=1).transpose(0, 1).flatten(1) for s in (compressed, seen))
        expected_added = torch.zeros(len(ids), deepstack.shape[1])
        expected_added[at] = deepstack
        assert deepstack.any()
        assert torch.equal(added[: len(fewer)], expected_added[stays])
        torch.testing.assert_close(expected_added, whole_added[: len(ids)], rtol=1e-4, atol=1e-5)
    return len(parts)


@pytest.mark.parametrize("served", BEFORE_PROJECTOR, indirect=True)
@pytest.mark.parametrize("options", [{}, {"apet_layout": "overwrite", "apet_basis": 4, "apet_blend": 0.5}])
def test_the_projector_gets_what_the_kernel_gives(served, options):
    """The language model gets the projector's output, for every image of a request, with newlines in place."""
    images = [picture(*size, seed) for seed, size in enumerate(SIZES[:3])]
    ids, seen, embeds, _ = served.read(prompt(served.name, *images, apet_keep=12, **options))
    kernel = {name.removeprefix("apet_"): value for name, value in options.items()}
    taken = torch.cat([given for given, _ in seen.projector])
    features = torch.cat(seen.tower)  # [tiles, N, C]
    model = served.model
    projector = model.multi_modal_projector

    def project(x: torch.Tensor) -> torch.Tensor:
        return projector.linear_2(projector.act(projector.linear_1(x)[0]))[0]

    read = embeds[torch.tensor(ids) == tiny.IMAGE]
    if served.name == "llava":
        kept = torch.cat([torch.ops.apet.compress(x[None], 12, **kernel)[0][0] for x in features])
        assert torch.equal(taken, kept)
        torch.testing.assert_close(read, project(taken))
        return
    tile, expected, compressed = 0, [], []
    for height, width in SIZES[:3]:
        where = packing(served, height, width)
        rows: dict[int, torch.Tensor] = {}
        for number in range(1 + math.prod(grid(height, width))):
            unit = where[where.div(tiny.TILE, rounding_mode="floor") == number].sort().values
            if len(unit):
                x = features[tile + number, unit % tiny.TILE]
                tokens, indices = torch.ops.apet.compress(x[None], min(12, len(unit)), **kernel)
                rows |= dict(zip(unit[indices[0]].tolist(), tokens[0], strict=True))
        compressed += rows.values()
        expected += [rows.get(n) for n in where.tolist() if n < 0 or n in rows]  # None for a newline
        tile += 1 + math.prod(grid(height, width))
    assert torch.equal(taken, torch.stack(compressed))
    newlines = torch.tensor([row is None for row in expected])
    assert torch.equal(read[newlines], model.image_newline.expand(int(newlines.sum()), -1))
    projected = project(torch.stack([row for row in expected if row is not None]))
    torch.testing.assert_close(read[~newlines], projected)


@pytest.mark.parametrize("served", MROPE, indirect=True)
def test_generation_goes_on_after_the_whole_prompt(served):
    """The position of the first new token is that without compression."""
    full = prompt(served.name, picture(90, 300), apet_keep=1.0)
    ids, _, _, positions = served.read(full)
    fewer = {**full, "mm_processor_kwargs": {"apet_keep": 5}}
    (length,) = served.lengths(fewer)
    assert length < len(ids)
    served.forget()
    with served.watched() as seen:
        served.outputs(fewer, tokens=4)
    generated = torch.cat(seen.positions, dim=1)[:, length:]
    following = int(positions.max()) + 1
    assert torch.equal(generated, torch.arange(following, following + 3).expand(3, 3))


@pytest.mark.parametrize("served", ["gemma3", "gemma4"], indirect=True)
def test_kept_tokens_of_an_image_attend_to_each_other(served):
    """vLLM's runner passes spans to attention: one span has all kept tokens of an image."""
    runner = served.runner
    spans: list[list[tuple[int, int]]] = []

    def note(*_: Any) -> None:
        for request in runner.requests.values():
            spans.append([span for f in request.mm_features for span in f.mm_position.extract_embeds_range()])

    with served.model.register_forward_pre_hook(note):
        (output,) = served.outputs(prompt(served.name, *(picture(*size) for size in SIZES[:2]), apet_keep=5), tokens=1)
    first, second = (column for column, token in enumerate(output.prompt_token_ids) if token == tiny.BOI)
    assert runner.is_mm_prefix_lm
    assert spans[0] == [(first + 1, first + 5), (second + 1, second + 5)]


@pytest.mark.parametrize("served", ["llava", "llava_next", "internvl", "qwen2_5_vl"], indirect=True)
def test_embeddings_given_from_outside(served):
    """They are compressed like the encoder's, or used unchanged if their tiles are not known."""
    tiles, rows = (1, 48) if served.name == "qwen2_5_vl" else (4, tiny.TILE // 4)
    x = torch.randn(tiles, rows, tiny.TEXT["hidden_size"], generator=torch.manual_seed(0))
    given: Any = [x.flatten(0, 1)]
    if served.name == "qwen2_5_vl":
        given = {"image_embeds": given[0], "image_grid_thw": torch.tensor([[1, 12, 16]])}
    request = {**prompt(served.name, picture(9, 9), apet_keep=6), "multi_modal_data": {"image": given}}
    ids, _, embeds, _ = served.read(request)
    if served.name == "llava":
        x = x.view(1, -1, x.shape[-1])
    expected = x.flatten(0, 1) if served.name == "llava_next" else torch.ops.apet.compress(x, 6)[0].flatten(0, 1)
    assert torch.equal(embeds[torch.tensor([token in visual(served.name) for token in ids])], expected)
